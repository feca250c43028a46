"""The format of stored images: the only module that knows extensions, MIME types and decoders."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.suggestions import suggestion

Pixels: TypeAlias = NDArray[np.uint8]
"""Pixels of an image: uint8 [height, width, 3], RGB."""

FormatName: TypeAlias = Literal["jpeg", "webp"]


@dataclass(frozen=True)
class ImageFormat:
    """A format in which shards store images.

    Args:
        name: as recipes call it.
        extension: of the tar member, without a dot.
        mime: MIME type.
        pillow: Pillow's name of the decoder.
        max_side: pixels that the format allows along one side.
    """

    name: FormatName
    extension: str
    mime: str
    pillow: str
    max_side: int


JPEG = ImageFormat("jpeg", "jpg", "image/jpeg", "JPEG", 65_500)
WEBP = ImageFormat("webp", "webp", "image/webp", "WEBP", 16_383)

FORMATS: Mapping[str, ImageFormat] = {one.name: one for one in (JPEG, WEBP)}
EXTENSIONS = frozenset(one.extension for one in FORMATS.values())
"""Extensions of the tar members that hold images."""


def stored_format(content: bytes) -> ImageFormat | None:
    """The format of a stored image by its first bytes; None where it is none of `FORMATS`."""
    if content.startswith(b"\xff\xd8\xff"):
        return JPEG
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return WEBP
    return None


def format_in_rules(rules: Mapping[str, Any]) -> ImageFormat:
    """The format in which a source with these rules stores images; JPEG if they state none.

    Raises:
        PmdError: this version does not have the format.
    """
    images = rules.get("images")
    name = images.get("format", JPEG.name) if isinstance(images, Mapping) else JPEG.name
    if not isinstance(name, str) or name not in FORMATS:
        raise PmdError(f"there is no image format {name!r}; {suggestion(str(name), FORMATS)}")
    return FORMATS[name]


DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, MemoryError, OverflowError,
    struct.error, Image.DecompressionBombError,
)  # fmt: skip
"""Errors that Pillow's decoders raise on hostile bytes."""


def decode_stored(content: bytes, size: tuple[int, int]) -> Image.Image:
    """The stored image in `content` as RGB.

    Args:
        content: in one of `FORMATS`.
        size: expected width and height in pixels.

    Raises:
        ValueError: it cannot be decoded, or has another size.
    """
    try:
        image = open_stored(content)
        if image.size == size:
            return image.convert("RGB")
    except DECODER_ERRORS as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    raise ValueError(f"has {image.width} x {image.height} pixels")


def open_stored(content: bytes) -> Image.Image:
    """The stored image in `content`, its header read and its pixels not yet.

    No decoder besides those of `FORMATS` sees the bytes.

    Raises:
        OSError: it is in none of `FORMATS`. Pillow raises further errors on broken bytes.
    """
    stored = stored_format(content)
    if stored is None:
        raise OSError(f"neither {' nor '.join(FORMATS)}")
    return Image.open(BytesIO(content), formats=(stored.pillow,))
