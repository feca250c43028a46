"""Boxes of regions: `x0, y0, x1, y1` as fractions of the stored image."""

import math
import struct

Box = tuple[float, float, float, float]
"""`x0, y0, x1, y1` as fractions of the stored image."""

WHOLE_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)


def is_box(value: object) -> bool:
    """Whether `value` is four finite numbers that bound an area inside the image.

    The area must remain when the sides are rounded to float32, as which image codes store them.

    >>> is_box([0, 0.25, 1, 1]), is_box([0.5, 0, 0.5, 1]), is_box([0, 0, 1, "1"])
    (True, False, False)
    """
    if not isinstance(value, list | tuple) or len(value) != 4:
        return False
    if not all(isinstance(side, int | float) and not isinstance(side, bool) for side in value):
        return False
    try:
        x0, y0, x1, y1 = struct.unpack("4f", struct.pack("4f", *value))
    except (OverflowError, struct.error):  # beyond float32
        return False
    return all(map(math.isfinite, (x0, y0, x1, y1))) and 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


def are_boxes(value: object, count: int) -> bool:
    """Whether `value` is a list of `count` boxes."""
    return isinstance(value, list | tuple) and len(value) == count and all(map(is_box, value))
