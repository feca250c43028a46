"""Images that somebody wants left out: the list beside a dataset, which every build of it obeys.

A line of the list is an address, a sha256 of the bytes as fetched (64 hex digits), a key (16 hex
digits), `source:ID` (`redcaps:fhb2d5`), `flickr:PHOTO_ID` for a photo wherever it turns up, or
`host:NAME` for a host with all below it. `#` begins a comment.
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
"""Its name, beside `index/` and `shards/`."""

REASON = "optout_list"
"""Under which its pairs are counted."""

_HEX = re.compile(r"[0-9a-f]{16}|[0-9a-f]{64}")
_HOST = re.compile(r"([a-z0-9_-]+\.)+[a-z0-9-]+")


@dataclass(frozen=True)
class OptOut:
    """What is left out, one spelling for each entry."""

    entries: frozenset[str] = frozenset()

    @classmethod
    def of(cls, lines: Iterable[str], where: str) -> Self:
        """The list that `lines` are.

        Raises:
            PmdError: a line is none of the forms above; `where` says which list it is in.
        """
        found = set()
        for number, line in enumerate(lines, start=1):
            entry = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
            if entry:
                found.add(_entry(entry, f"{where}, line {number}"))
        return cls(frozenset(found))

    @property
    def digest(self) -> str | None:
        """sha256 of the entries; None of an empty list."""
        return digest(sorted(self.entries)) if self.entries else None

    def has_record(self, key: str, url: str | None) -> bool:
        """Say whether the record is to be left out, as far as can be told before it is fetched."""
        if not self.entries:
            return False
        return key in self.entries or (url is not None and not self.entries.isdisjoint(_names(url)))

    def has_bytes(self, sha256: str | None, final_url: str | None) -> bool:
        """Say whether what was fetched is to be left out."""
        return sha256 in self.entries or self.has_record("", final_url)

    def lines(self) -> str:
        """The list as a file, in a fixed order."""
        return "".join(f"{entry}\n" for entry in sorted(self.entries))


def load_list(data: str) -> OptOut:
    """The list of the dataset under the address `data`; an empty one where there is none."""
    address = join(data, LIST)
    stamp = sizes(data).get(LIST)
    return OptOut() if stamp is None else _loaded(address, read_bytes(address))


def add_to_list(data: str, file: str) -> OptOut:
    """Add the entries of `file` to the list of the dataset; the whole list.

    Entries leave the list only by hand: a later build that forgot the file must not bring
    images back.

    Raises:
        PmdError: `file` is not there, or a line of it is nothing that can be left out.
    """
    more = _loaded(file, read_bytes(file))
    both = OptOut(load_list(data).entries | more.entries)
    write_whole(join(data, LIST), both.lines().encode())
    return both


@lru_cache(maxsize=4)
def _loaded(address: str, content: bytes) -> OptOut:
    return OptOut.of(content.decode(errors="replace").split("\n"), address)


def _entry(text: str, where: str) -> str:
    """An entry in the spelling that is compared.

    `source:ID` becomes the key of that image.
    """
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


def _names(url: str) -> set[str]:
    """All that a list may call an address by."""
    names = {url_id(url)}
    photo = flickr_id(url)
    if photo:
        names.add(f"flickr:{photo}")
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return names
    while "." in host:
        names.add(f"host:{host}")
        host = host.partition(".")[2]
    return names
