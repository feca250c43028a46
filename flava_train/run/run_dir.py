"""The folder of a run, its lock, and the signals that stop a run."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from pmd_pipeline.contract.errors import PmdError

CONFIG, VOCABULARY = "config.toml", "vocab.txt"

_locks: list[TextIO] = []
"""Lock files of this process."""


class StopRequest:
    """The signal that requested the run to stop; None if there was none."""

    signal: int | None = None


@contextmanager
def handle_signals() -> Iterator[StopRequest]:
    """Record SIGTERM and Ctrl-C instead of ending; a second Ctrl-C ends at once."""
    stop = StopRequest()

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
def lock_run_dir(run: Path) -> Iterator[None]:
    """Make the folder of a run if it is absent, and lock it against other trainers.

    Raises:
        PmdError: another process holds the lock, or the folder cannot be made.
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


def _close_locks() -> None:
    """Close the lock files in a forked process: only its parent holds the locks.

    A worker of the loader lives some seconds longer than a killed trainer, and would keep its lock.
    """
    while _locks:
        _locks.pop().close()


os.register_at_fork(after_in_child=_close_locks)
