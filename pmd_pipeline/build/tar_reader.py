"""A tar read from its first byte to its last, as strictly as it was written."""

import hashlib
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_MOST_BYTES = 1 << 30
"""No member is as large; a header that says so is not believed."""


class TarMember(NamedTuple):
    """A file inside a tar; `offset` is where its content begins, in bytes."""

    name: str
    offset: int
    size: int


class TarReader:
    """The members of a tar in the order in which they lie, read once, one in memory at a time.

    What is not as `ShardWriter` writes it is told in `faults`, a sentence each. Reading ends at the
    first header that cannot be understood, since nobody knows where the next one is; `is_whole`
    says whether the end of the tar was reached. After the last member, `sha256` and `num_bytes` are
    those of the whole file.
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
        """The sha256 of what has been read so far, as hex."""
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
            self._end()
            return None
        try:
            found = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError as error:
            said = f"the tar ends at byte {self.num_bytes:,} without its end mark"
            if len(header) == _BLOCK:
                said = f"the header at byte {start:,} is broken ({error}); the rest was not read"
            self.faults.append(said)
            return None
        if not 0 <= found.size <= _MOST_BYTES:
            self.faults.append(f"the header at byte {start:,} states {found.size:,} bytes")
            return None
        if header != _header(found):
            self.faults.append(f"the header of {_plain(found.name)} {_oddity(found)}")
        return TarMember(_plain(found.name), self.num_bytes, found.size)

    def _end(self) -> None:
        """Read on behind the first block of zeros: only zeros, up to a whole record."""
        end = self.num_bytes - _BLOCK
        whole = -(-(end + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        rest = self._read(whole - self.num_bytes)
        if rest.strip(b"\0") or self._read(1):
            self.faults.append(f"there are bytes behind the end of the tar at byte {end:,}")
        elif self.num_bytes < whole:
            self.faults.append(
                f"the tar ends at byte {self.num_bytes:,}, inside its end mark of zeros"
            )
        self.is_whole = True


def _header(found: tarfile.TarInfo) -> bytes:
    """The header that a member of this name and size is written with."""
    written = tarfile.TarInfo(found.name)
    written.size = found.size
    try:
        return written.tobuf(tarfile.USTAR_FORMAT, tarfile.ENCODING, "surrogateescape")
    except ValueError:  # a name that USTAR cannot hold
        return b""


def _oddity(found: tarfile.TarInfo) -> str:
    """What sets a header apart from one of ours."""
    ours = tarfile.TarInfo()
    names = ("mtime", "uid", "gid", "mode", "uname", "gname", "linkname", "type")
    odd = [f"{name} {getattr(found, name)!r}" for name in names
           if getattr(found, name) != getattr(ours, name)]  # fmt: skip
    return f"has {', '.join(odd)}" if odd else "is written in another way than ours"


def _plain(name: str) -> str:
    """A name that can be printed and encoded, whatever bytes it was."""
    return name if name.isascii() and name.isprintable() else ascii(name)
