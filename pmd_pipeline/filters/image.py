"""Predicates on the size of an image, which run before its pixels are decoded.

The paper uses none of them.
"""

from typing import Annotated

from pydantic import Field

Size = tuple[int, int]
"""Width and height in pixels as fetched, after EXIF orientation."""


def is_large(size: Size, *, least: Annotated[int, Field(ge=0)]) -> bool:
    """Keep images whose shorter side is at least `least` pixels.

    >>> is_large((640, 200), least=200)
    True
    """
    return min(size) >= least


def is_compact(size: Size, *, most: Annotated[float, Field(ge=1)]) -> bool:
    """Keep images whose longer side is at most `most` times the shorter.

    >>> is_compact((900, 200), most=3.0)
    False
    """
    return max(size) <= most * min(size)
