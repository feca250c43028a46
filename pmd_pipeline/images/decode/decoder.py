"""Bytes of an image file, in any accepted format, to upright 8-bit RGB pixels."""

import logging
import re
import struct
import warnings
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.image_format import Pixels
from pmd_pipeline.images.decode.jpeg import SMALLEST_SCALE, decode_jpeg, decodes_cleanly
from pmd_pipeline.images.decode.resize import downsample
from pmd_pipeline.recipe import Images

ACCEPTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are decoded; MPO counts as JPEG. Pillow has more decoders, some of which start other
programs: these are not safe for bytes from the web."""

_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError,
    ZeroDivisionError, AttributeError, MemoryError, NotImplementedError, RuntimeError,
    struct.error, zlib.error,
)  # fmt: skip
"""Exceptions that Pillow's decoders are known to raise on hostile bytes."""

_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""EXIF orientation to the operation that makes the pixels upright."""

_SWAPS_SIDES = {
    Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90,
}  # fmt: skip

_MARGIN = 1.5
"""Least pixels of a scaled decode, as a multiple of the target's along each side; with fewer, the
quality falls below img2dataset's."""

_FAST_MARGIN = 1.2
_PILLOW_MARGIN = 4

_WHITE_LEVELS = (1, 255, 65_535, 2**32 - 1)
"""Values that white can have in formats of more than 8 bits that do not state it."""

Image.MAX_IMAGE_PIXELS = None  # `max_pixels` of the recipe is checked instead, before decoding

# images from the web often have broken EXIF, which Pillow repairs with a warning
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.ERROR)


def open_image(body: bytes, rules: Images) -> Image.Image:
    """The image in `body`: its header is read, its pixels are not decoded yet.

    Raises:
        RecordError: `svg`, `not_an_image`, `truncated`, `bomb`.
    """
    try:
        image = Image.open(BytesIO(body), formats=ACCEPTED_FORMATS)
    except _DECODER_ERRORS as error:
        if _is_svg(body):
            raise RecordError("svg", "a drawing, not a picture") from error
        raise _decoding_error(body, error) from error
    if image.width * image.height > rules.max_pixels:
        raise RecordError("bomb", f"{image.width} x {image.height} pixels")
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF orientation, from the header alone."""
    swaps = _transpose_of(image) in _SWAPS_SIDES
    return (image.height, image.width) if swaps else (image.width, image.height)


def is_upright_jpeg(image: Image.Image) -> bool:
    """True for an 8-bit RGB or grey JPEG without rotation, from the header alone."""
    return image.format == "JPEG" and _is_plain_jpeg(image) and _transpose_of(image) is None


def check_jpeg(body: bytes, image: Image.Image) -> None:
    """Decode a JPEG to its end and discard the pixels.

    Raises:
        RecordError: `truncated`, `not_an_image`.
    """
    if not decodes_cleanly(body, image.size):
        _load_pixels(body, image)


def decode_resized(
    body: bytes, image: Image.Image, target: tuple[int, int], *, fast: bool
) -> Pixels:
    """The upright pixels of an image at the size `target`, which is not above its own.

    Raises:
        RecordError: `truncated`, `not_an_image`.
    """
    transpose = _transpose_of(image)
    size = (target[1], target[0]) if transpose in _SWAPS_SIDES else target
    pixels = None
    if _is_plain_jpeg(image):
        pixels = _resized_jpeg(body, image.size, size, _FAST_MARGIN if fast else _MARGIN)
    if pixels is None:
        pixels = _resized_by_pillow(body, image, size)
    if transpose is None:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(transpose))


def _transpose_of(image: Image.Image) -> Transpose | None:
    """The operation that makes the pixels upright, from the header alone."""
    if image.format == "TIFF":
        return None  # Pillow rotates these itself, and its size takes that into account
    try:
        # PNG's own `getexif` decodes the pixels to find a chunk after them
        return _TRANSPOSES.get(Image.Image.getexif(image).get(_ORIENTATION_TAG, 1))
    except _DECODER_ERRORS:
        return None  # broken EXIF counts as none


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format in {"JPEG", "MPO"} and image.mode in {"RGB", "L"}


def _resized_jpeg(
    body: bytes, size: tuple[int, int], target: tuple[int, int], margin: float
) -> Pixels | None:
    """A JPEG decoded at the smallest scale with `margin` times the target's pixels, then resampled.

    None where the decoder reports a problem.
    """
    scale = SMALLEST_SCALE
    while scale > 1 and any(
        one < scale * margin * side for one, side in zip(size, target, strict=True)
    ):
        scale //= 2
    pixels = decode_jpeg(body, size, scale)
    if pixels is None or size == target:
        return pixels
    return downsample(pixels, size, scale, target)


def _resized_by_pillow(body: bytes, image: Image.Image, size: tuple[int, int]) -> Pixels:
    """The pixels at `size`: every format, and JPEGs that libjpeg has a warning for."""
    # the last pixels of a scaled decode may lie partly outside the image: `box` has its extent
    margin = (_PILLOW_MARGIN * size[0], _PILLOW_MARGIN * size[1])
    coarse = image.draft(None, margin) if image.format == "JPEG" else None
    box = coarse[1] if coarse else None
    _load_pixels(body, image)
    pixels = _rgb(image)
    if pixels.size != size:
        pixels = pixels.resize(size, Image.Resampling.LANCZOS, box=box)
    return np.asarray(pixels)


def _load_pixels(body: bytes, image: Image.Image) -> None:
    try:
        image.load()
    except _DECODER_ERRORS as error:
        raise _decoding_error(body, error) from error


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
        whites = _WHITE_LEVELS if image.mode == "F" else _WHITE_LEVELS[1:]
        white = next((one for one in whites if most <= one), most)
    levels *= np.float32(255 / white)
    return np.clip(np.rint(levels, out=levels), 0, 255).astype(np.uint8)


def _is_svg(body: bytes) -> bool:
    """True if the first element of a text, which may be compressed, is `svg`."""
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


def _decoding_error(body: bytes, error: Exception) -> RecordError:
    if "truncated" in str(error).lower() or _ends_early(body):
        return RecordError("truncated", "the image ends early")
    return RecordError("not_an_image", "no image that can be read")


def _ends_early(body: bytes) -> bool:
    """True if an image lacks its end, in formats that mark one."""
    if body.startswith(b"\xff\xd8\xff"):
        return not body.rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    if body.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in body
    if body.startswith((b"GIF87a", b"GIF89a")):
        return not body.rstrip(b"\0").endswith(b";")
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        return 8 + int.from_bytes(body[4:8], "little") > len(body)
    if body[4:12] in {b"ftypavif", b"ftypavis"}:
        return _last_box_end(body) > len(body)
    return False


def _last_box_end(body: bytes) -> int:
    """Where the last box that begins in `body` ends; AVIF is a sequence of boxes with lengths."""
    end = 0
    while end <= len(body) - 8:
        length = int.from_bytes(body[end : end + 4], "big")
        if length < 8:
            return 0  # it extends to the end of the file, or has a 64-bit length elsewhere
        end += length
    return end
