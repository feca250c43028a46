"""The opt-out list: images that every build of a dataset leaves out; it lies beside the dataset.

A line is an address, a SHA-256 of the fetched bytes (64 hex digits), a key (16 hex digits),
`source:ID` (`redcaps:fhb2d5`), `flickr:PHOTO_ID` for a photo under any of its addresses, or
`host:NAME` for a host and its subdomains. `#` begins a comment.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Self
from urllib.parse import urlsplit

from pmd_pipeline import sources
from pmd_pipeline.base.record import flickr_id, key_of, url_id
from pmd_pipeline.base.storage import sizes
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, read_bytes, write_whole

LIST = "optout.txt"
"""File name of the list, beside `index/` and `shards/`."""

REASON = "optout_list"
"""Drop reason of its pairs."""

_HEX = re.compile(r"[0-9a-f]{16}|[0-9a-f]{64}")
_HOST = re.compile(r"([a-z0-9_-]+\.)+[a-z0-9-]+")


@dataclass(frozen=True)
class OptOut:
    """The entries of a list, each normalised."""

    entries: frozenset[str] = frozenset()

    @classmethod
    def of(cls, lines: Iterable[str], where: str) -> Self:
        """The list of `lines`.

        Args:
            where: name of the list, for errors.

        Raises:
            PmdError: a line is none of the forms above.
        """
        entries = set()
        for number, line in enumerate(lines, start=1):
            entry = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
            if entry:
                entries.add(_normalised(entry, f"{where}, line {number}"))
        return cls(frozenset(entries))

    @property
    def digest(self) -> str | None:
        """SHA-256 of the entries; None of an empty list."""
        return digest(sorted(self.entries)) if self.entries else None

    def has_record(self, key: str, url: str | None) -> bool:
        """Whether the list names the record by its key or by its address, before any fetch."""
        if not self.entries:
            return False
        return key in self.entries or (
            url is not None and not self.entries.isdisjoint(_entries_of(url))
        )

    def has_bytes(self, sha256: str | None, final_url: str | None) -> bool:
        """Whether the list names the fetched bytes, or the address that they came from."""
        return sha256 in self.entries or self.has_record("", final_url)

    def lines(self) -> str:
        """The content of the list's file, in a fixed order."""
        return "".join(f"{entry}\n" for entry in sorted(self.entries))


def load_list(data: str) -> OptOut:
    """The list of the dataset under the address `data`; an empty one where there is none."""
    address = join(data, LIST)
    return _parse_list(address, read_bytes(address)) if LIST in sizes(data) else OptOut()


def add_to_list(data: str, file: str) -> OptOut:
    """Add the entries of `file` to the list of the dataset; returns the whole list.

    No command removes entries: a later build without the file must not bring images back.

    Raises:
        PmdError: `file` does not exist, or a line of it is no entry.
    """
    optout = OptOut(load_list(data).entries | _parse_list(file, read_bytes(file)).entries)
    write_whole(join(data, LIST), optout.lines().encode())
    return optout


@lru_cache(maxsize=4)
def _parse_list(address: str, content: bytes) -> OptOut:
    return OptOut.of(content.decode(errors="replace").split("\n"), address)


def _normalised(text: str, where: str) -> str:
    """An entry in the one spelling that is compared; `source:ID` becomes the key of that image."""
    scheme, colon, rest = text.partition(":")
    scheme, rest = scheme.lower(), rest.strip()
    if scheme in {"http", "https"} and rest.startswith("//"):
        return url_id(text)
    if not colon and _HEX.fullmatch(text.lower()):
        return text.lower()
    if scheme == "flickr" and rest.isdigit():
        return f"flickr:{rest}"
    if scheme == "host" and _HOST.fullmatch(rest.lower()):
        return f"host:{rest.lower()}"
    if rest and scheme in sources.names():
        return key_of(scheme, rest)
    raise PmdError(
        f"{where}: {text!r} is no address, sha256, key, source:ID, flickr:ID or host:NAME"
    )


def _entries_of(url: str) -> set[str]:
    """Every entry that names the address."""
    entries = {url_id(url)}
    if photo := flickr_id(url):
        entries.add(f"flickr:{photo}")
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return entries
    while "." in host:
        entries.add(f"host:{host}")
        host = host.partition(".")[2]
    return entries
