"""Results that wait for the results before them: a few in memory, the rest on disk."""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import IO, Self

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.images.decode.processor import ImageResult


class ReorderBuffer:
    """Results by number, each kept until its last use.

    Images in memory never exceed `max_bytes`. Further images go to a file without a name, which
    the system deletes when the process ends.

    Args:
        uses: how often each result will be taken.
        folder: of the file; None takes the system's folder for temporary files.
        max_bytes: of images in memory.
    """

    def __init__(self, uses: Mapping[int, int], folder: str | None, max_bytes: int) -> None:
        self._uses_left = Counter(uses)
        self._folder = folder
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._results: dict[int, ImageResult] = {}
        self._spilled: dict[int, tuple[int, int]] = {}
        self._file: IO[bytes] | None = None
        self._file_size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def __contains__(self, number: int) -> bool:
        return number in self._results

    def put(self, number: int, result: ImageResult) -> None:
        """Keep a result.

        Raises:
            PmdError: the disk is full.
        """
        image = result.image
        if image and self._num_bytes + len(image.content) > self._max_bytes:
            self._spilled[number] = self._spill(image.content)
            result = replace(result, image=replace(image, content=b""))
        elif image:
            self._num_bytes += len(image.content)
        self._results[number] = result

    def take(self, number: int) -> ImageResult:
        """A result that was put; deleted with its last use."""
        result = self._results[number]
        spilled = self._spilled.get(number)
        self._uses_left[number] -= 1
        if not self._uses_left[number]:
            del self._results[number]
            if result.image and not self._spilled.pop(number, None):
                self._num_bytes -= len(result.image.content)
        if spilled and result.image:
            result = replace(result, image=replace(result.image, content=self._read(*spilled)))
        return result

    def _spill(self, content: bytes) -> tuple[int, int]:
        """Write `content` to the file; its offset and size."""
        offset = self._file_size
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed by __exit__
            self._file.seek(offset)
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            folder = self._folder or tempfile.gettempdir()
            raise PmdError(
                f"cannot write in {folder}: {error.strerror}; make room there, and run again"
            ) from error
        self._file_size += len(content)
        return offset, len(content)

    def _read(self, offset: int, size: int) -> bytes:
        assert self._file is not None
        self._file.seek(offset)
        return self._file.read(size)
