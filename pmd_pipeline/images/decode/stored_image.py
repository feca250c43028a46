"""The image that goes into a shard: resized by the recipe's rule and encoded, or kept as it is."""

from dataclasses import dataclass

from PIL import Image

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.image_format import JPEG
from pmd_pipeline.images.decode.decoder import (
    check_jpeg,
    decode_resized,
    is_upright_jpeg,
    upright_size,
)
from pmd_pipeline.images.decode.jpeg import encode_jpeg
from pmd_pipeline.images.decode.resize import target_size
from pmd_pipeline.recipe import Images

_MAX_METADATA_BYTES = 1 << 16
"""Bytes of a JPEG above those of its raw pixels up to which it is kept: profiles, thumbnails."""


@dataclass(frozen=True)
class StoredImage:
    """An encoded image with its size in pixels, and the size before resizing (EXIF applied)."""

    content: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def make_stored_image(body: bytes, image: Image.Image, rules: Images) -> StoredImage:
    """The image to store: downsampled by the recipe's rule, never enlarged.

    An upright 8-bit JPEG within the limits keeps its bytes after a complete decode, unless most of
    them are not pixels.

    Raises:
        RecordError: `truncated`, `not_an_image`, `bomb`.
    """
    original = upright_size(image)
    target = target_size(original, rules)
    if max(target) > JPEG.max_side:
        raise RecordError("bomb", f"{target[0]} x {target[1]} pixels are more than a JPEG can have")
    if target == original and _can_be_kept(image, body):
        check_jpeg(body, image)
        return StoredImage(body, *original, *original)
    pixels = decode_resized(body, image, target, fast=rules.fast)
    return StoredImage(encode_jpeg(pixels, rules.quality), *target, *original)


def _can_be_kept(image: Image.Image, body: bytes) -> bool:
    """True if the bytes may be stored as they are, provided that they decode."""
    return (
        is_upright_jpeg(image) and len(body) <= 3 * image.width * image.height + _MAX_METADATA_BYTES
    )
