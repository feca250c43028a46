"""Responses of the sample server: images of many formats, and failures of many kinds."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO

from PIL import Image

from pmd_pipeline.demo.world.scenes import Scene, draw_scene

RESPONSE_REASONS: dict[str, str | None] = {
    # valid images in the formats of the web
    "jpeg": None,
    "png": None,
    "deep_png": None,
    "palette_png": None,
    "gif": None,
    "webp": None,
    "cmyk": None,
    "rotated": None,
    "mislabelled": None,
    # transient failures
    "moved": None,
    "busy": None,
    "rate_limited_once": None,
    "reset_once": None,
    # permanent failures
    "missing": "http_404",
    "gone": "http_410",
    "forbidden": "http_403",
    "withheld": "http_4xx",
    "broken": "http_5xx",
    "rate_limited": "http_429",
    "reset": "connect",
    "loop": "redirects",
    "removed": "placeholder",
    "unavailable": "placeholder",
    "empty": "empty",
    "page": "not_an_image",
    "drawing": "svg",
    "cut": "truncated",
    "bomb": "bomb",
    "cropped": "wrong_size",
    # no address, and not in the archive
    "absent": "not_in_archive",
}
"""Kinds of responses, with the reason under which a build must count their images."""

STATUSES = {
    "missing": 404,
    "gone": 410,
    "forbidden": 403,
    "withheld": 451,
    "broken": 500,
    "rate_limited": 429,
}

FIRST_STATUSES = {"busy": 503, "rate_limited_once": 429}
"""Statuses of the first attempt; the second attempt gets the image."""

RETRY_AFTER = {"busy": "1", "rate_limited_once": "0", "broken": "0", "rate_limited": "0"}

REMOVED = "i.imgur.com/removed.png"
"""Address to which Imgur redirects for a removed image."""

UNAVAILABLE = "s.yimg.com/pw/images/en-us/photo_unavailable.png"
"""Address to which Flickr redirects for a removed image."""

_PAGE = (
    b"<!DOCTYPE html><html><head><title>Domain for sale</title></head>"
    b"<body><h1>This domain may be for sale</h1></body></html>"
)
_DRAWING = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<svg xmlns="http://www.w3.org/2000/svg" '
    b'width="400" height="300"><circle cx="200" cy="150" r="60" fill="red"/></svg>\n'
)
_BOMB_SIDE = 12_000
_QUALITY = 90
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class SampleResponse:
    """An HTTP response; without a status, the connection is reset instead."""

    status: int | None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def moved_address(address: str) -> str:
    """The new address of a moved image; an address is host and path.

    >>> moved_address("static.flickr.com/2723/4385058960_b0f291553e.jpg")
    'cdn.static.flickr.com/2723/4385058960_b0f291553e.jpg'
    """
    return f"cdn.{address}"


def respond(kind: str, address: str, scene: Scene, *, first: bool) -> SampleResponse:
    """The response to a request for `address` (host and path).

    Args:
        kind: one of `RESPONSE_REASONS`.
        scene: content of the image.
        first: whether it is the first request for this address.
    """
    retry_after = {"Retry-After": RETRY_AFTER[kind]} if kind in RETRY_AFTER else {}
    if kind in STATUSES:
        return SampleResponse(
            STATUSES[kind], b"no picture here\n", {"Content-Type": "text/plain", **retry_after}
        )
    if kind == "reset" or (kind == "reset_once" and first):
        return SampleResponse(None)
    if kind in FIRST_STATUSES and first:
        return SampleResponse(FIRST_STATUSES[kind], b"", retry_after)
    targets = {
        "moved": moved_address(address),
        "loop": address,
        "removed": REMOVED,
        "unavailable": UNAVAILABLE,
    }
    if kind in targets:
        return SampleResponse(302, b"", {"Location": f"https://{targets[kind]}"})
    body, content_type = sample_body(kind, scene)
    return SampleResponse(200, body, {"Content-Type": content_type})


def sample_body(kind: str, scene: Scene) -> tuple[bytes, str]:
    """The body of a response, and its content type."""
    if kind in _BODIES:
        return _BODIES[kind](draw_scene(scene)), _CONTENT_TYPES.get(kind, "image/jpeg")
    return _encode_image(draw_scene(scene), "JPEG"), _CONTENT_TYPES.get(kind, "image/jpeg")


def placeholder() -> SampleResponse:
    """The small grey image that hosts serve instead of a removed one."""
    body = _encode_image(Image.new("RGB", (161, 81), (222, 222, 222)), "PNG")
    return SampleResponse(200, body, {"Content-Type": "image/png"})


def _encode_image(image: Image.Image, file_format: str) -> bytes:
    out = BytesIO()
    if file_format == "JPEG":
        image.save(out, "JPEG", quality=_QUALITY)
    else:
        image.save(out, file_format)
    return out.getvalue()


def _rotated(image: Image.Image) -> bytes:
    """A JPEG of rotated pixels with the EXIF orientation that undoes the rotation."""
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = 6
    out = BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(out, "JPEG", quality=_QUALITY, exif=exif)
    return out.getvalue()


def _deep_png(image: Image.Image) -> bytes:
    """The image with 16 bits per channel, which Pillow reads but does not write."""
    width, height = image.size
    pixels = image.tobytes()
    doubled = bytearray(2 * len(pixels))
    doubled[0::2] = doubled[1::2] = pixels  # 255 becomes 65535
    row = 6 * width
    lines = b"".join(b"\0" + doubled[row * y : row * (y + 1)] for y in range(height))
    return _png(width, height, (16, 2), lines)


@lru_cache(maxsize=1)
def _bomb() -> bytes:
    """A decompression bomb: a few kilobytes that decode to too many pixels."""
    lines = bytes((_BOMB_SIDE // 8 + 1) * _BOMB_SIDE)
    return _png(_BOMB_SIDE, _BOMB_SIDE, (1, 0), lines)


def _png(width: int, height: int, depth_and_colour: tuple[int, int], lines: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, *depth_and_colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def _upper_half(image: Image.Image) -> Image.Image:
    return image.crop((0, 0, image.width, image.height // 2))


_BODIES: dict[str, Callable[[Image.Image], bytes]] = {
    "png": lambda image: _encode_image(image, "PNG"),
    "deep_png": _deep_png,
    "palette_png": lambda image: _encode_image(image.quantize(64), "PNG"),
    "gif": lambda image: _encode_image(image, "GIF"),
    "webp": lambda image: _encode_image(image, "WEBP"),
    "cmyk": lambda image: _encode_image(image.convert("CMYK"), "JPEG"),
    "rotated": _rotated,
    "cropped": lambda image: _encode_image(_upper_half(image), "JPEG"),
    "cut": lambda image: _encode_image(image, "JPEG")[:2000],
    "bomb": lambda _: _bomb(),
    "page": lambda _: _PAGE,
    "drawing": lambda _: _DRAWING,
    "empty": lambda _: b"",
}
"""Bodies of the responses that are not a plain JPEG of the scene."""

_CONTENT_TYPES = {
    "png": "image/png",
    "deep_png": "image/png",
    "palette_png": "image/png",
    "bomb": "image/png",
    "gif": "image/gif",
    "webp": "image/webp",
    "mislabelled": "image/gif",
    "drawing": "image/svg+xml",
    "page": "text/html; charset=utf-8",
}
