"""Outcomes that wait for their turn: a few in memory, the rest on disk."""

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import IO, Self

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.images.decode.processor import ImageResult


class ReorderBuffer:
    """Outcomes by number, each until it has been taken as often as it will be.

    However many wait, and however long, their pictures take no more than `limit` bytes of memory;
    what is beyond lies in a file without a name, which is gone with the process.

    Args:
        uses: how often each will be taken.
        folder: where the file is; None leaves it to the system.
        limit: bytes.
    """

    def __init__(self, uses: Mapping[int, int], folder: str | None, limit: int) -> None:
        self._left = Counter(uses)
        self._folder = folder
        self._limit = limit
        self._held = 0
        self._outcomes: dict[int, ImageResult] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._file: IO[bytes] | None = None
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def __contains__(self, number: int) -> bool:
        return number in self._outcomes

    def put(self, number: int, outcome: ImageResult) -> None:
        """Keep an outcome.

        Raises:
            PmdError: the disk is full.
        """
        picture = outcome.image
        if picture and self._held + len(picture.content) > self._limit:
            self._places[number] = self._written(picture.content)
            outcome = replace(outcome, image=replace(picture, content=b""))
        elif picture:
            self._held += len(picture.content)
        self._outcomes[number] = outcome

    def take(self, number: int) -> ImageResult:
        """An outcome that is there; it is forgotten with its last use."""
        outcome = self._outcomes[number]
        place = self._places.get(number)
        self._left[number] -= 1
        if not self._left[number]:
            del self._outcomes[number]
            if outcome.image and not self._places.pop(number, None):
                self._held -= len(outcome.image.content)
        if place and outcome.image:
            outcome = replace(outcome, image=replace(outcome.image, content=self._read(*place)))
        return outcome

    def _written(self, content: bytes) -> tuple[int, int]:
        place = self._end, len(content)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed by __exit__
            self._file.seek(self._end)
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            raise PmdError(
                f"cannot write in {where}: {error.strerror}; make room there, and run again"
            ) from error
        self._end += len(content)
        return place

    def _read(self, offset: int, size: int) -> bytes:
        assert self._file is not None
        self._file.seek(offset)
        return self._file.read(size)
