"""Pictures that kill whoever decodes them: who dies leaves a note, who comes next is careful."""

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
from pmd_pipeline.images.decode.results import ImageProcessor, ImageResult
from pmd_pipeline.images.fetch.client import Fetched

_TRIES = 3
"""How often a picture must kill a process of its own, which too may be killed by chance."""

_KEY_BYTES = 16
_NOBODY = b"-" * _KEY_BYTES


@dataclass(frozen=True)
class IsolatedProcessor:
    """Makes pictures, those that somebody may have died of in a process of their own.

    Dying once proves nothing: a kill or a full memory ends a process during one picture or another.
    So a suspect is made again where it can do no harm, and the outcome is the same whoever died.

    Args:
        maker: makes outcomes; by one thread at a time.
        suspects: keys of records that were being made when somebody died.
    """

    maker: ImageProcessor
    suspects: frozenset[str]
    note: mmap.mmap

    def outcome(self, key: str, found: Fetched | RecordError) -> ImageResult:
        """What becomes of the image of the record `key`."""
        if isinstance(found, RecordError):
            return self.maker.outcome(found)
        if key in self.suspects:
            return self._outcome_apart(found)
        self.note[-_KEY_BYTES:] = key.encode("ascii")
        outcome = self.maker.outcome(found)
        self.note[-_KEY_BYTES:] = _NOBODY
        return outcome

    def _outcome_apart(self, found: Fetched) -> ImageResult:
        for _ in range(_TRIES):
            outcome = _made_apart(self.maker, found)
            if outcome:
                return outcome
        return self.maker.failed(found, "crash", "a process died of decoding it")


@contextmanager
def isolated_processor(
    maker: ImageProcessor, folder: str | None, name: str
) -> Iterator[IsolatedProcessor]:
    """A maker that notes which record it is at, and knows the notes of those who died.

    The note is memory that the system writes to a file, whatever becomes of us; it is gone when the
    context ends, however it ends.

    Args:
        folder: for the notes; None takes the system's for temporary files.
        name: of the part, no two of which share a folder and a name.
    """
    place = Path(folder or tempfile.gettempdir())
    left = list(place.glob(f".{name}.*.note.tmp"))
    suspects = _noted(left)
    mine = place / f".{name}.{uuid4().hex}.note.tmp"
    mine.write_bytes("".join(sorted(suspects)).encode() + _NOBODY)
    try:
        with mine.open("r+b") as file, mmap.mmap(file.fileno(), 0) as note:
            yield IsolatedProcessor(maker, suspects, note)
    finally:
        for path in (mine, *left):
            path.unlink(missing_ok=True)


def _noted(notes: list[Path]) -> frozenset[str]:
    found = set[str]()
    for path in notes:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue  # who wrote it has come to its end
        found.update(
            content[start : start + _KEY_BYTES].decode("ascii", errors="replace")
            for start in range(0, len(content), _KEY_BYTES)
        )
    return frozenset(found - {_NOBODY.decode()})


def _made_apart(maker: ImageProcessor, found: Fetched) -> ImageResult | None:
    """What a process of its own makes of an image; None if it is killed."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_make, args=(maker, found, sender))
    process.start()
    sender.close()  # so that its end is the end
    with receiver:
        try:
            outcome: ImageResult | None = receiver.recv()
        except EOFError:
            outcome = None
    process.join()
    if process.exitcode is not None and process.exitcode > 0:
        return maker.outcome(found)  # a mistake of ours, which is to be seen here
    return outcome


def _make(maker: ImageProcessor, found: Fetched, sender: Connection) -> None:
    sender.send(maker.outcome(found))
