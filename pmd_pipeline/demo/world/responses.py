"""What the sample server answers: pictures of many kinds, and trouble of many kinds."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO

from PIL import Image

from pmd_pipeline.demo.world.scenes import Scene, draw

FAILURE: dict[str, str | None] = {
    # good pictures, of the kinds that the web has
    "jpeg": None,
    "png": None,
    "deep_png": None,
    "palette_png": None,
    "gif": None,
    "webp": None,
    "cmyk": None,
    "rotated": None,
    "mislabelled": None,
    # trouble that passes by itself
    "moved": None,
    "busy": None,
    "hurried": None,
    "hiccup": None,
    # trouble that stays
    "missing": "http_404",
    "gone": "http_410",
    "forbidden": "http_403",
    "withheld": "http_4xx",
    "broken": "http_5xx",
    "overrun": "http_429",
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
    # no address at all, and not in the archive either
    "absent": "not_in_archive",
}
"""What may become of asking for a picture, with the reason under which a build must count it."""

STATUSES = {
    "missing": 404,
    "gone": 410,
    "forbidden": 403,
    "withheld": 451,
    "broken": 500,
    "overrun": 429,
}

FIRST_STATUSES = {"busy": 503, "hurried": 429}
"""Statuses of the first attempt; the second gets the picture."""

RETRY_AFTER = {"busy": "1", "hurried": "0", "broken": "0", "overrun": "0"}

REMOVED = "i.imgur.com/removed.png"
"""Where Imgur leads in place of a removed picture."""

UNAVAILABLE = "s.yimg.com/pw/images/en-us/photo_unavailable.png"
"""Where Flickr does."""

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
class Answer:
    """An HTTP answer; without status, the connection is reset instead."""

    status: int | None
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def new_home(address: str) -> str:
    """Where the picture at `address` (host and path) has moved to.

    >>> new_home("static.flickr.com/2723/4385058960_b0f291553e.jpg")
    'cdn.static.flickr.com/2723/4385058960_b0f291553e.jpg'
    """
    return f"cdn.{address}"


def answer(kind: str, address: str, scene: Scene, *, first: bool) -> Answer:
    """The answer to a request for `address` (host and path).

    Args:
        kind: one of `FAILURE`.
        scene: what the picture shows.
        first: nobody has asked for this address before.
    """
    wish = {"Retry-After": RETRY_AFTER[kind]} if kind in RETRY_AFTER else {}
    if kind in STATUSES:
        return Answer(STATUSES[kind], b"no picture here\n", {"Content-Type": "text/plain", **wish})
    if kind == "reset" or (kind == "hiccup" and first):
        return Answer(None)
    if kind in FIRST_STATUSES and first:
        return Answer(FIRST_STATUSES[kind], b"", wish)
    targets = {
        "moved": new_home(address),
        "loop": address,
        "removed": REMOVED,
        "unavailable": UNAVAILABLE,
    }
    if kind in targets:
        return Answer(302, b"", {"Location": f"https://{targets[kind]}"})
    body, content_type = picture(kind, scene)
    return Answer(200, body, {"Content-Type": content_type})


def picture(kind: str, scene: Scene) -> tuple[bytes, str]:
    """The body of an answer that has one, and its content type."""
    if kind in _BODIES:
        return _BODIES[kind](draw(scene)), _CONTENT_TYPES.get(kind, "image/jpeg")
    return _encoded(draw(scene), "JPEG"), _CONTENT_TYPES.get(kind, "image/jpeg")


def placeholder() -> Answer:
    """The small grey picture that hosts show in place of a removed one."""
    body = _encoded(Image.new("RGB", (161, 81), (222, 222, 222)), "PNG")
    return Answer(200, body, {"Content-Type": "image/png"})


def _encoded(image: Image.Image, file_format: str) -> bytes:
    out = BytesIO()
    if file_format == "JPEG":
        image.save(out, "JPEG", quality=_QUALITY)
    else:
        image.save(out, file_format)
    return out.getvalue()


def _rotated(image: Image.Image) -> bytes:
    """Pixels that lie on their side, as a camera held upright writes them; EXIF says so."""
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = 6
    out = BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(out, "JPEG", quality=_QUALITY, exif=exif)
    return out.getvalue()


def _deep_png(image: Image.Image) -> bytes:
    """The image in 16 bits a channel, which Pillow reads but does not write."""
    width, height = image.size
    pixels = image.tobytes()
    doubled = bytearray(2 * len(pixels))
    doubled[0::2] = doubled[1::2] = pixels  # 255 becomes 65535
    row = 6 * width
    lines = b"".join(b"\0" + doubled[row * y : row * (y + 1)] for y in range(height))
    return _png(width, height, (16, 2), lines)


@lru_cache(maxsize=1)
def _bomb() -> bytes:
    """A few kilobytes that unpack to more pixels than anyone should decode."""
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
    "png": lambda image: _encoded(image, "PNG"),
    "deep_png": _deep_png,
    "palette_png": lambda image: _encoded(image.quantize(64), "PNG"),
    "gif": lambda image: _encoded(image, "GIF"),
    "webp": lambda image: _encoded(image, "WEBP"),
    "cmyk": lambda image: _encoded(image.convert("CMYK"), "JPEG"),
    "rotated": _rotated,
    "cropped": lambda image: _encoded(_upper_half(image), "JPEG"),
    "cut": lambda image: _encoded(image, "JPEG")[:2000],
    "bomb": lambda _: _bomb(),
    "page": lambda _: _PAGE,
    "drawing": lambda _: _DRAWING,
    "empty": lambda _: b"",
}
"""Bodies of the answers that are no plain JPEG of the scene."""

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
