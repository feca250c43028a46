"""Stored images to pixels: decoded, cropped to a box, resized."""

import math

import numpy as np
import simplejpeg
from PIL import Image

from flava_train.shapes import Array, UInt
from pmd_pipeline.contract.boxes import Box
from pmd_pipeline.contract.image_format import JPEG, decode_stored, stored_format

MAX_PIXELS = 1 << 28
"""Pixels of the largest image that is decoded; the pipeline stores none that is larger."""


def decode_rgb(content: bytes, stored_size: tuple[int, int]) -> Image.Image:
    """The stored image as RGB.

    Args:
        content: JPEG or WebP, as it lies in the shard.
        stored_size: width and height that the ledger states.

    Raises:
        ValueError: it cannot be decoded, or has another size.
    """
    width, height = stored_size
    if width * height > MAX_PIXELS:
        raise ValueError(f"has {width} x {height} pixels")
    if stored_format(content) is JPEG:
        try:
            if simplejpeg.decode_jpeg_header(content)[:2] == (height, width):
                return Image.fromarray(simplejpeg.decode_jpeg(content, colorspace="RGB"))
        except ValueError:
            pass  # it refuses what Pillow accepts, such as stray bytes before the end
    return decode_stored(content, stored_size)


def resized_crop(image: Image.Image, box: Box, size: int) -> UInt[Array, "3 {size} {size}"]:
    """Red, green and blue of a crop, resized to a square by bicubic interpolation.

    The values are those of Pillow's `image.resize((size, size), BICUBIC, box)`.

    Args:
        image: RGB.
        box: as fractions of the image; its sides need not be whole pixels.
        size: of the square, in pixels.
    """
    x0, y0, x1, y1 = box
    sides = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=sides)
    # Pillow separates the colours of a line in less time than numpy those of pixels
    lines = np.frombuffer(resized.tobytes("raw", "RGB;L"), np.uint8).reshape(size, 3, size)
    return lines.transpose(1, 0, 2)


def crop_image(image: Image.Image, box: Box) -> Image.Image:
    """The smallest rectangle of whole pixels that contains `box`."""
    x0, y0, x1, y1 = box
    left, top = math.floor(x0 * image.width), math.floor(y0 * image.height)
    right, bottom = math.ceil(x1 * image.width), math.ceil(y1 * image.height)
    return image.crop((left, top, right, bottom))
