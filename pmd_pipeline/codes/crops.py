"""The boxes of an image's views: the whole, then one for each caption, or some drawn ones."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pmd_pipeline.contract.boxes import WHOLE_IMAGE

_LEAST_AREA = 0.9
_FLATTEST = 4 / 3
"""Width by height, or height by width, of the longest drawn view."""


def crop_boxes(
    key: str,
    size: tuple[int, int],
    captioned: Sequence[Sequence[float]],
    views: int,
    seed: int,
) -> NDArray[np.float32]:
    """The boxes [v, 4] of one image: `x0, y0, x1, y1` as fractions.

    Args:
        key: of the record, 16 hex digits; it and `seed` alone decide what is drawn.
        size: width and height in pixels.
        captioned: the box of each caption. Where there are any, nothing is drawn.
        views: of an image without them, the whole included.
    """
    if captioned:
        return np.array([WHOLE_IMAGE, *captioned], dtype=np.float32)
    dice = _uniform(seed, int(key, 16), 4 * (views - 1))
    drawn = [_drawn(size, *dice[start : start + 4]) for start in range(0, len(dice), 4)]
    return np.array([WHOLE_IMAGE, *drawn], dtype=np.float32)


def _drawn(
    size: tuple[int, int], area: float, ratio: float, left: float, top: float
) -> tuple[float, ...]:
    """A box from four numbers in [0, 1): what torchvision's RandomResizedCrop tries ten times for.

    Area and ratio are drawn from what fits the image. One too long for any view of nine tenths gets
    the largest of the nearest ratio, somewhere along it, where torchvision has but its middle.
    """
    long = size[0] / size[1]
    most = min(1.0, _FLATTEST / long, _FLATTEST * long)
    share = most - (1 - area) * max(0.0, most - _LEAST_AREA)
    flat = math.log(max(1 / _FLATTEST, share * long))
    wide = max(flat, math.log(min(_FLATTEST, long / share)))
    ratio = math.exp(flat + ratio * (wide - flat))
    width = min(1.0, math.sqrt(share * ratio / long))
    height = min(1.0, math.sqrt(share * long / ratio))
    x, y = left * (1 - width), top * (1 - height)
    return x, y, min(1.0, x + width), min(1.0, y + height)


def _uniform(seed: int, number: int, count: int) -> list[float]:
    """Numbers in [0, 1) from (seed, number), by raw bits: numpy promises those to stay the same."""
    raw = np.random.Philox(key=np.array([seed, number], dtype=np.uint64)).random_raw(count)
    return [(bits >> 11) * 2.0**-53 for bits in raw.tolist()]
