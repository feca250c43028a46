"""Upstream's annotation files as they lie on disk: plain, compressed, or inside an archive."""

import bz2
import fnmatch
import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import ijson

from pmd_pipeline.contract.errors import PmdError

SPAN_BYTES = 64 << 20
"""Size of the spans that a plain file of lines is cut into."""

_LONGEST_LINE = 64 << 20
"""Bytes after which a line is none: the file is of another kind, and would fill the memory."""

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
    What is hidden, or lies in a hidden folder, is nobody's: macOS's doubles, unfinished downloads.

    Raises:
        PmdError: an archive is broken.
    """
    found: dict[str, UpstreamFile] = {}
    root = Path(folder)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if _is_hidden(path.relative_to(root).as_posix()):
            continue
        packed = path.name.endswith(_ARCHIVES)
        for file in (
            _members(path, path.stat().st_mtime_ns) if packed else [UpstreamFile(str(path))]
        ):
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
    except (*_DAMAGE, OSError) as error:
        raise PmdError(
            f"{file} is cut short or damaged ({_brief(error)}): download it again"
        ) from error


def lines(span: Span) -> Iterator[bytes]:
    r"""The lines that begin inside the span, without their `\n` or `\r\n`, in order.

    Only `\n` ends a line: captions hold U+2028 and U+0085. Neighbouring spans of one file give each
    line exactly once.

    Raises:
        PmdError: the file is cut short or damaged, or has a line that no file of lines has.
    """
    with open_upstream(span.file) as file:
        position = 0
        if span.start:
            file.seek(span.start - 1)
            position = span.start - 1 + len(file.readline(_LONGEST_LINE))
        while span.stop is None or position < span.stop:
            line = file.readline(_LONGEST_LINE)
            if not line:
                return
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                raise PmdError(
                    f"{span.file} has a line of more than {_LONGEST_LINE:,} bytes at byte "
                    f"{position:,}: is it another source's file?"
                )
            position += len(line)
            yield line.removesuffix(b"\n").removesuffix(b"\r")


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
            raise PmdError(
                f"{file} is no whole JSON file ({_brief(error)}): download it again"
            ) from error
    if empty and not optional and not _has(file, prefix.removesuffix("item").removesuffix(".")):
        what = (
            f"has no list at {prefix.removesuffix('.item')!r}"
            if "." in prefix
            else "has no list at its top"
        )
        raise PmdError(f"{file} is JSON, but {what}: is it the file that this source reads?")


def _has(file: UpstreamFile, list_prefix: str) -> bool:
    with open_upstream(file) as raw:
        return any(
            event == "start_array" and where == list_prefix for where, event, _ in ijson.parse(raw)
        )


@contextmanager
def _opened(file: UpstreamFile) -> Iterator[BinaryIO]:
    if file.member is None:
        with Path(file.path).open("rb") as plain:
            yield plain
    elif file.path.endswith(".zip"):
        with zipfile.ZipFile(file.path) as archive, _unzipped(archive, file) as member:
            yield cast(BinaryIO, member)
    else:
        with tarfile.open(file.path) as tar:
            inside = tar.extractfile(file.member)
            if inside is None:
                raise PmdError(f"{file} is no file inside the archive")
            with inside:
                yield cast(BinaryIO, inside)


def _unzipped(archive: zipfile.ZipFile, file: UpstreamFile) -> IO[bytes]:
    try:
        return archive.open(file.inner)
    except RuntimeError as error:  # a password, or a way of packing that Python does not know
        raise PmdError(
            f"{file} cannot be unpacked here ({_brief(error)}): unpack it first"
        ) from error


@lru_cache(maxsize=64)
def _members(path: Path, _changed: int) -> list[UpstreamFile]:
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        else:
            with tarfile.open(path) as tar:
                names = [member.name for member in tar if member.isfile()]
    except (*_DAMAGE, OSError) as error:
        raise PmdError(
            f"{path} is no whole archive ({_brief(error)}): download it again"
        ) from error
    return [UpstreamFile(str(path), name) for name in sorted(names) if not _is_hidden(name)]


def _is_hidden(path: str) -> bool:
    return any(step.startswith(".") for step in path.removeprefix("./").split("/"))


def _brief(error: Exception) -> str:
    """What the error says, without the pictures that yajl and tarfile draw below it."""
    said = str(error).removeprefix("b'").replace("\\n", "\n")  # yajl may say it in bytes
    return said.partition("\n")[0].rstrip(":.")


_DAMAGE = (EOFError, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
"""What the standard library raises, besides `OSError`, over files that are not whole."""
