"""List, sweep and delete folders, on this machine or under any fsspec address."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import (
    FileAbsentError,
    filesystem_of,
    join,
    local_path,
    read_bytes,
    reading,
    reason_of,
)

Model = TypeVar("Model", bound=BaseModel)

_STALE_SECONDS = 24 * 3600.0


def load_model(kind: type[Model], folder: str, name: str) -> Model | None:
    """The model in the JSON file `name`; None where there is no such file, or not a valid one.

    A file of an older format is not valid, so it is made again.
    """
    try:
        return kind.model_validate_json(read_bytes(join(folder, name)))
    except (FileAbsentError, ValidationError):
        return None


def sizes(folder: str) -> dict[str, int]:
    """Bytes of every file directly in `folder`, by name; nothing where there is no such folder."""
    return {name: size for name, kind, size in _list(folder) if kind == "file"}


def folders(folder: str) -> list[str]:
    """Names of the folders directly in `folder`, sorted; none where there is no such folder."""
    return sorted(name for name, kind, _ in _list(folder) if kind == "directory")


def remove(address: str) -> None:
    """Delete a file, or a folder with its content, if it exists."""
    filesystem, path = filesystem_of(address)
    try:
        filesystem.rm(path, recursive=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise PmdError(f"cannot delete {address}: {reason_of(error)}") from error


def sweep(folder: str) -> None:
    """Delete temporary files of killed writers that are older than a day, in a local folder."""
    path = local_path(folder)
    for left in path.glob(".*.tmp") if path else ():
        with suppress(FileNotFoundError):  # another sweep deleted it
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


def _list(folder: str) -> Iterator[tuple[str, str, int]]:
    """Name, kind and size of the entries of `folder`."""
    filesystem, path = filesystem_of(folder)
    try:
        with reading(folder):
            entries = filesystem.ls(path, detail=True, refresh=True)
    except FileAbsentError:
        return
    for entry in entries:
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        yield name, entry["type"], int(entry["size"] or 0)
