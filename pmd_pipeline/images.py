"""Bytes to a checked picture, and the picture to the JPEG that goes into the shard."""

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

from pmd_pipeline.errors import RecordError
from pmd_pipeline.recipe import Images

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is decoded. Pillow knows more, some by starting other programs: not for strangers."""

_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError,
    ZeroDivisionError, AttributeError, MemoryError, NotImplementedError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's decoders are known to raise on hostile bytes."""

_ORIENTATION = 0x0112

Image.MAX_IMAGE_PIXELS = None  # the recipe's `max_pixels` is checked instead, before decoding


@dataclass(frozen=True)
class Picture:
    """A JPEG with its size in pixels, and the size of the image as fetched (EXIF applied)."""

    jpeg: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def opened(body: bytes, rules: Images) -> Image.Image:
    """The image in `body`, its header read and its pixels not yet.

    Raises:
        RecordError: `svg`, `not_an_image`, `bomb`.
    """
    try:
        image = Image.open(BytesIO(body), formats=FORMATS)
    except _BROKEN as error:
        if b"<svg" in body[:4096].lower():
            raise RecordError("svg", "a drawing, not a picture") from error
        raise RecordError("not_an_image", "no image format that is read here") from error
    if image.width * image.height > rules.max_pixels:
        raise RecordError("bomb", f"{image.width} x {image.height} pixels")
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF orientation, from the header alone."""
    sideways = _orientation(image) >= 5
    return (image.height, image.width) if sideways else (image.width, image.height)


def picture(body: bytes, image: Image.Image, rules: Images) -> Picture:
    """The picture to store: made smaller by the recipe's rule, never larger.

    An upright 8-bit JPEG within the limits keeps its bytes, once it has been decoded whole.

    Raises:
        RecordError: `truncated`, `not_an_image`.
    """
    original = upright_size(image)
    target = target_size(original, rules)
    try:
        plain = image.format == "JPEG" and image.mode in {"RGB", "L"} and _orientation(image) == 1
        if plain and target == original:
            image.load()
            return Picture(body, *original, *original)
        if image.format == "JPEG" and target != original:
            image.draft(None, (2 * max(target), 2 * max(target)))
        upright = ImageOps.exif_transpose(image)
        pixels = _rgb(upright)
    except _BROKEN as error:
        kind = "truncated" if "truncated" in str(error) else "not_an_image"
        raise RecordError(kind, "the pixels cannot be read") from error
    if pixels.size != target:
        pixels = pixels.resize(target, Image.Resampling.LANCZOS, reducing_gap=3.0)
    out = BytesIO()
    pixels.save(out, "JPEG", quality=rules.quality, subsampling="4:2:0")
    return Picture(out.getvalue(), *target, *original)


def target_size(size: tuple[int, int], rules: Images) -> tuple[int, int]:
    """The size to store an image of `size` at.

    >>> target_size((1024, 768), Images(size=256, mode="shorter"))
    (341, 256)
    """
    if rules.mode == "none":
        return size
    side = min(size) if rules.mode == "shorter" else max(size)
    if side <= rules.size:
        return size
    width, height = (max(1, round(one * rules.size / side)) for one in size)
    return width, height


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1  # broken EXIF says nothing, and Pillow's transpose ignores it as well
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _rgb(image: Image.Image) -> Image.Image:
    """The pixels as 8-bit RGB: 16 bits scaled, transparency on white."""
    if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
        levels = np.asarray(image, dtype=np.float64)
        deep = image.mode != "F" and (image.mode.startswith("I;16") or levels.max(initial=0) > 255)
        bytes_ = np.clip(np.rint(levels / 257 if deep else levels), 0, 255).astype(np.uint8)
        return Image.fromarray(bytes_).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
