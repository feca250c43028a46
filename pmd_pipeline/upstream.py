"""Upstream's annotation files as they lie on disk: plain, compressed, or inside an archive."""

import bz2
import fnmatch
import gzip
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import ijson

from pmd_pipeline.errors import PmdError

SPAN_BYTES = 64 << 20
"""Size of the spans that a plain file of lines is cut into."""

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2")


@dataclass(frozen=True)
class UpstreamFile:
    """One annotation file: `path`, or the `member` of the archive at `path`."""

    path: str
    member: str | None = None

    @property
    def inner(self) -> str:
        """The path of the file itself, inside its archive where it has one."""
        return self.member or self.path

    @property
    def name(self) -> str:
        """The base name, without `.gz` or `.bz2`."""
        return self.inner.rsplit("/", 1)[-1].removesuffix(".gz").removesuffix(".bz2")

    def __str__(self) -> str:
        return f"{self.path}!{self.member}" if self.member else self.path


@dataclass(frozen=True)
class Span:
    """A stretch of one upstream file that one task reads.

    Args:
        file: the file.
        start: where the stretch begins, in the unit of the file's cut (bytes, rows).
        stop: where it ends, excluded; None for the end of the file.
        form: the form of the source's input that the file belongs to.
        role: what the file is among the files of its form.
        beside: files of the form that are read along with every span, by role.
    """

    file: UpstreamFile
    start: int = 0
    stop: int | None = None
    form: str = "main"
    role: str = ""
    beside: tuple[tuple[str, UpstreamFile], ...] = ()

    def companion(self, role: str) -> UpstreamFile:
        """The file beside this one that plays `role`."""
        return dict(self.beside)[role]


def find(folder: str) -> list[UpstreamFile]:
    """Every file under `folder`, members of zips and tars included, sorted by path.

    Of a file that is there twice under one name (plain and packed), the first by path is taken.

    Raises:
        PmdError: an archive is broken.
    """
    found: dict[str, UpstreamFile] = {}
    root = Path(folder)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if path.name.startswith("."):
            continue
        packed = path.name.endswith(_ARCHIVES)
        for file in _members(path) if packed else [UpstreamFile(str(path))]:
            found.setdefault(file.name, file)
    return list(found.values())


def fits(file: UpstreamFile, pattern: str) -> bool:
    """Say whether the base name of `file` fits the glob `pattern`, case and all."""
    return fnmatch.fnmatchcase(file.name, pattern)


def as_one(_file: UpstreamFile) -> Sequence[tuple[int, int | None]]:
    """Cut nothing: the whole file is one span."""
    return [(0, None)]


def by_lines(file: UpstreamFile) -> Sequence[tuple[int, int | None]]:
    """Cut a file of lines every `SPAN_BYTES`; a compressed or packed one stays whole."""
    if file.member or file.path.endswith((".gz", ".bz2")):
        return as_one(file)
    size = Path(file.path).stat().st_size
    starts = range(0, max(size, 1), SPAN_BYTES)
    return [(start, min(start + SPAN_BYTES, size)) for start in starts]


@contextmanager
def open_upstream(file: UpstreamFile) -> Iterator[BinaryIO]:
    """The file's content as bytes, unpacked while it is read.

    Raises:
        PmdError: the file is not there, or is cut short or damaged; the latter is noticed where
            reading meets the damage.
    """
    try:
        with _opened(file) as raw:
            if file.inner.endswith(".gz"):
                with gzip.open(raw) as unpacked:
                    yield cast(BinaryIO, unpacked)
            elif file.inner.endswith(".bz2"):
                with bz2.open(raw) as unpacked_bz2:
                    yield cast(BinaryIO, unpacked_bz2)
            else:
                yield raw
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise PmdError(f"cannot read {file}: {error.strerror}") from error
    except (EOFError, OSError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise PmdError(f"{file} is cut short or damaged ({error}): download it again") from error


def lines(span: Span) -> Iterator[bytes]:
    r"""The lines that begin inside the span, without their `\n` or `\r\n`, in order.

    Only `\n` ends a line: captions hold U+2028 and U+0085. Neighbouring spans of one file give each
    line exactly once.

    Raises:
        PmdError: the file is cut short or damaged.
    """
    with open_upstream(span.file) as file:
        position = 0
        if span.start:
            file.seek(span.start - 1)
            position = span.start - 1 + len(file.readline())
        for line in file:
            if span.stop is not None and position >= span.stop:
                return
            position += len(line)
            yield line.rstrip(b"\r\n")


def json_items(file: UpstreamFile, prefix: str, *, optional: bool = False) -> Iterator[Any]:
    """The values at `prefix` of a JSON file, one by one, in bounded memory.

    `prefix` is ijson's: `item` for each of a top-level list, `images.item` for each of a list under
    a key. Integers stay integers; other numbers are floats.

    Raises:
        PmdError: the file is no JSON, or has no list at `prefix` and that is not `optional`.
    """
    empty = True
    with open_upstream(file) as raw:
        try:
            for value in ijson.items(raw, prefix, use_float=True):
                empty = False
                yield value
        except ijson.JSONError as error:
            raise PmdError(f"{file} is no whole JSON file ({error}): download it again") from error
    if (
        empty
        and not optional
        and not _has_list(file, prefix.removesuffix("item").removesuffix("."))
    ):
        raise PmdError(
            f"{file} is JSON, but has no list at {prefix.removesuffix('.item')!r}: is it the file "
            "this source reads?"
        )


def _has_list(file: UpstreamFile, prefix: str) -> bool:
    with open_upstream(file) as raw:
        return any(
            event == "start_array" and where == prefix for where, event, _ in ijson.parse(raw)
        )


@contextmanager
def _opened(file: UpstreamFile) -> Iterator[BinaryIO]:
    if file.member is None:
        with Path(file.path).open("rb") as plain:
            yield plain
    elif file.path.endswith(".zip"):
        with zipfile.ZipFile(file.path) as archive, archive.open(file.member) as member:
            yield cast(BinaryIO, member)
    else:
        with tarfile.open(file.path) as tar:
            inside = tar.extractfile(file.member)
            if inside is None:
                raise PmdError(f"{file} is no file inside the archive")
            with inside:
                yield cast(BinaryIO, inside)


def _members(path: Path) -> list[UpstreamFile]:
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        else:
            with tarfile.open(path) as tar:
                names = [member.name for member in tar if member.isfile()]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise PmdError(f"{path} is no whole archive ({error}): download it again") from error
    return [UpstreamFile(str(path), name) for name in sorted(names)]
