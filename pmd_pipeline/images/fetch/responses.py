"""The meaning of a response: status, redirects, opt-out headers, and the image in its body."""

import email.utils
import hashlib
import re
import time
import zlib
from collections.abc import Collection

from pmd_pipeline.images.fetch.curl_transport import Response, ResponseHead
from pmd_pipeline.images.fetch.errors import FetchError
from pmd_pipeline.images.fetch.robots import (
    MAX_ROBOTS_BYTES,
    RobotsRules,
    is_tdm_reserved,
    opt_out_directive,
)

PLACEHOLDER_URLS = ("imgur.com/removed.png", "/photo_unavailable.png", "/photo_unavailable_l.png")
"""Ends of the URLs to which Imgur and Flickr redirect requests for a removed image."""

PLACEHOLDER_MD5 = frozenset({"d835884373f4d6c8f24742ceabe74946"})
"""MD5 of Imgur's `removed.png`, which some mirrors return under the URL of the removed image."""

_SUCCESS_STATUSES = frozenset({200, 203})
_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_BUSY_STATUSES = frozenset({429, 503})
_MAX_PLACEHOLDER_BYTES = 4096
_MAX_POLICY_CHARACTERS = 300
_DRAIN_BYTES = 1 << 16
"""Bytes of a body without use that are read, so that its connection can be used again."""

_SECONDS = re.compile(r"[0-9]{1,9}")


def redirect_location(head: ResponseHead) -> str:
    """The Location header of a redirect; empty for any other response."""
    return head.get("location") if head.status in _REDIRECT_STATUSES else ""


def busy_kind(head: ResponseHead) -> str | None:
    """The failure reason of a response that asks for fewer requests; None for any other."""
    return status_kind(head.status) if head.status in _BUSY_STATUSES else None


def max_body_bytes(head: ResponseHead, max_bytes: int, respect: Collection[str]) -> int:
    """Bytes of the body to read, where `max_bytes` is the limit for images; 0 aborts."""
    is_image = head.status in _SUCCESS_STATUSES and not opt_out_signal(head, respect)
    limit = max_bytes if is_image else _DRAIN_BYTES
    return limit if head.content_length() <= limit else 0


def check_status(head: ResponseHead) -> None:
    """Pass a successful response.

    Raises:
        FetchError: any other, with the failure reason of its status.
    """
    if head.status not in _SUCCESS_STATUSES:
        detail = f"HTTP {head.status}"
        raise FetchError(status_kind(head.status), detail, retry_after_seconds(head))


def image_body(response: Response, max_bytes: int, respect: Collection[str]) -> bytes:
    """The bytes of an image file.

    Raises:
        FetchError: the response has none, or forbids to keep it.
    """
    check_status(response.head)
    signal = opt_out_signal(response.head, respect)
    if signal:
        raise FetchError("opt_out", signal)
    too_large = FetchError("too_large", f"more than {max_bytes} bytes")
    if response.is_too_long:
        raise too_large
    if response.error:
        raise response.error
    if not response.body:
        raise FetchError("empty", "the answer has no body")
    content = _decompress(response.body, response.head.get("content-encoding"), max_bytes)
    if len(content) > max_bytes:
        raise too_large
    if _is_placeholder(content):
        raise FetchError("placeholder", "the bytes are those of a removed picture")
    return content


def parse_robots(response: Response) -> RobotsRules:
    """The rules of a robots.txt; what exceeds `MAX_ROBOTS_BYTES` is ignored.

    Raises:
        FetchError: the response has none.
    """
    check_status(response.head)
    if response.error:
        raise response.error
    encoding = response.head.get("content-encoding")
    return RobotsRules.parse(_decompress(response.body, encoding, MAX_ROBOTS_BYTES))


def is_placeholder_url(url: str) -> bool:
    """True for the URL of an image that stands in for removed ones."""
    return url.partition("?")[0].endswith(PLACEHOLDER_URLS)


def opt_out_signal(head: ResponseHead, respect: Collection[str]) -> str | None:
    """The header that forbids to keep the image, among the signals in `respect`."""
    if "x-robots-tag" in respect:
        directive = opt_out_directive(head.all("x-robots-tag"))
        if directive:
            return f"X-Robots-Tag: {directive}"
    if "tdm" in respect and is_tdm_reserved(head.all("tdm-reservation")):
        policy = " ".join(head.all("tdm-policy"))[:_MAX_POLICY_CHARACTERS]
        return "TDM-Reservation: 1" + (f", terms at {policy!r}" if policy else "")
    return None


def status_kind(status: int) -> str:
    """The failure reason of an HTTP status that is no success."""
    if status in {403, 404, 410, 429}:
        return f"http_{status}"
    if status in {204, 205}:
        return "empty"
    return "http_5xx" if 500 <= status < 600 else "http_4xx"  # some hosts return 999


def retry_after_seconds(head: ResponseHead) -> float | None:
    """The seconds of a Retry-After header, which may hold a date; None without a valid one."""
    value = head.get("retry-after")
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _is_placeholder(content: bytes) -> bool:
    if len(content) > _MAX_PLACEHOLDER_BYTES:
        return False
    return hashlib.md5(content, usedforsecurity=False).hexdigest() in PLACEHOLDER_MD5


def _decompress(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body without a compression that was not requested, cut one byte above `max_bytes`.

    A body that is not compressed, whatever its header states, is returned as it is.
    """
    if encoding.strip().lower() not in {"gzip", "x-gzip", "deflate"}:
        return body
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(body, max_bytes + 1) or body
    except zlib.error:
        return body
