"""The folder of a run: what is in it besides checkpoints and metrics, and who may write there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from flava_train.errors import FlavaError

CONFIG, VOCABULARY = "config.toml", "vocab.txt"


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


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Hold the folder of a run, made if need be, so that no other process trains into it.

    Raises:
        FlavaError: another does, or the folder cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("w")
    except OSError as error:
        raise FlavaError(
            f"cannot write to {run}: {error.strerror}; choose another --out"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FlavaError(
                f"another flava-train writes to {run}; wait for it, or choose another --out"
            ) from error
        yield
