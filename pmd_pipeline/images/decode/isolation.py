"""Images that crash the decoder: detected by notes of crashed workers, decoded in subprocesses.

A worker records the key of the image that it decodes. After a crash, the next worker of the part
decodes that image in a subprocess.
"""

import mmap
import multiprocessing
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from uuid import uuid4

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.images.decode.processor import ImageProcessor, ImageResult
from pmd_pipeline.images.fetch.client import FetchedImage

_ATTEMPTS = 3
"""Subprocesses that an image must crash to fail; a subprocess may also be killed by chance."""

_KEY_BYTES = 16
_NO_KEY = b"-" * _KEY_BYTES


@dataclass(frozen=True)
class IsolatedProcessor:
    """An `ImageProcessor` that processes suspect images in subprocesses.

    One crash proves nothing: a kill or a lack of memory may end a process during any image. So a
    suspect is processed again in a subprocess, and the result does not depend on the crash.

    Args:
        processor: used by one thread at a time.
        suspects: keys of the records that crashed workers were processing.
        note: a file in memory, which ends with the key of the record in progress.
    """

    processor: ImageProcessor
    suspects: frozenset[str]
    note: mmap.mmap

    def process(self, key: str, fetched: FetchedImage | RecordError) -> ImageResult:
        """The result of a fetch for the record `key`."""
        if isinstance(fetched, RecordError):
            return self.processor.process(fetched)
        if key in self.suspects:
            return self._process_suspect(fetched)
        self.note[-_KEY_BYTES:] = key.encode("ascii")
        result = self.processor.process(fetched)
        self.note[-_KEY_BYTES:] = _NO_KEY
        return result

    def _process_suspect(self, fetched: FetchedImage) -> ImageResult:
        for _ in range(_ATTEMPTS):
            result = _result_of_subprocess(self.processor, fetched)
            if result:
                return result
        return self.processor.failure(fetched, "crash", "a process died of decoding it")


@contextmanager
def isolated_processor(
    processor: ImageProcessor, folder: str | None, name: str
) -> Iterator[IsolatedProcessor]:
    """A processor that writes a note of each record, and reads the notes of crashed workers.

    The note is a memory map, so the system writes it to disk even if this process is killed. It is
    deleted when the context ends.

    Args:
        folder: of the notes; None takes the system's folder for temporary files.
        name: of the part; unique within the folder.
    """
    notes = Path(folder or tempfile.gettempdir())
    left_notes = list(notes.glob(f".{name}.*.note.tmp"))
    suspects = _suspects(left_notes)
    own_note = notes / f".{name}.{uuid4().hex}.note.tmp"
    own_note.write_bytes("".join(sorted(suspects)).encode() + _NO_KEY)
    try:
        with own_note.open("r+b") as file, mmap.mmap(file.fileno(), 0) as note:
            yield IsolatedProcessor(processor, suspects, note)
    finally:
        for path in (own_note, *left_notes):
            path.unlink(missing_ok=True)


def _suspects(notes: list[Path]) -> frozenset[str]:
    keys = set[str]()
    for path in notes:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue  # the worker that wrote it has finished
        keys.update(
            content[start : start + _KEY_BYTES].decode("ascii", errors="replace")
            for start in range(0, len(content), _KEY_BYTES)
        )
    return frozenset(keys - {_NO_KEY.decode()})


def _result_of_subprocess(processor: ImageProcessor, fetched: FetchedImage) -> ImageResult | None:
    """The result of a subprocess; None if it is killed."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_result, args=(processor, fetched, sender))
    process.start()
    sender.close()  # so that the pipe ends with the subprocess
    with receiver:
        try:
            result: ImageResult | None = receiver.recv()
        except EOFError:
            result = None
    process.join()
    if process.exitcode is not None and process.exitcode > 0:
        return processor.process(fetched)  # an exception of ours, which is raised again here
    return result


def _send_result(processor: ImageProcessor, fetched: FetchedImage, sender: Connection) -> None:
    sender.send(processor.process(fetched))
