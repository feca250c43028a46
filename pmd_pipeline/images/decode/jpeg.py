"""JPEG by libjpeg-turbo without Pillow: decode at a scale, check for completeness, encode."""

import numpy as np
import simplejpeg

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.image_format import Pixels

SMALLEST_SCALE = 8
"""libjpeg decodes to 1/2, 1/4 or 1/8 at less cost; the fractions between look worse."""


def decode_jpeg(body: bytes, size: tuple[int, int], scale: int = 1) -> Pixels | None:
    """The RGB pixels of a JPEG at 1/`scale` of its `size` (width, height), rounded up.

    Returns:
        None if the decoder reports a problem; Pillow may still decode the image.

    Raises:
        RecordError: `truncated`.
    """
    return _decode(body, size, "RGB", scale)


def decodes_cleanly(body: bytes, size: tuple[int, int]) -> bool:
    """True if the decoder reads a JPEG to its end without a warning.

    Every coefficient is read, but few pixels are computed.

    Raises:
        RecordError: `truncated`.
    """
    return _decode(body, size, "GRAY", SMALLEST_SCALE) is not None


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """A baseline JPEG with 4:2:0 chroma subsampling and without metadata."""
    contiguous = np.ascontiguousarray(pixels)
    return bytes(simplejpeg.encode_jpeg(contiguous, quality, "RGB", "420"))


def _decode(body: bytes, size: tuple[int, int], colour_space: str, scale: int) -> Pixels | None:
    width, height = size
    rows, columns = -(-height // scale), -(-width // scale)
    try:
        if simplejpeg.decode_jpeg_header(body)[:2] != (height, width):
            return None  # Pillow read another size, and that one was checked against the limits
        pixels: Pixels = simplejpeg.decode_jpeg(
            body, colour_space, fastupsample=True, min_height=rows, min_width=columns
        )
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise RecordError("truncated", "the image ends early") from error
        return None
    return pixels if pixels.shape[:2] == (rows, columns) else None
