"""JPEG to pixels, pixels made smaller, pixels to JPEG: the costly part, without the interpreter.

Nothing here depends on the processor: OpenCV's cubic resize does, so it is not used.
"""

import cv2
import numpy as np
import simplejpeg

from pmd_pipeline.contract.errors import RecordError

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
"""Rows, columns, and red, green, blue."""

_COARSEST = 8
"""libjpeg decodes to a half, a quarter or an eighth for less; the fractions between look worse."""

_BLUR, _SHARPEN = 0.4, 0.5
"""Standard deviation of the blur before sampling, in pixels of the picture to be made, and how much
of what blur and bilinear sampling took is given back. Exact in binary, so that every processor
rounds it alike."""

_COARSE_BLUR, _COARSE_SHARPEN = 0.45, 0.875
"""The same where a coarse decode has left less than `_FINE` times the target's pixels."""

_FINE = 1.75
_SOFT = 0.8
"""Standard deviation of the blur that shows what is to be given back."""

_KEPT = 4 << 20
"""Bytes of memory that are not given back to the system between one image and the next."""

cv2.setNumThreads(1)  # tasks are spread over the cores already

# glibc asks the system anew for every block larger than the largest it has seen freed, and fresh
# pages cost more than resizing; this shows it one
np.empty(_KEPT, np.uint8)


def jpeg_pixels(
    body: bytes, size: tuple[int, int], target: tuple[int, int], *, margin: float
) -> Pixels | None:
    """The pixels of a JPEG of `size` (width, height), made smaller to `target`.

    The JPEG is decoded to the smallest of 1, 1/2, 1/4 and 1/8 of its size that has at least
    `margin` times the pixels of `target` across and down.

    Returns:
        None if the decoder has doubts, which are for a more patient one to judge.

    Raises:
        RecordError: `truncated`.
    """
    part = _COARSEST
    while part > 1 and any(
        one < part * margin * wanted for one, wanted in zip(size, target, strict=True)
    ):
        part //= 2
    pixels = _decoded(body, size, "RGB", part)
    if pixels is None or size == target:
        return pixels
    return _made_smaller(pixels, size, part, target)


def is_whole(body: bytes, size: tuple[int, int]) -> bool:
    """Say whether a JPEG decodes to its end without any doubt.

    Every coefficient is read, and hardly a pixel made of them.

    Raises:
        RecordError: `truncated`.
    """
    return _decoded(body, size, "GRAY", _COARSEST) is not None


def jpeg(pixels: Pixels, quality: int) -> bytes:
    """The pixels as a plain JPEG with half as many colours across and down."""
    whole = np.ascontiguousarray(pixels)
    return bytes(simplejpeg.encode_jpeg(whole, quality, "RGB", "420"))


def _decoded(body: bytes, size: tuple[int, int], colours: str, part: int) -> Pixels | None:
    width, height = size
    rows, columns = -(-height // part), -(-width // part)
    try:
        if simplejpeg.decode_jpeg_header(body)[:2] != (height, width):
            return None  # Pillow saw another size in it, whose number of pixels was checked
        pixels: Pixels = simplejpeg.decode_jpeg(
            body, colours, fastupsample=True, min_height=rows, min_width=columns
        )
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise RecordError("truncated", "the image ends early") from error
        return None
    return pixels if pixels.shape[:2] == (rows, columns) else None


def _made_smaller(
    pixels: Pixels, size: tuple[int, int], part: int, target: tuple[int, int]
) -> Pixels:
    """Pixels that are each `part` of those of the image of `size`, resampled to `target`.

    Where `part` does not divide the size, the last of them lie partly outside of the picture.
    """
    across, down = (one / part / wanted for one, wanted in zip(size, target, strict=True))
    is_coarse = part > 1 and min(across, down) < _FINE
    blur, sharpen = (_COARSE_BLUR, _COARSE_SHARPEN) if is_coarse else (_BLUR, _SHARPEN)
    blurred = cv2.GaussianBlur(
        pixels,
        (_taps(across), _taps(down)),
        sigmaX=blur * across,
        sigmaY=blur * down,
        borderType=cv2.BORDER_REPLICATE,
    )
    # told the scale instead of the size, OpenCV samples the picture and not what lies outside
    sampled = cv2.resize(blurred, None, fx=1 / across, fy=1 / down, interpolation=cv2.INTER_LINEAR)
    sampled = sampled[: target[1], : target[0]]
    soft = cv2.GaussianBlur(sampled, (3, 3), sigmaX=_SOFT, borderType=cv2.BORDER_REPLICATE)
    sharp = cv2.addWeighted(sampled, 1 + sharpen, soft, -sharpen, 0)
    return np.asarray(sharp, dtype=np.uint8)


def _taps(ratio: float) -> int:
    """How many pixels the blur before sampling at `ratio` takes in: as few as do no harm."""
    return 3 + 2 * int(ratio / 2.4)
