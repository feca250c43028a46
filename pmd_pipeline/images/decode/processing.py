"""Bytes to a checked picture, and the picture to the JPEG that goes into the shard."""

import logging
import re
import struct
import warnings
import zlib
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.images.decode.pixels import Pixels, is_whole, jpeg, jpeg_pixels
from pmd_pipeline.recipe import Images

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is decoded, MPO as a kind of JPEG. Pillow knows more, some by starting other programs: not
for strangers."""

_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError,
    ZeroDivisionError, AttributeError, MemoryError, NotImplementedError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's decoders are known to raise on hostile bytes."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""How to turn the pixels upright, by EXIF orientation."""

_SIDEWAYS = {Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90}

_MARGIN = 1.5
"""How many times the target's pixels a coarse decode keeps; fewer fall behind img2dataset."""

_FAST_MARGIN = 1.2
_PATIENT_MARGIN = 4
_LONGEST_SIDE = 65_500
"""Pixels; libjpeg's limit."""

_MOST_BESIDES = 1 << 16
"""Bytes of a JPEG beyond those of its bare pixels that are still kept: profiles and thumbnails."""

_DEEP = (1, 255, 65_535, 2**32 - 1)
"""Values that white may have, where a format leaves that open."""

Image.MAX_IMAGE_PIXELS = None  # the recipe's `max_pixels` is checked instead, before decoding

# what Pillow mends it may mend in silence: strangers' images have no end of broken EXIF
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.ERROR)


