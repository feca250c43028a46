"""Local images in folders, zips and tars, looked up by the names that a record's image may have."""

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
from pmd_pipeline.images.fetch.client import FetchedImage
from pmd_pipeline.index.records import IndexRecord

ImageLookup = Callable[[IndexRecord], FetchedImage | None]
"""Returns a record's image; None where the archive does not have it."""

Extent = tuple[int, int]
"""Offset of a tar member's content, and its size, in bytes."""

_Member = TypeVar("_Member")

_COMPRESSED_PREFIXES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd."""

_ZIP_ERRORS = (
    zipfile.BadZipFile, EOFError, OSError, UnicodeDecodeError, zlib.error, lzma.LZMAError,
    struct.error,
)  # fmt: skip
"""Exceptions that `zipfile` is known to raise on damaged members."""

_MAX_BYTES = 1 << 30
"""Largest image file that is read; several are in memory at a time."""


def open_archive(path: str) -> ImageLookup:
    """The lookup for a zip, a tar, or a folder of files.

    Raises:
        PmdError: there is no such file, or it has no random access.
    """
    archive = Path(path)
    if archive.is_dir():
        return _folder_lookup(archive)
    if not archive.is_file():
        raise PmdError(f"--images {path}: there is no such folder, zip or tar")
    with archive.open("rb") as file:
        head = file.read(8)
    if head.startswith(_COMPRESSED_PREFIXES):
        raise PmdError(f"--images {path}: unpack it first, a compressed tar has no random access")
    if head.startswith(b"PK"):
        return _zip_lookup(archive)
    if tarfile.is_tarfile(archive):
        return _tar_lookup(archive)
    raise PmdError(f"--images {path}: this is neither a folder nor a zip nor a tar")


def archive_stamp(path: str) -> str:
    """Name and size of an archive, whatever its folder: part of what a shard depends on."""
    archive = Path(path)
    return f"{archive.name} {archive.stat().st_size}" if archive.is_file() else archive.name


def candidate_names(record: IndexRecord) -> list[str]:
    """The names that a record's image may have in an archive, most exact first.

    Each is upstream's path or the last segment of the URL; then either without its first folder;
    then without all folders.
    """
    exact = [record.file] if record.file else []
    if record.url:
        last = record.url.split("#")[0].split("?")[0].rsplit("/", 1)[-1]
        exact += [last, unquote(last)]
    shorter = [name.split("/", 1)[1] for name in exact if "/" in name]
    bare = [name.rsplit("/", 1)[-1] for name in exact]
    return [name for name in dict.fromkeys(exact + shorter + bare) if name]


def tar_extents(path: Path) -> dict[str, Extent]:
    """The extents of the files of an uncompressed tar, by name.

    Raises:
        PmdError: it is damaged; the members after the damage would count as missing.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            extents = {
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
    return extents


def read_tar_member(path: Path, extent: Extent) -> bytes:
    """The content of one tar member.

    Raises:
        RecordError: it is incomplete or too large.
        PmdError: the tar itself cannot be read any more.
    """
    offset, size = extent
    _refuse_large(size)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            body = file.read(size)
    except OSError as error:
        raise PmdError(f"cannot read {path} ({error.strerror}): put it back") from error
    if len(body) < size:
        raise RecordError("truncated", f"{path.name} is damaged here")
    return body


def _folder_lookup(root: Path) -> ImageLookup:
    def look_up(record: IndexRecord) -> FetchedImage | None:
        for name in candidate_names(record):
            relative = PurePosixPath(name)
            if relative.is_absolute() or ".." in relative.parts:
                continue  # upstream's names are not trusted
            body = _read_file(root / relative)
            if body is not None:
                return FetchedImage(body)
        return None

    return look_up


def _read_file(path: Path) -> bytes | None:
    try:
        if not path.is_file():
            return None
        _refuse_large(path.stat().st_size)
        return path.read_bytes()
    except OSError as error:
        # the end of a URL may be no valid file name
        if error.errno in {errno.ENAMETOOLONG, errno.EINVAL}:
            return None
        raise PmdError(f"cannot read {path} ({error.strerror}): make it readable") from error


def _zip_lookup(path: Path) -> ImageLookup:
    archive, lock, entries = _open_zip(str(path), path.stat().st_mtime_ns)

    def look_up(record: IndexRecord) -> FetchedImage | None:
        for name in candidate_names(record):
            if name in entries:
                return FetchedImage(_read_zip_member(archive, lock, entries[name], path.name))
        return None

    return look_up


def _read_zip_member(
    archive: zipfile.ZipFile, lock: threading.Lock, entry: zipfile.ZipInfo, archive_name: str
) -> bytes:
    _refuse_large(entry.file_size)
    try:
        with lock:  # `zipfile` locks reading itself, but not its count of open members
            member = archive.open(entry)
        try:
            return member.read()
        finally:
            with lock:
                member.close()
    except NotImplementedError as error:
        raise PmdError(
            f"{archive_name} is packed in a way not read here ({error}): unpack it"
        ) from error
    except _ZIP_ERRORS as error:
        raise RecordError("truncated", f"{archive_name} is damaged here") from error


def _tar_lookup(path: Path) -> ImageLookup:
    extents = _open_tar(str(path), path.stat().st_mtime_ns)

    def look_up(record: IndexRecord) -> FetchedImage | None:
        for name in candidate_names(record):
            if name in extents:
                return FetchedImage(read_tar_member(path, extents[name]))
        return None

    return look_up


def _refuse_large(num_bytes: int) -> None:
    if num_bytes > _MAX_BYTES:
        raise RecordError("too_large", f"more than {_MAX_BYTES} bytes")


@lru_cache(maxsize=8)
def _open_zip(
    path: str, _mtime: int
) -> tuple[zipfile.ZipFile, threading.Lock, dict[str, zipfile.ZipInfo]]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise PmdError(f"--images {path} is no whole zip ({error}): get it again") from error
    entries = [one for one in archive.infolist() if not one.filename.endswith("/")]
    if any(entry.flag_bits & 1 for entry in entries):
        raise PmdError(f"--images {path} is encrypted: unpack it")
    return archive, threading.Lock(), _members_by_name((one.filename, one) for one in entries)


@lru_cache(maxsize=8)
def _open_tar(path: str, _mtime: int) -> dict[str, Extent]:
    return _members_by_name(tar_extents(Path(path)).items())


def _members_by_name(members: Iterable[tuple[str, _Member]]) -> dict[str, _Member]:
    """Members by path, and by base name where it is unique: the folders around files differ."""
    by_path = {name.removeprefix("./"): member for name, member in members}
    by_base_name: dict[str, list[_Member]] = {}
    for name, member in by_path.items():
        by_base_name.setdefault(name.rsplit("/", 1)[-1], []).append(member)
    unique = {name: same[0] for name, same in by_base_name.items() if len(same) == 1}
    return unique | by_path
