"""The tar of a shard: equal samples give equal bytes."""

import hashlib
import tarfile
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple

_BLOCK = tarfile.BLOCKSIZE
_BARE_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


class ByteRange(NamedTuple):
    """Where a member's content lies in the tar, in bytes."""

    offset: int
    size: int


class DigestingFile:
    """A file for writing that computes the SHA-256 and the size of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, content: bytes) -> int:
        """Write all of `content`."""
        self._sha256.update(content)
        self.num_bytes += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.num_bytes

    def hexdigest(self) -> str:
        """SHA-256 of everything written so far, as hex."""
        return self._sha256.hexdigest()


class ShardWriter:
    """Writes samples to a tar: USTAR, no times, no owners, members sorted within a sample.

    Samples are added in the order of their keys.
    """

    def __init__(self, file: DigestingFile) -> None:
        self._file = file
        self._last_key = ""

    def add(self, key: str, members: Mapping[str, bytes]) -> dict[str, ByteRange]:
        """Add one sample, `members` by extension; the byte range of each member."""
        assert self._last_key < key, "samples come in order of their keys"
        self._last_key = key
        return {
            extension: self._add(f"{key}.{extension}", members[extension])
            for extension in sorted(members)
        }

    def close(self) -> None:
        """Write the end of the tar."""
        end = self._file.tell() + 2 * _BLOCK
        self._file.write(bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE))

    def _add(self, name: str, content: bytes) -> ByteRange:
        self._file.write(_header(name, len(content)))
        extent = ByteRange(self._file.tell(), len(content))
        self._file.write(content + bytes(-len(content) % _BLOCK))
        return extent


def _header(name: str, size: int) -> bytes:
    """The header of a file as `tarfile` writes it, in a tenth of the time.

    Only name, size and checksum differ between the headers of a shard.
    """
    header = bytearray(_BARE_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[124:135] = b"%011o" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)
