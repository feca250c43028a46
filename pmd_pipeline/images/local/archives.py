"""Images that the user already has: folders, zips and tars of files."""

import errno
import lzma
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import unquote

from pmd_pipeline.contract.errors import PmdError, RecordError
from pmd_pipeline.images.fetch.client import Fetched
from pmd_pipeline.index.records import IndexRecord

ImageLookup = Callable[[IndexRecord], Fetched | None]
"""Looks for a record's image; None where the shelf does not have it."""

Extent = tuple[int, int]
"""Where a member of a tar begins, and its size, in bytes."""

_Member = TypeVar("_Member")

_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""How files begin that gzip, bzip2, xz and zstd made."""

_DAMAGED = (
    zipfile.BadZipFile, EOFError, OSError, UnicodeDecodeError, zlib.error, lzma.LZMAError,
    struct.error,
)  # fmt: skip
"""What `zipfile` is known to raise on damaged members."""

_MOST_BYTES = 1 << 30
"""No image is as large, and memory holds a few of them."""


def open_archive(place: str) -> ImageLookup:
    """The shelf at `place`: a zip, a tar, or a folder of files.

    Raises:
        PmdError: there is nothing there, or it cannot be read at random.
    """
    path = Path(place)
    if path.is_dir():
        return _folder_shelf(path)
    if not path.is_file():
        raise PmdError(f"--images {place}: there is no such folder, zip or tar")
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(_PACKED):
        raise PmdError(f"--images {place}: unpack it first, a compressed tar has no random access")
    if head.startswith(b"PK"):
        return _zip_shelf(path)
    if tarfile.is_tarfile(path):
        return _tar_shelf(path)
    raise PmdError(f"--images {place}: this is neither a folder nor a zip nor a tar")


def stamp(place: str) -> str:
    """What a part's dependency says of a place: its name and size, not where it lies."""
    path = Path(place)
    return f"{path.name} {path.stat().st_size}" if path.is_file() else path.name


def names_of(record: IndexRecord) -> list[str]:
    """The names that a record's image may have in an archive, most exact first.

    Each is upstream's path, the last piece of the address, either without its first folder, or
    without all of them.
    """
    exact = [record.file] if record.file else []
    if record.url:
        last = record.url.split("#")[0].split("?")[0].rsplit("/", 1)[-1]
        exact += [last, unquote(last)]
    shorter = [name.split("/", 1)[1] for name in exact if "/" in name]
    bare = [name.rsplit("/", 1)[-1] for name in exact]
    return [name for name in dict.fromkeys(exact + shorter + bare) if name]


def tar_extents(path: Path) -> dict[str, Extent]:
    """Where the files of a plain tar are, by name.

    Raises:
        PmdError: it is damaged; a reader that went on would take the rest for missing.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            found = {
                member.name: (member.offset_data, member.size)
                for member in tar
                if member.isreg() and not member.issparse()
            }
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            is_whole = not file.read(tarfile.BLOCKSIZE).strip(b"\0")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise PmdError(f"{path} is no whole tar ({error}): get it again") from error
    if not is_whole:
        raise PmdError(f"{path} is no whole tar (damaged at byte {end}): get it again")
    return found


def _folder_shelf(root: Path) -> ImageLookup:
    def find(record: IndexRecord) -> Fetched | None:
        for name in names_of(record):
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts:
                continue  # upstream's names are not to be trusted
            body = _file_body(root / inside)
            if body is not None:
                return Fetched(body)
        return None

    return find


def _file_body(path: Path) -> bytes | None:
    try:
        if not path.is_file():
            return None
        _check_size(path.stat().st_size)
        return path.read_bytes()
    except OSError as error:
        if error.errno in {errno.ENAMETOOLONG, errno.EINVAL}:  # the ends of some addresses are
            return None
        raise PmdError(f"cannot read {path} ({error.strerror}): make it readable") from error


def _zip_shelf(path: Path) -> ImageLookup:
    archive, lock, by_name = _opened_zip(str(path), path.stat().st_mtime_ns)

    def find(record: IndexRecord) -> Fetched | None:
        for name in names_of(record):
            if name in by_name:
                return Fetched(_zip_body(archive, lock, by_name[name], path.name))
        return None

    return find


def _zip_body(
    archive: zipfile.ZipFile, lock: threading.Lock, entry: zipfile.ZipInfo, named: str
) -> bytes:
    _check_size(entry.file_size)
    try:
        with lock:  # opening and closing count readers without one; reading has its own
            member = archive.open(entry)
        try:
            return member.read()
        finally:
            with lock:
                member.close()
    except NotImplementedError as error:
        raise PmdError(f"{named} is packed in a way not read here ({error}): unpack it") from error
    except _DAMAGED as error:
        raise RecordError("truncated", f"{named} is damaged here") from error


def _tar_shelf(path: Path) -> ImageLookup:
    by_name = _opened_tar(str(path), path.stat().st_mtime_ns)

    def find(record: IndexRecord) -> Fetched | None:
        for name in names_of(record):
            if name in by_name:
                return Fetched(tar_body(path, by_name[name]))
        return None

    return find


def tar_body(path: Path, extent: Extent) -> bytes:
    """The bytes of one member.

    Raises:
        RecordError: they are not all there, or too many.
        PmdError: the tar itself is not there any more.
    """
    offset, size = extent
    _check_size(size)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            body = file.read(size)
    except OSError as error:
        raise PmdError(f"cannot read {path} ({error.strerror}): put it back") from error
    if len(body) < size:
        raise RecordError("truncated", f"{path.name} is damaged here")
    return body


def _check_size(num_bytes: int) -> None:
    if num_bytes > _MOST_BYTES:
        raise RecordError("too_large", f"more than {_MOST_BYTES} bytes")


@lru_cache(maxsize=8)
def _opened_zip(
    path: str, _changed: int
) -> tuple[zipfile.ZipFile, threading.Lock, dict[str, zipfile.ZipInfo]]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise PmdError(f"--images {path} is no whole zip ({error}): get it again") from error
    entries = [one for one in archive.infolist() if not one.filename.endswith("/")]
    if any(entry.flag_bits & 1 for entry in entries):
        raise PmdError(f"--images {path} is encrypted: unpack it")
    return archive, threading.Lock(), _by_name((entry.filename, entry) for entry in entries)


@lru_cache(maxsize=8)
def _opened_tar(path: str, _changed: int) -> dict[str, Extent]:
    return _by_name(tar_extents(Path(path)).items())


def _by_name(members: Iterable[tuple[str, _Member]]) -> dict[str, _Member]:
    """Members by path, and by base name where only one has it: folders around files differ."""
    exact = {name.removeprefix("./"): member for name, member in members}
    bare: dict[str, list[_Member]] = {}
    for name, member in exact.items():
        bare.setdefault(name.rsplit("/", 1)[-1], []).append(member)
    return {name: found[0] for name, found in bare.items() if len(found) == 1} | exact