@dataclass(frozen=True)
class StoredImage:
    """A JPEG with its size in pixels, and the size of the image as fetched (EXIF applied)."""

    jpeg: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def open_image(body: bytes, rules: Images) -> Image.Image:
    """The image in `body`, its header read and its pixels not yet.

    Raises:
        RecordError: `svg`, `not_an_image`, `truncated`, `bomb`.
    """
    try:
        image = Image.open(BytesIO(body), formats=FORMATS)
    except _BROKEN as error:
        if _is_svg(body):
            raise RecordError("svg", "a drawing, not a picture") from error
        raise _unreadable(body, error) from error
    if image.width * image.height > rules.max_pixels:
        raise RecordError("bomb", f"{image.width} x {image.height} pixels")
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF orientation, from the header alone."""
    sideways = _turn(image) in _SIDEWAYS
    return (image.height, image.width) if sideways else (image.width, image.height)


def make_stored_image(body: bytes, image: Image.Image, rules: Images) -> StoredImage:
    """The picture to store: made smaller by the recipe's rule, never larger.

    An upright 8-bit JPEG within the limits keeps its bytes, once it has been decoded whole, unless
    they hold much else besides the picture.

    Raises:
        RecordError: `truncated`, `not_an_image`, `bomb`.
    """
    original = upright_size(image)
    target = target_size(original, rules)
    if max(target) > _LONGEST_SIDE:
        raise RecordError("bomb", f"{target[0]} x {target[1]} pixels are more than a JPEG can have")
    if target == original and _is_storable(image, body):
        if not is_whole(body, image.size):
            _load(body, image)
        return StoredImage(body, *original, *original)
    margin = _FAST_MARGIN if rules.fast else _MARGIN
    pixels = _made_smaller(body, image, target, margin)
    return StoredImage(jpeg(pixels, rules.quality), *target, *original)


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


def _turn(image: Image.Image) -> Transpose | None:
    """How to turn the pixels upright, from the header alone."""
    if image.format == "TIFF":
        return None  # Pillow itself turns these, and says so in their size
    try:
        # PNG has a `getexif` of its own, which decodes the pixels to look behind them
        return _TURNS.get(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except _BROKEN:
        return None  # broken EXIF says nothing


def _is_storable(image: Image.Image, body: bytes) -> bool:
    """Say whether the bytes are what we would store, if they decode."""
    is_upright = image.format == "JPEG" and _is_plain_jpeg(image) and _turn(image) is None
    return is_upright and len(body) <= 3 * image.width * image.height + _MOST_BESIDES


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format in {"JPEG", "MPO"} and image.mode in {"RGB", "L"}


def _made_smaller(
    body: bytes, image: Image.Image, target: tuple[int, int], margin: float
) -> Pixels:
    """The pixels upright as 8-bit RGB at the size `target`."""
    turn = _turn(image)
    size = (target[1], target[0]) if turn in _SIDEWAYS else target
    pixels = None
    if _is_plain_jpeg(image):
        pixels = jpeg_pixels(body, image.size, size, margin=margin)
    if pixels is None:
        pixels = _patiently_made_smaller(body, image, size)
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def _patiently_made_smaller(body: bytes, image: Image.Image, size: tuple[int, int]) -> Pixels:
    """The pixels at `size`, by Pillow: every format, and JPEGs that have something odd."""
    # the last pixels of a coarse decode may lie partly outside of the picture: `box` tells
    margin = (_PATIENT_MARGIN * size[0], _PATIENT_MARGIN * size[1])
    coarse = image.draft(None, margin) if image.format == "JPEG" else None
    box = coarse[1] if coarse else None
    _load(body, image)
    pixels = _rgb(image)
    if pixels.size != size:
        pixels = pixels.resize(size, Image.Resampling.LANCZOS, box=box)
    return np.asarray(pixels)


def _load(body: bytes, image: Image.Image) -> None:
    try:
        image.load()
    except _BROKEN as error:
        raise _unreadable(body, error) from error


def _rgb(image: Image.Image) -> Image.Image:
    """The pixels as 8-bit RGB: deeper ones scaled, transparency on white."""
    if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Pixels:
    levels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0.0, neginf=0.0)
    white = 65_535
    if not image.mode.startswith("I;16"):
        most = levels.max(initial=0.0)
        whites = _DEEP if image.mode == "F" else _DEEP[1:]
        white = next((one for one in whites if most <= one), most)
    levels *= np.float32(255 / white)
    return np.clip(np.rint(levels, out=levels), 0, 255).astype(np.uint8)


def _is_svg(body: bytes) -> bool:
    """Say whether the first element of a text, which may be packed, is `svg`."""
    head = body[: 1 << 16]
    if head.startswith(b"\x1f\x8b"):
        with suppress(zlib.error):
            head = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(head, 1 << 16)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head.decode("utf-16", errors="replace").encode(errors="replace")
    head = re.sub(rb"<!--.*?-->", b"", head.removeprefix(b"\xef\xbb\xbf"), flags=re.DOTALL)
    if not head.lstrip().startswith(b"<"):
        return False
    root = re.search(rb"<([A-Za-z][\w:.-]*)", head)
    return root is not None and root[1].lower() in {b"svg", b"svg:svg"}


def _unreadable(body: bytes, error: Exception) -> RecordError:
    if "truncated" in str(error).lower() or _ends_early(body):
        return RecordError("truncated", "the image ends early")
    return RecordError("not_an_image", "no image that can be read")


def _ends_early(body: bytes) -> bool:
    """Say whether an image lacks its end, as far as its format marks one."""
    if body.startswith(b"\xff\xd8\xff"):
        return not body.rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    if body.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in body
    if body.startswith((b"GIF87a", b"GIF89a")):
        return not body.rstrip(b"\0").endswith(b";")
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return 8 + int.from_bytes(body[4:8], "little") > len(body)
    if body[4:12] in {b"ftypavif", b"ftypavis"}:
        return _boxes_end(body) > len(body)
    return False


def _boxes_end(body: bytes) -> int:
    """Where the last box begun in `body` ends; AVIF is a row of boxes, each with its length."""
    end = 0
    while end <= len(body) - 8:
        length = int.from_bytes(body[end : end + 4], "big")
        if length < 8:
            return 0  # as long as the file, or of a length that stands elsewhere
        end += length
    return end
