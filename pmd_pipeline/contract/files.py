"""Files that appear whole or not at all, in a folder or under any fsspec address."""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pmd_pipeline.contract.errors import PmdError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_CHUNK = 1 << 20


class FileAbsentError(PmdError):
    """There is no file at the address."""


class FileUnreadableError(PmdError):
    """The file system gave an error; for a file elsewhere, a later attempt may succeed."""


@contextmanager
def whole_file(address: str) -> Iterator[BinaryIO]:
    """Open `address` for writing so that it appears complete or not at all.

    Each writer has its own temporary file beside `address`; the last rename wins. A killed process
    leaves at most a `.tmp`, which no reader opens. For an address that is not local, the file is
    written to the temporary folder and then uploaded in one request.

    Raises:
        PmdError: nothing can be written there (full disk, no permission). Errors of the block are
            raised unchanged.
    """
    filesystem, target = filesystem_of(address)
    path = Path(target) if isinstance(filesystem, LocalFileSystem) else None
    folder = path.parent if path else Path(tempfile.gettempdir())
    tmp = folder / f".{target.rsplit('/', 1)[-1]}.{uuid4().hex}.tmp"
    with writing(address):
        folder.mkdir(parents=True, exist_ok=True)
        raw = _Target(tmp, address)
    try:
        with io.BufferedWriter(raw, _CHUNK) as file:
            yield cast(BinaryIO, file)
            file.flush()
            with writing(address):
                os.fsync(file.fileno())
        with writing(address):
            if path:
                tmp.replace(path)
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
    filesystem, path = filesystem_of(address)
    with reading(address):
        opened = filesystem.open(path, "rb")
    with opened as file:
        yield file


def read_bytes(address: str) -> bytes:
    """The whole content of `address`."""
    with open_read(address) as file:
        return file.read()


def sha256_of(address: str) -> str:
    """The sha256 of a file as hex, read in chunks."""
    digest = hashlib.sha256()
    with open_read(address) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def local_path(address: str) -> Path | None:
    """The path of `address` on this machine's file system; None where it is elsewhere."""
    filesystem, path = filesystem_of(address)
    return Path(path) if isinstance(filesystem, LocalFileSystem) else None


def is_local(address: str) -> bool:
    """Whether `address` is on this machine's file system."""
    return local_path(address) is not None


def size_of(address: str) -> int | None:
    """Bytes of the file at `address`; None where there is none.

    Raises:
        PmdError: the file system cannot be read.
    """
    filesystem, path = filesystem_of(address)
    with reading(address):
        try:
            return int(filesystem.size(path))
        except FileNotFoundError:
            return None


def join(folder: str, *names: str) -> str:
    """The address of `names` below `folder`.

    >>> join("memory://", "shards", "coco"), join("data/", "index")
    ('memory://shards/coco', 'data/index')
    """
    gap = "" if not folder or folder.endswith("/") else "/"
    return folder + gap + "/".join(names)


def filesystem_of(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `address`, and the path there.

    Raises:
        PmdError: an unknown protocol, or one whose package is not installed.
    """
    with reading(address):
        try:
            filesystem, path = fsspec.core.url_to_fs(address)
        except (ValueError, ImportError) as error:  # unknown protocol, or its package is missing
            raise PmdError(f"cannot use the address {address}: {error}") from error
    return filesystem, str(path)


@contextmanager
def reading(address: str) -> Iterator[None]:
    """Turn errors of reading `address` into a PmdError of one sentence."""
    try:
        yield
    except PmdError:
        raise
    except FileNotFoundError as error:
        raise FileAbsentError(f"cannot read {address}: there is no such file") from error
    except OSError as error:
        raise FileUnreadableError(f"cannot read {address}: {reason_of(error)}") from error
    except Exception as error:  # libraries below fsspec raise their own kinds
        raise FileUnreadableError(
            f"cannot read {address}: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def writing(address: str) -> Iterator[None]:
    """Turn errors of writing `address` into a PmdError of one sentence."""
    try:
        yield
    except OSError as error:
        raise PmdError(
            f"cannot write {address}: {reason_of(error)}; make room there or choose another place, "
            "and run again"
        ) from error


def reason_of(error: OSError) -> str:
    """The reason of a system error, in a few words."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file is where a folder should be"
    return error.strerror or str(error)


def _sync_folder(folder: Path) -> None:
    """Flush the folder, so that the rename survives a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Target(io.FileIO):
    """The temporary file; its write errors name the address that it becomes."""

    def __init__(self, path: Path, address: str) -> None:
        super().__init__(path, "wb")
        self._address = address

    def write(self, content: "Buffer", /) -> int:
        with writing(self._address):
            return super().write(content)
