"""Upstream's rows as sources yield them (`Row`), and the keys and ids of records."""

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

    Args:
        field: upstream's name of the text.
        box: the region that the text describes; None for the whole image.
        refused: reason, where a rule of upstream refuses the text before the recipe's filters.
    """

    text: str
    field: str
    box: Box | None = None
    refused: str | None = None


@dataclass(slots=True)
class Row:
    """One upstream row about one image; rows with one `id` become one record.

    A row may describe the image (`url`, `file`, `width`), its captions, or both; rows of different
    files are joined by `id`. Of each value, the first one in upstream order counts.

    Args:
        id: upstream's image id, or `url_id(url)` where upstream has none.
        candidates: in upstream's order of preference.
        url: where the image is on the web.
        file: path of the image inside upstream's own archives, with `/`.
        licence: of the image, as upstream names it.
        width: pixels upstream, needed where candidates have boxes.
        height: pixels upstream.
        sha256: of the image's bytes, where upstream publishes it.
        meta: further values of upstream, without author or user names.
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
    """The key of an image's record: sixteen hex digits, stable across rebuilds.

    >>> key_of("coco", "391895")
    '64c23fe1967b35c0'
    """
    return hashlib.blake2b(
        f"{source}\0{image_id}".encode(errors="replace"), digest_size=8
    ).hexdigest()


def url_id(url: str) -> str:
    """The normalised URL; it is the image's id where upstream has none.

    Scheme and host in lower case, no default port, no fragment, non-ASCII and blanks
    percent-encoded. Path and query stay as they are, since they are case-sensitive. A URL that
    cannot be parsed is returned unchanged.

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
    """The photo id in a static Flickr address, by which sources can be joined.

    >>> flickr_id("http://farm8.staticflickr.com/7153/6255196340_da26cf2c9e_z.jpg")
    '6255196340'
    """
    match = _FLICKR.search(url)
    return match[1] if match else None


_KEPT = "%/:=&?~#+!$,;'@()*[]"
"""Characters that `quote` leaves alone: already encoded bytes must not be encoded twice."""

_FLICKR = re.compile(r"flickr\.com/(?:[^?#]*/)?(\d+)_[0-9a-f]+(?:_[a-z0-9]+)?\.\w+(?:[?#]|$)")
