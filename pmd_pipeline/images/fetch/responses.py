"""What the answer of a host means, once it is there."""

import email.utils
import hashlib
import re
import time
import zlib
from collections.abc import Collection

from pmd_pipeline.images.fetch.addresses import FetchError
from pmd_pipeline.images.fetch.engine import Head, Response
from pmd_pipeline.images.fetch.robots import ROBOTS_BYTES, Robots, is_reserved, refusal_in_tags

PLACEHOLDER_URLS = ("imgur.com/removed.png", "/photo_unavailable.png", "/photo_unavailable_l.png")
"""Ends of the addresses that Imgur and Flickr send to in place of a removed picture."""

PLACEHOLDER_MD5 = frozenset({"d835884373f4d6c8f24742ceabe74946"})
"""md5 of Imgur's `removed.png`, which some mirrors answer under the picture's own address."""

GOOD = frozenset({200, 203})
_MOVED = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({429, 503})
_LONGEST_PLACEHOLDER = 4096
_LONGEST_POLICY = 300
_SETTLED = 1 << 16
"""Bytes of a body that nobody wants that are still read, so that its connection lives on."""

_SECONDS = re.compile(r"[0-9]{1,9}")


def location(head: Head) -> str:
    """Where the answer sends to; empty if nowhere."""
    return head.get("location") if head.status in _MOVED else ""


def busy_kind(head: Head) -> str | None:
    """The kind of an answer that asks for fewer requests; None for any other."""
    return kind_of(head.status) if head.status in _BUSY else None


def wanted_bytes(head: Head, most: int, respect: Collection[str]) -> int:
    """How much of an answer's body to read, if `most` is the size of the largest image."""
    is_image = head.status in GOOD and not opt_out(head, respect)
    limit = most if is_image else _SETTLED
    return limit if head.length() <= limit else 0


def check_status(head: Head) -> None:
    """Refuse what is no good answer.

    Raises:
        FetchError: with the kind of the status.
    """
    if head.status not in GOOD:
        raise FetchError(kind_of(head.status), f"HTTP {head.status}", retry_after(head))


def image_body(answer: Response, max_bytes: int, respect: Collection[str]) -> bytes:
    """The bytes of an image.

    Raises:
        FetchError: it is not to be had, or not to be kept.
    """
    check_status(answer.head)
    refusal = opt_out(answer.head, respect)
    if refusal:
        raise FetchError("opt_out", refusal)
    too_large = FetchError("too_large", f"more than {max_bytes} bytes")
    if answer.is_cut:
        raise too_large
    if answer.trouble:
        raise answer.trouble
    if not answer.body:
        raise FetchError("empty", "the answer has no body")
    content = _unpacked(answer.body, answer.head.get("content-encoding"), max_bytes)
    if len(content) > max_bytes:
        raise too_large
    if _is_placeholder(content):
        raise FetchError("placeholder", "the bytes are those of a removed picture")
    return content


def robots_rules(answer: Response) -> Robots:
    """The rules of a robots.txt, of which a little more than is read may be there.

    Raises:
        FetchError: there are none to be had.
    """
    check_status(answer.head)
    if answer.trouble:
        raise answer.trouble
    encoding = answer.head.get("content-encoding")
    return Robots.of(_unpacked(answer.body, encoding, ROBOTS_BYTES))


def is_placeholder_url(url: str) -> bool:
    """Say whether an address is that of the picture that stands for removed ones."""
    return url.partition("?")[0].endswith(PLACEHOLDER_URLS)


def opt_out(head: Head, respect: Collection[str]) -> str | None:
    """What in an answer's head forbids to keep its image, among the signals that we respect."""
    if "x-robots-tag" in respect:
        word = refusal_in_tags(head.all("x-robots-tag"))
        if word:
            return f"X-Robots-Tag: {word}"
    if "tdm" in respect and is_reserved(head.all("tdm-reservation")):
        policy = " ".join(head.all("tdm-policy"))[:_LONGEST_POLICY]
        return "TDM-Reservation: 1" + (f", terms at {policy!r}" if policy else "")
    return None


def kind_of(status: int) -> str:
    """The kind of a status that is not good."""
    if status in {403, 404, 410, 429}:
        return f"http_{status}"
    if status in {204, 205}:
        return "empty"
    return "http_5xx" if 500 <= status < 600 else "http_4xx"  # some hosts answer 999


def retry_after(head: Head) -> float | None:
    """The seconds that the server wants us to wait, which it may state as a date."""
    value = head.get("retry-after")
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _is_placeholder(content: bytes) -> bool:
    if len(content) > _LONGEST_PLACEHOLDER:
        return False
    return hashlib.md5(content, usedforsecurity=False).hexdigest() in PLACEHOLDER_MD5


def _unpacked(body: bytes, encoding: str, most: int) -> bytes:
    """The body without the packing that some hosts add unasked, and at most one byte above `most`.

    A body that is not packed, whatever its header says, stays as it is.
    """
    if encoding.strip().lower() not in {"gzip", "x-gzip", "deflate"}:
        return body
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(body, most + 1) or body
    except zlib.error:
        return body
