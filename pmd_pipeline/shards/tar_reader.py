"""A tar read from its first byte to its last, compared with what `ShardWriter` writes."""

import hashlib
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_MAX_BYTES = 1 << 30
"""Of a member; a header that states more is a fault."""


class TarMember(NamedTuple):
    """A file inside a tar; `offset` is that of its first byte."""

    name: str
    offset: int
    size: int


class TarReader:
    """The members of a tar in their order, read once, one in memory at a time.

    Reading ends at the first header that cannot be parsed, since the next header cannot be found.

    Attributes:
        faults: a sentence for each difference from what `ShardWriter` writes.
        is_whole: the end of the tar was reached.
        num_bytes: read so far; after the last member, the size of the whole file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self.faults: list[str] = []
        self.is_whole = False

    def __iter__(self) -> Iterator[tuple[TarMember, bytes]]:
        """Each member with its content."""
        while (member := self._next()) is not None:
            content = self._read(member.size)
            if len(content) < member.size:
                self.faults.append(f"the tar ends at byte {self.num_bytes:,}, inside {member.name}")
                break
            yield member, content
            padding = self._read(-member.size % _BLOCK)
            if padding.strip(b"\0"):
                self.faults.append(f"there are bytes between {member.name} and what comes after it")
        while self._read(1 << 20):
            pass  # the digest is that of the whole file

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes read so far, as hex; after the last member, of the whole file."""
        return self._digest.hexdigest()

    def _read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._digest.update(content)
        self.num_bytes += len(content)
        return content

    def _next(self) -> TarMember | None:
        start = self.num_bytes
        header = self._read(_BLOCK)
        if header == _ZEROS:
            self._read_end()
            return None
        try:
            info = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError as error:
            fault = f"the tar ends at byte {self.num_bytes:,} without its end mark"
            if len(header) == _BLOCK:
                fault = f"the header at byte {start:,} is broken ({error}); the rest was not read"
            self.faults.append(fault)
            return None
        if not 0 <= info.size <= _MAX_BYTES:
            self.faults.append(f"the header at byte {start:,} states {info.size:,} bytes")
            return None
        if header != _expected_header(info):
            self.faults.append(f"the header of {_printable(info.name)} {_difference(info)}")
        return TarMember(_printable(info.name), self.num_bytes, info.size)

    def _read_end(self) -> None:
        """Read on after the first block of zeros: only zeros, up to a whole record."""
        end = self.num_bytes - _BLOCK
        size = -(-(end + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        rest = self._read(size - self.num_bytes)
        if rest.strip(b"\0") or self._read(1):
            self.faults.append(f"there are bytes behind the end of the tar at byte {end:,}")
        elif self.num_bytes < size:
            self.faults.append(
                f"the tar ends at byte {self.num_bytes:,}, inside its end mark of zeros"
            )
        self.is_whole = True


def _expected_header(info: tarfile.TarInfo) -> bytes:
    """The header that `ShardWriter` writes for a member of this name and size."""
    expected = tarfile.TarInfo(info.name)
    expected.size = info.size
    try:
        return expected.tobuf(tarfile.USTAR_FORMAT, tarfile.ENCODING, "surrogateescape")
    except ValueError:  # a name that USTAR cannot hold
        return b""


def _difference(info: tarfile.TarInfo) -> str:
    """How a header differs from the expected one."""
    expected = tarfile.TarInfo()
    fields = ("mtime", "uid", "gid", "mode", "uname", "gname", "linkname", "type")
    different = [
        f"{name} {getattr(info, name)!r}"
        for name in fields
        if getattr(info, name) != getattr(expected, name)
    ]
    return f"has {', '.join(different)}" if different else "is written in another way than ours"


def _printable(name: str) -> str:
    """A name that can be printed and encoded, whatever bytes the header has."""
    return name if name.isascii() and name.isprintable() else ascii(name)
