"""A JPEG of a shard to the pixels of one view."""

import numpy as np
import simplejpeg
from PIL import Image

from flava_train.ledgers import Box
from flava_train.shapes import Array, Shaped

MOST_PIXELS = 1 << 28
"""Of an image that is decoded: no shard of ours has larger ones."""


def view(
    jpeg: bytes, box: Box, size: int, stored: tuple[int, int]
) -> Shaped[Array, "{size} {size} 3"]:
    """The pixels within `box`, made `size` by `size`, by bicubic interpolation.

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
    height, width = simplejpeg.decode_jpeg_header(jpeg)[:2]
    if (width, height) != stored or width * height > MOST_PIXELS:
        raise ValueError(f"it is {width} x {height} pixels")
    pixels = simplejpeg.decode_jpeg(jpeg, colorspace="RGB")
    x0, y0, x1, y1 = box
    sides = (x0 * width, y0 * height, x1 * width, y1 * height)
    made = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=sides)
    return np.asarray(made)
