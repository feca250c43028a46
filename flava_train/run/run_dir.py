"""The folder of a run, who may write there, and who may stop it."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO
from uuid import uuid4

from pmd_pipeline.contract.errors import PmdError

CONFIG, VOCABULARY = "config.toml", "vocab.txt"

_locks: list[TextIO] = []
"""Files whose locks this process holds."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all."""
    tmp = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with tmp.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


class Stop:
    """Which signal told the run to stop, if one did."""

    signal: int | None = None


@contextmanager
def told_to_stop() -> Iterator[Stop]:
    """Take note of SIGTERM and Ctrl-C; a second Ctrl-C ends at once."""
    stop = Stop()

    def note(number: int, _: FrameType | None) -> None:
        stop.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Hold the folder of a run, made if need be, so that no other process trains into it.

    Raises:
        PmdError: another does, or the folder cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("w")
    except OSError as error:
        raise PmdError(f"cannot write to {run}: {error.strerror}; choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PmdError(
                f"another flava-train writes to {run}; wait for it, or choose another --out"
            ) from error
        _locks.append(file)
        try:
            yield
        finally:
            _locks.remove(file)


def _forget_locks() -> None:
    """Close, in a process that was forked, what only its parent holds.

    A loader's worker outlives a trainer that is killed by some seconds, and would hold its lock.
    """
    while _locks:
        _locks.pop().close()


os.register_at_fork(after_in_child=_forget_locks)
