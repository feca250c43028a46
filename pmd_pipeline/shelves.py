"""Images that the user already has: folders, zips and tars of files."""

import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from pmd_pipeline.errors import PmdError, RecordError
from pmd_pipeline.fetch import Fetched
from pmd_pipeline.records import IndexRecord

Shelf = Callable[[IndexRecord], Fetched | None]
"""Looks for a record's image; None where the shelf does not have it."""


def open_shelf(place: str) -> Shelf:
    """The shelf at `place`: a zip, a tar, or a folder of files.

    Raises:
        PmdError: there is nothing there, or it cannot be read at random.
    """
    path = Path(place)
    if path.is_dir():
        return _folder_shelf(path)
    if not path.is_file():
        raise PmdError(f"--images {place}: there is no such folder, zip or tar")
    if path.name.endswith((".gz", ".tgz", ".bz2", ".xz")):
        raise PmdError(f"--images {place}: unpack it first, a compressed tar has no random access")
    if zipfile.is_zipfile(path):
        return _zip_shelf(path)
    if tarfile.is_tarfile(path):
        return _tar_shelf(path)
    raise PmdError(f"--images {place}: this is neither a folder nor a zip nor a tar")


def stamp(place: str) -> str:
    """What a part's dependency says of a place: its name and size, not where it lies."""
    path = Path(place)
    return f"{path.name} {path.stat().st_size}" if path.is_file() else path.name


def names_of(record: IndexRecord) -> list[str]:
    """The names that a record's image may have in an archive, most exact first."""
    exact = [record.file] if record.file else []
    if record.url:
        exact.append(record.url.split("?")[0].rsplit("/", 1)[-1])
    shorter = [name.split("/", 1)[1] for name in exact if "/" in name]
    bare = [name.rsplit("/", 1)[-1] for name in exact]
    return [name for name in dict.fromkeys(exact + shorter + bare) if name]


def _folder_shelf(root: Path) -> Shelf:
    base = root.resolve()

    def find(record: IndexRecord) -> Fetched | None:
        for name in names_of(record):
            path = (base / name).resolve()
            if path.is_relative_to(base) and path.is_file():  # a hostile name may hold `..`
                return Fetched(path.read_bytes())
        return None

    return find


def _zip_shelf(path: Path) -> Shelf:
    archive, by_name = _zip_members(str(path), path.stat().st_mtime_ns)

    def find(record: IndexRecord) -> Fetched | None:
        for name in names_of(record):
            if name in by_name:
                try:
                    return Fetched(archive.read(by_name[name]))
                except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
                    raise RecordError("truncated", f"{path.name} is damaged here") from error
        return None

    return find


def _tar_shelf(path: Path) -> Shelf:
    by_name = _tar_members(str(path), path.stat().st_mtime_ns)

    def find(record: IndexRecord) -> Fetched | None:
        for name in names_of(record):
            if name in by_name:
                offset, size = by_name[name]
                with path.open("rb") as file:
                    file.seek(offset)
                    return Fetched(file.read(size))
        return None

    return find


@lru_cache(maxsize=8)
def _zip_members(path: str, _changed: int) -> tuple[zipfile.ZipFile, dict[str, str]]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise PmdError(f"--images {path} is no whole zip ({error}): download it again") from error
    members = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    return archive, {spelling: name for name in members for spelling in _spellings(name)}


@lru_cache(maxsize=8)
def _tar_members(path: str, _changed: int) -> dict[str, tuple[int, int]]:
    try:
        with tarfile.open(path, "r:") as tar:
            return {
                spelling: (member.offset_data, member.size)
                for member in tar
                if member.isfile()
                for spelling in _spellings(member.name)
            }
    except tarfile.TarError as error:
        raise PmdError(f"--images {path} is no whole tar ({error}): download it again") from error


def _spellings(name: str) -> list[str]:
    """A member's own path, and its base name: archives differ in the folders around their files."""
    return list(dict.fromkeys([name.removeprefix("./"), name.rsplit("/", 1)[-1]]))
