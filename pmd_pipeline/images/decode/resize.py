"""Target sizes, and downsampling by OpenCV.

All operations here give the same bits on every processor. OpenCV's cubic resize does not, so it is
not used.
"""

import cv2
import numpy as np

from pmd_pipeline.contract.image_format import Pixels
from pmd_pipeline.recipe import Images

_BLUR, _SHARPEN = 0.4, 0.5
"""Standard deviation of the blur before sampling, in pixels of the target, and the share of the
detail lost to blur and bilinear sampling that is restored. Both are exact in binary, so that every
processor rounds alike."""

_COARSE_BLUR, _COARSE_SHARPEN = 0.45, 0.875
"""The same where a scaled decode has left less than `_FINE` times the pixels of the target."""

_FINE = 1.75
_UNSHARP_SIGMA = 0.8
"""Standard deviation of the blur of the unsharp mask."""

_RETAINED_BYTES = 4 << 20
"""Bytes of memory that the allocator keeps between one image and the next."""

cv2.setNumThreads(1)  # tasks already use all cores

# glibc maps every block larger than the largest block freed so far anew, and page faults cost more
# than resizing; freeing one large block here raises that threshold
np.empty(_RETAINED_BYTES, np.uint8)


def target_size(size: tuple[int, int], rules: Images) -> tuple[int, int]:
    """The stored width and height of an image of `size`.

    >>> target_size((1024, 768), Images(size=256, mode="shorter"))
    (341, 256)
    """
    if rules.mode == "none":
        return size
    side = min(size) if rules.mode == "shorter" else max(size)
    if side <= rules.size:
        return size
    width, height = (max(1, round(one * rules.size / side)) for one in size)
    return width, height


def downsample(
    pixels: Pixels, size: tuple[int, int], scale: int, target: tuple[int, int]
) -> Pixels:
    """Resample pixels that were decoded at 1/`scale` of an image of `size` to `target`.

    Where `scale` does not divide the size, the last row and column of `pixels` lie partly outside
    the image.
    """
    across, down = (one / scale / side for one, side in zip(size, target, strict=True))
    is_coarse = scale > 1 and min(across, down) < _FINE
    blur, sharpen = (_COARSE_BLUR, _COARSE_SHARPEN) if is_coarse else (_BLUR, _SHARPEN)
    blurred = cv2.GaussianBlur(
        pixels,
        (_kernel_size(across), _kernel_size(down)),
        sigmaX=blur * across,
        sigmaY=blur * down,
        borderType=cv2.BORDER_REPLICATE,
    )
    # with a scale in place of a size, OpenCV ignores the pixels outside the image
    sampled = cv2.resize(blurred, None, fx=1 / across, fy=1 / down, interpolation=cv2.INTER_LINEAR)
    sampled = sampled[: target[1], : target[0]]
    soft = cv2.GaussianBlur(sampled, (3, 3), sigmaX=_UNSHARP_SIGMA, borderType=cv2.BORDER_REPLICATE)
    sharp = cv2.addWeighted(sampled, 1 + sharpen, soft, -sharpen, 0)
    return np.asarray(sharp, dtype=np.uint8)


def _kernel_size(ratio: float) -> int:
    """Width of the blur kernel for sampling at `ratio`: the smallest that loses no quality."""
    return 3 + 2 * int(ratio / 2.4)
