"""Files that appear whole or not at all, in a folder or under any fsspec address."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pmd_pipeline.errors import PmdError

_CHUNK = 1 << 20


@contextmanager
def whole_file(address: str) -> Iterator[BinaryIO]:
    """Open `address` for writing so that it appears complete or not at all.

    Two workers that write the same address do not meet: each has its own temporary neighbour, and
    the last rename wins. A killed process leaves at most a `.tmp`, which nobody reads. Elsewhere
    than in a folder, the file is written here and then put in its place in one request.

    Raises:
        PmdError: nothing can be written there (full disk, no permission).
    """
    with _whole_path(address) as path, path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_whole(address: str, content: bytes) -> None:
    """Write `content` to `address`, whole or not at all."""
    with whole_file(address) as file:
        file.write(content)


@contextmanager
def open_read(address: str) -> Iterator[BinaryIO]:
    """Open `address` for reading at any offset.

    Raises:
        PmdError: there is no such file, or it may not be read.
    """
    try:
        with fsspec.open(address, "rb") as file:
            yield file
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise PmdError(f"cannot read {address}: {error.strerror or 'it is not there'}") from error


def read_bytes(address: str) -> bytes:
    """The whole content of `address`."""
    with open_read(address) as file:
        return file.read()


def sizes(folder: str) -> dict[str, int]:
    """Bytes of every file directly in `folder`, by name; nothing where there is no such folder."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    try:
        found = filesystem.ls(path, detail=True, refresh=True)
    except FileNotFoundError:
        return {}
    return {
        entry["name"].rstrip("/").rsplit("/", 1)[-1]: int(entry["size"] or 0)
        for entry in found
        if entry["type"] == "file"
    }


def folders(folder: str) -> list[str]:
    """Names of the folders directly in `folder`, sorted; none where there is no such folder."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    try:
        found = filesystem.ls(path, detail=True, refresh=True)
    except FileNotFoundError:
        return []
    return sorted(
        entry["name"].rstrip("/").rsplit("/", 1)[-1]
        for entry in found
        if entry["type"] == "directory"
    )


def remove(address: str) -> None:
    """Delete a file, or a folder with all that is in it; nothing happens where there is none."""
    filesystem, path = fsspec.core.url_to_fs(address)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def sha256_of(address: str) -> str:
    """The sha256 of a file as hex, read in chunks."""
    digest = hashlib.sha256()
    with open_read(address) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_local(address: str) -> bool:
    """Say whether `address` is on this machine's file system."""
    return isinstance(fsspec.core.url_to_fs(address)[0], LocalFileSystem)


def join(folder: str, *names: str) -> str:
    """The address of `names` below `folder`."""
    return "/".join((folder.rstrip("/") or "", *names))


@contextmanager
def _whole_path(address: str) -> Iterator[Path]:
    filesystem, target = fsspec.core.url_to_fs(address)
    here = Path(target) if isinstance(filesystem, LocalFileSystem) else None
    folder = here.parent if here else Path(tempfile.gettempdir())
    name = here.name if here else address.rsplit("/", 1)[-1]
    tmp = folder / f".{name}.{uuid4().hex}.tmp"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield tmp
            if here:
                tmp.replace(here)
                _sync_folder(folder)
            else:
                filesystem.put_file(str(tmp), target)
        finally:
            tmp.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PmdError(
            f"cannot write {address}: {reason}; free or choose another place and run again, "
            "what is finished stays finished"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
