"""Predicates on the pixels of stored images; the paper uses none of them.

A predicate gets uint8 RGB pixels [height, width, 3], upright and resized to the stored size, before
they are encoded. The array is read-only. Statistics are computed in integers, so that they are the
same on every processor.
"""

import math
from typing import Annotated

import numpy as np
from pydantic import Field

from pmd_pipeline.contract.image_format import Pixels

Level = Annotated[float, Field(ge=0, le=255)]
Share = Annotated[float, Field(ge=0, le=1)]


def has_detail(pixels: Pixels, *, least: Level) -> bool:
    """Keep images whose luma has a standard deviation of at least `least`.

    Luma is that of Rec. 601, rounded to 0..255. Blank images and plain placeholders are below 5;
    photographs are mostly above 30.

    >>> has_detail(np.full((8, 8, 3), 200, np.uint8), least=1.0)
    False
    """
    luma = (pixels.astype(np.uint32) @ np.array([299, 587, 114], np.uint32) + 500) // 1000
    counts = [int(count) for count in np.bincount(luma.ravel())]
    num_pixels = sum(counts)
    total = sum(level * count for level, count in enumerate(counts))
    squares = sum(level * level * count for level, count in enumerate(counts))
    return math.sqrt(num_pixels * squares - total * total) >= least * num_pixels


def fills_frame(pixels: Pixels, *, most: Share = 0.1, tolerance: Level = 4) -> bool:
    """Keep images with uniform bars on at most the share `most` of their height and of their width.

    A bar is a row or column at an edge whose levels differ by at most `tolerance` in each colour
    channel: letterbox bars, scanned margins, product photographs on white.

    >>> bars = np.zeros((10, 10, 3), np.uint8)
    >>> bars[3:7, :, 1] = np.arange(0, 200, 20)
    >>> fills_frame(bars, most=0.5), fills_frame(bars, most=0.6)
    (False, True)
    """
    rows = np.ptp(pixels, axis=1).max(axis=1) <= tolerance
    columns = np.ptp(pixels, axis=0).max(axis=1) <= tolerance
    return all(_num_at_ends(lines) <= most * len(lines) for lines in (rows, columns))


def _num_at_ends(is_uniform: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> int:
    """Uniform lines before the first and after the last one that is not."""
    varied = np.flatnonzero(~is_uniform)
    if not len(varied):
        return len(is_uniform)
    return int(varied[0]) + len(is_uniform) - 1 - int(varied[-1])
