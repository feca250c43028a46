"""Boxes of an image's crops: the whole image, then the captions' boxes or random ones."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pmd_pipeline.contract.boxes import WHOLE_IMAGE

_MIN_AREA = 0.9
_MAX_ASPECT_RATIO = 4 / 3
"""Width by height, or height by width, of a random crop."""


def crop_boxes(
    key: str,
    size: tuple[int, int],
    captioned: Sequence[Sequence[float]],
    crops: int,
    seed: int,
) -> NDArray[np.float32]:
    """The boxes [v, 4] of one image's crops: `x0, y0, x1, y1` as fractions.

    Args:
        key: of the record, 16 hex digits; random boxes depend on it and `seed` alone.
        size: width and height in pixels.
        captioned: the box of each caption. Where there are any, none is random.
        crops: of an image without them, the whole image included.
    """
    if captioned:
        return np.array([WHOLE_IMAGE, *captioned], dtype=np.float32)
    numbers = _uniform(seed, int(key, 16), 4 * (crops - 1))
    boxes = [_random_box(size, *numbers[start : start + 4]) for start in range(0, len(numbers), 4)]
    return np.array([WHOLE_IMAGE, *boxes], dtype=np.float32)


def _random_box(
    size: tuple[int, int], area: float, ratio: float, left: float, top: float
) -> tuple[float, ...]:
    """A box from four numbers in [0, 1), distributed as torchvision's RandomResizedCrop intends.

    Area and aspect ratio are drawn from those that fit the image, so one draw is enough. An image
    too long for any crop of `_MIN_AREA` gets the largest crop of the nearest ratio at a random
    place, where torchvision takes the centre.
    """
    image_ratio = size[0] / size[1]
    most = min(1.0, _MAX_ASPECT_RATIO / image_ratio, _MAX_ASPECT_RATIO * image_ratio)
    share = most - (1 - area) * max(0.0, most - _MIN_AREA)
    low = math.log(max(1 / _MAX_ASPECT_RATIO, share * image_ratio))
    high = max(low, math.log(min(_MAX_ASPECT_RATIO, image_ratio / share)))
    ratio = math.exp(low + ratio * (high - low))
    width = min(1.0, math.sqrt(share * ratio / image_ratio))
    height = min(1.0, math.sqrt(share * image_ratio / ratio))
    x, y = left * (1 - width), top * (1 - height)
    return x, y, min(1.0, x + width), min(1.0, y + height)


def _uniform(seed: int, number: int, count: int) -> list[float]:
    """Numbers in [0, 1) from (seed, number), by raw bits, which numpy promises not to change."""
    raw = np.random.Philox(key=np.array([seed, number], dtype=np.uint64)).random_raw(count)
    return [(bits >> 11) * 2.0**-53 for bits in raw.tolist()]
