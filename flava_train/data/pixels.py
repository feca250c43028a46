"""A JPEG of a shard to the pixels of one view."""

import struct
from io import BytesIO

import numpy as np
import simplejpeg
from PIL import Image

from flava_train.shapes import Array, UInt
from pmd_pipeline.contract.boxes import Box

MOST_PIXELS = 1 << 28
"""Of an image that is decoded: no shard of ours has larger ones."""

_BROKEN = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error)
"""What Pillow's decoder is known to raise on hostile bytes."""


def crop_pixels(
    jpeg: bytes, box: Box, size: int, stored: tuple[int, int]
) -> UInt[Array, "3 {size} {size}"]:
    """Red, green and blue within `box`, made `size` by `size` by bicubic interpolation.

    The same as Pillow's `image.resize((size, size), BICUBIC, box)` of the image decoded by Pillow
    and turned to RGB, for less.

    Args:
        jpeg: as it lies in the shard.
        box: as fractions.
        size: of the square.
        stored: width and height that the ledger tells.

    Raises:
        ValueError: it does not decode, or is not of the size `stored`.
    """
    width, height = stored
    image = _decoded(jpeg, stored)
    x0, y0, x1, y1 = box
    sides = (x0 * width, y0 * height, x1 * width, y1 * height)
    made = image.resize((size, size), Image.Resampling.BICUBIC, box=sides)
    # Pillow takes colours apart line by line, for less than numpy takes pixels apart
    lines = np.frombuffer(made.tobytes("raw", "RGB;L"), np.uint8).reshape(size, 3, size)
    return lines.transpose(1, 0, 2)


def _decoded(jpeg: bytes, stored: tuple[int, int]) -> Image.Image:
    try:
        height, width = simplejpeg.decode_jpeg_header(jpeg)[:2]
        if (width, height) == stored and width * height <= MOST_PIXELS:
            return Image.fromarray(simplejpeg.decode_jpeg(jpeg, colorspace="RGB"))
    except ValueError:
        pass  # it has doubts, say about stray bytes; Pillow is more patient
    try:
        image = Image.open(BytesIO(jpeg), formats=["JPEG"])
        if image.size != stored or image.width * image.height > MOST_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        return image.convert("RGB")
    except _BROKEN as error:
        raise ValueError(str(error)) from error
