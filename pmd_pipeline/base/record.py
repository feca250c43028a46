"""What a source says (`Row`) before rows of one image meet, and how their record is named."""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias
from urllib.parse import quote, urlsplit, urlunsplit

Box: TypeAlias = tuple[float, float, float, float]
"""`x0, y0, x1, y1` in pixels of the upstream image."""

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"
"""A value that JSON can hold."""


class Candidate(NamedTuple):
    """One text that may become the caption of a pair.

    `field` is upstream's own name of the text. `refused` is set by a source whose upstream rule
    refuses the text before any filter of the recipe sees it.
    """

    text: str
    field: str
    box: Box | None = None
    refused: str | None = None


@dataclass(slots=True)
class Row:
    """One upstream row about one image; rows with one `id` become one record.

    A row may know the image (`url`, `file`, `width`), its captions, or both: what upstream keeps in
    two files meets by `id`. The first row in upstream order that knows a value wins.

    Args:
        id: upstream's image id, or `url_id(url)` where upstream has none.
        candidates: in upstream's order of preference.
        url: where the image is on the web.
        file: path of the image inside upstream's own archives, with `/`.
        licence: of the image, as upstream names it.
        width: pixels upstream, needed where candidates have boxes.
        height: pixels upstream.
        sha256: of the image's bytes, where upstream publishes it.
        meta: what upstream knows besides, without author or user names.
        refused: reason why no pair of this image may be kept (a held-out split, a video).
        filtered: upstream has applied the paper's filters; the recipe's are not run again.
    """

    id: str
    candidates: Sequence[Candidate] = ()
    url: str | None = None
    file: str | None = None
    licence: str | None = None
    width: int | None = None
    height: int | None = None
    sha256: str | None = None
    meta: Mapping[str, Json] = field(default_factory=dict)
    refused: str | None = None
    filtered: bool = False


@dataclass(slots=True)
class BadRow:
    """An upstream row that cannot be understood; it counts as one dropped pair."""

    detail: str
    reason: str = "bad_row"


def key_of(source: str, image_id: str) -> str:
    """Sixteen hex digits that name the record of an image: stable across rebuilds.

    >>> key_of("coco", "391895")
    '64c23fe1967b35c0'
    """
    return hashlib.blake2b(
        f"{source}\0{image_id}".encode(errors="replace"), digest_size=8
    ).hexdigest()


def url_id(url: str) -> str:
    """The URL in the one spelling under which equal addresses meet: the id where upstream has none.

    Scheme and host in lower case, no default port, no fragment, non-ASCII and blanks
    percent-encoded; path and query stay as they are, since servers tell them apart. An address that
    cannot be parsed is its own id.

    >>> url_id("HTTP://Example.org:80/A b.jpg#top")
    'http://example.org/A%20b.jpg'
    >>> url_id("http://[2001:DB8::1]:8080/a.jpg")
    'http://[2001:db8::1]:8080/a.jpg'
    """
    try:
        parts = urlsplit(url.strip())
        host = (parts.hostname or "").lower()
        port = parts.port
    except ValueError:
        return url
    if ":" in host:
        host = f"[{host}]"  # an IPv6 address
    if port is not None and (parts.scheme, port) not in {("http", 80), ("https", 443)}:
        host = f"{host}:{port}"
    path = quote(parts.path or "/", safe=_KEPT)
    return urlunsplit((parts.scheme, host, path, quote(parts.query, safe=_KEPT), ""))


def one_line(text: str) -> str:
    r"""The text in NFC with every run of white space as one blank, none at the ends.

    >>> one_line("  a dog\n on   a beach ")
    'a dog on a beach'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def full_text(text: str) -> str:
    r"""The text with each of its lines as `one_line` gives it, and without blank lines.

    >>> full_text("A  title \r\n\n\n and more\n")
    'A title\nand more'
    """
    return "\n".join(line for line in map(one_line, text.splitlines()) if line)


def flickr_id(url: str) -> str | None:
    """The Flickr photo id in a static Flickr address: the key that sources share.

    >>> flickr_id("http://farm8.staticflickr.com/7153/6255196340_da26cf2c9e_z.jpg")
    '6255196340'
    """
    found = _FLICKR.search(url)
    return found[1] if found else None


_KEPT = "%/:=&?~#+!$,;'@()*[]"
"""Characters that `quote` leaves alone: already encoded bytes must not be encoded twice."""

_FLICKR = re.compile(r"flickr\.com/(?:[^?#]*/)?(\d+)_[0-9a-f]+(?:_[a-z0-9]+)?\.\w+(?:[?#]|$)")
