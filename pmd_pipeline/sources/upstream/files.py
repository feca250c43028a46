"""Upstream annotation files on disk: plain, compressed, or inside an archive."""

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
"""Bytes of a span of a plain file of lines."""

_LONGEST_LINE = 64 << 20
"""Bytes of the longest line; a longer one means that the file is of another kind."""

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2")


@dataclass(frozen=True)
class UpstreamFile:
    """One annotation file: `path`, or the `member` of the archive at `path`."""

    path: str
    member: str | None = None

    @property
    def inner(self) -> str:
        """The path inside the archive, or of the file itself where there is none."""
        return self.member or self.path

    @property
    def name(self) -> str:
        """The base name, without `.gz` or `.bz2`."""
        return self.inner.rsplit("/", 1)[-1].removesuffix(".gz").removesuffix(".bz2")

    def __str__(self) -> str:
        return f"{self.path}!{self.member}" if self.member else self.path


@dataclass(frozen=True)
class Span:
    """A range of one upstream file that one task reads.

    Args:
        file: the file.
        start: first unit of the range; the unit is that of the file's cut (bytes, rows).
        stop: end of the range, excluded; None for the end of the file.
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
        """The file beside this one that has the role `role`."""
        return dict(self.beside)[role]


def list_files(folder: str) -> list[UpstreamFile]:
    """Every file under `folder`, members of zips and tars included, sorted by path.

    Of files with one name (plain and packed), the first by path is listed. Hidden files and hidden
    folders are left out: copies that macOS makes, unfinished downloads.

    Raises:
        PmdError: an archive is broken.
    """
    by_name: dict[str, UpstreamFile] = {}
    root = Path(folder)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if _is_hidden(path.relative_to(root).as_posix()):
            continue
        packed = path.name.endswith(_ARCHIVES)
        for file in (
            _list_archive(path, path.stat().st_mtime_ns) if packed else [UpstreamFile(str(path))]
        ):
            by_name.setdefault(file.name, file)
    return list(by_name.values())


def matches(file: UpstreamFile, pattern: str) -> bool:
    """Whether the base name of `file` matches the glob `pattern`; case counts."""
    return fnmatch.fnmatchcase(file.name, pattern)


def as_one(_file: UpstreamFile) -> Sequence[tuple[int, int | None]]:
    """The whole file as one span."""
    return [(0, None)]


def by_lines(file: UpstreamFile) -> Sequence[tuple[int, int | None]]:
    """Spans of `SPAN_BYTES` of a file of lines; a compressed or packed file is one span."""
    if file.member or file.path.endswith((".gz", ".bz2")):
        return as_one(file)
    size = Path(file.path).stat().st_size
    starts = range(0, max(size, 1), SPAN_BYTES)
    return [(start, min(start + SPAN_BYTES, size)) for start in starts]


@contextmanager
def open_upstream(file: UpstreamFile) -> Iterator[BinaryIO]:
    """The file's content as bytes, unpacked while it is read.

    Raises:
        PmdError: the file does not exist, or is cut short or damaged; damage is raised when
            reading reaches it.
    """
    try:
        with _open_stored(file) as stored:
            if file.inner.endswith(".gz"):
                with gzip.open(stored) as unpacked:
                    yield cast(BinaryIO, unpacked)
            elif file.inner.endswith(".bz2"):
                with bz2.open(stored) as unpacked_bz2:
                    yield cast(BinaryIO, unpacked_bz2)
            else:
                yield stored
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise PmdError(f"cannot read {file}: {error.strerror}") from error
    except (*_DAMAGE, OSError) as error:
        raise PmdError(
            f"{file} is cut short or damaged ({_first_line(error)}): download it again"
        ) from error


def lines(span: Span) -> Iterator[bytes]:
    r"""The lines that begin inside the span, without their `\n` or `\r\n`, in order.

    Only `\n` ends a line, because captions contain U+2028 and U+0085. Neighbouring spans of one
    file give each line exactly once.

    Raises:
        PmdError: the file is cut short or damaged, or has a line of more than 64 MiB.
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

    `prefix` is ijson's: `item` for the items of a top-level list, `images.item` for those of a list
    under a key. Integers stay integers; other numbers are floats.

    Raises:
        PmdError: the file is not JSON, or has no list at `prefix` and that is not `optional`.
    """
    empty = True
    with open_upstream(file) as content:
        try:
            for value in ijson.items(content, prefix, use_float=True):
                empty = False
                yield value
        except ijson.JSONError as error:
            raise PmdError(
                f"{file} is not a whole JSON file ({_first_line(error)}): download it again"
            ) from error
    if (
        empty
        and not optional
        and not _has_list(file, prefix.removesuffix("item").removesuffix("."))
    ):
        problem = (
            f"has no list at {prefix.removesuffix('.item')!r}"
            if "." in prefix
            else "has no list at its top"
        )
        raise PmdError(f"{file} is JSON, but {problem}: is it the file that this source reads?")


def _has_list(file: UpstreamFile, list_prefix: str) -> bool:
    with open_upstream(file) as content:
        return any(
            event == "start_array" and at == list_prefix for at, event, _ in ijson.parse(content)
        )


@contextmanager
def _open_stored(file: UpstreamFile) -> Iterator[BinaryIO]:
    if file.member is None:
        with Path(file.path).open("rb") as plain:
            yield plain
    elif file.path.endswith(".zip"):
        with zipfile.ZipFile(file.path) as archive, _open_zip_member(archive, file) as member:
            yield cast(BinaryIO, member)
    else:
        with tarfile.open(file.path) as tar:
            inside = tar.extractfile(file.member)
            if inside is None:
                raise PmdError(f"{file} is not a regular file in its archive")
            with inside:
                yield cast(BinaryIO, inside)


def _open_zip_member(archive: zipfile.ZipFile, file: UpstreamFile) -> IO[bytes]:
    try:
        return archive.open(file.inner)
    except RuntimeError as error:  # a password, or a compression that Python does not have
        raise PmdError(
            f"{file} cannot be unpacked here ({_first_line(error)}): unpack it first"
        ) from error


@lru_cache(maxsize=64)
def _list_archive(path: Path, _changed: int) -> list[UpstreamFile]:
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        else:
            with tarfile.open(path) as tar:
                names = [member.name for member in tar if member.isfile()]
    except (*_DAMAGE, OSError) as error:
        raise PmdError(
            f"{path} is not a whole archive ({_first_line(error)}): download it again"
        ) from error
    return [UpstreamFile(str(path), name) for name in sorted(names) if not _is_hidden(name)]


def _is_hidden(path: str) -> bool:
    return any(step.startswith(".") for step in path.removeprefix("./").split("/"))


def _first_line(error: Exception) -> str:
    """The first line of the message; yajl and tarfile draw the place of the error below it."""
    message = str(error).removeprefix("b'").replace("\\n", "\n")  # yajl's may be bytes
    return message.partition("\n")[0].rstrip(":.")


_DAMAGE = (EOFError, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
"""Exceptions of the standard library for incomplete files, besides `OSError`."""
