"""Files that appear whole or not at all, in a folder or under any fsspec address."""

import hashlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ValidationError

from pmd_pipeline.errors import PmdError

if TYPE_CHECKING:
    from typing_extensions import Buffer

Model = TypeVar("Model", bound=BaseModel)

_CHUNK = 1 << 20
_STALE_SECONDS = 24 * 3600.0


@contextmanager
def whole_file(address: str) -> Iterator[BinaryIO]:
    """Open `address` for writing so that it appears complete or not at all.

    Two workers that write the same address do not meet: each has its own temporary neighbour, and
    the last rename wins. A killed process leaves at most a `.tmp`, which nobody reads. Elsewhere
    than in a folder, the file is written here and then put in its place in one request.

    Raises:
        PmdError: nothing can be written there (full disk, no permission). What the block raises of
            its own flies as it is.
    """
    filesystem, target = _place(address)
    here = Path(target) if isinstance(filesystem, LocalFileSystem) else None
    folder = here.parent if here else Path(tempfile.gettempdir())
    tmp = folder / f".{target.rsplit('/', 1)[-1]}.{uuid4().hex}.tmp"
    with _writing(address):
        folder.mkdir(parents=True, exist_ok=True)
        raw = _Target(tmp, address)
    try:
        with io.BufferedWriter(raw, _CHUNK) as file:
            yield cast(BinaryIO, file)
            file.flush()
            with _writing(address):
                os.fsync(file.fileno())
        with _writing(address):
            if here:
                tmp.replace(here)
                _sync_folder(folder)
            else:
                filesystem.put_file(str(tmp), target)
    finally:
        tmp.unlink(missing_ok=True)


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
    filesystem, path = _place(address)
    with _reading(address):
        opened = filesystem.open(path, "rb")
    with opened as file:
        yield file


def read_bytes(address: str) -> bytes:
    """The whole content of `address`."""
    with open_read(address) as file:
        return file.read()


def load_model(kind: type[Model], folder: str, name: str) -> Model | None:
    """The model that the JSON file `name` holds; None where there is none that fits.

    A file of an older format does not fit, and is made again.
    """
    try:
        return kind.model_validate_json(read_bytes(join(folder, name)))
    except (_Absent, ValidationError):
        return None


def sizes(folder: str) -> dict[str, int]:
    """Bytes of every file directly in `folder`, by name; nothing where there is no such folder."""
    return {name: size for name, kind, size in _listed(folder) if kind == "file"}


def folders(folder: str) -> list[str]:
    """Names of the folders directly in `folder`, sorted; none where there is no such folder."""
    return sorted(name for name, kind, _ in _listed(folder) if kind == "directory")


def remove(address: str) -> None:
    """Delete a file, or a folder with all that is in it; nothing happens where there is none."""
    filesystem, path = _place(address)
    try:
        filesystem.rm(path, recursive=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise PmdError(f"cannot delete {address}: {_reason(error)}") from error


def sha256_of(address: str) -> str:
    """The sha256 of a file as hex, read in chunks."""
    digest = hashlib.sha256()
    with open_read(address) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def local_path(address: str) -> Path | None:
    """The path of `address` on this machine's file system; None where it is elsewhere."""
    filesystem, path = _place(address)
    return Path(path) if isinstance(filesystem, LocalFileSystem) else None


def is_local(address: str) -> bool:
    """Say whether `address` is on this machine's file system."""
    return local_path(address) is not None


def sweep(folder: str) -> None:
    """Delete what killed writers left in a folder of this machine more than a day ago."""
    here = local_path(folder)
    for left in here.glob(".*.tmp") if here else ():
        with suppress(FileNotFoundError):  # another sweep was faster
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


def join(folder: str, *names: str) -> str:
    """The address of `names` below `folder`.

    >>> join("memory://", "shards", "coco"), join("data/", "index")
    ('memory://shards/coco', 'data/index')
    """
    gap = "" if not folder or folder.endswith("/") else "/"
    return folder + gap + "/".join(names)


class _Target(io.FileIO):
    """The temporary file; what goes wrong in writing is told of the address it is for."""

    def __init__(self, path: Path, address: str) -> None:
        super().__init__(path, "wb")
        self._address = address

    def write(self, content: "Buffer", /) -> int:
        with _writing(self._address):
            return super().write(content)


def _place(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one without its package
        raise PmdError(f"cannot use the address {address}: {error}") from error
    return filesystem, str(path)


def _listed(folder: str) -> Iterator[tuple[str, str, int]]:
    """Name, kind and size of all that is directly in `folder`."""
    filesystem, path = _place(folder)
    try:
        with _reading(folder):
            found = filesystem.ls(path, detail=True, refresh=True)
    except _Absent:
        return
    for entry in found:
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        yield name, entry["type"], int(entry["size"] or 0)


class _Absent(PmdError):
    """There is nothing at the address."""


@contextmanager
def _reading(address: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise _Absent(f"cannot read {address}: there is no such file") from error
    except OSError as error:
        raise PmdError(f"cannot read {address}: {_reason(error)}") from error


@contextmanager
def _writing(address: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PmdError(
            f"cannot write {address}: {_reason(error)}; make room there or choose another place, "
            "and run again"
        ) from error


def _reason(error: OSError) -> str:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file is where a folder should be"
    return error.strerror or str(error)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
