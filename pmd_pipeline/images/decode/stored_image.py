"""The image that goes into a shard: resized by the recipe's rule and encoded, or kept as it is."""

from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.image_format import FORMATS, JPEG, WEBP, ImageFormat, Pixels
from pmd_pipeline.images.decode.decoder import (
    check_jpeg,
    decode_resized,
    is_upright_jpeg,
    upright_size,
)
from pmd_pipeline.images.decode.jpeg import encode_jpeg
from pmd_pipeline.images.decode.resize import target_size
from pmd_pipeline.images.decode.webp import encode_webp
from pmd_pipeline.recipe import Images

_MAX_METADATA_BYTES = 1 << 16
"""Bytes of a JPEG above those of its raw pixels up to which it is kept: profiles, thumbnails."""


@dataclass(frozen=True)
class StoredImage:
    """An encoded image with its size in pixels."""

    content: bytes
    format: ImageFormat
    width: int
    height: int


class ResizedImage:
    """An image at its stored size, whose pixels are decoded on first use.

    Raises:
        RecordError: `bomb`, if the format cannot hold that size.
    """

    def __init__(self, body: bytes, image: Image.Image, rules: Images) -> None:
        self._body = body
        self._image = image
        self._rules = rules
        self._format = FORMATS[rules.format]
        original = upright_size(image)
        self.size = target_size(original, rules)
        width, height = self.size
        if max(self.size) > self._format.max_side:
            name = self._format.name.upper()
            raise RecordError("bomb", f"{width} x {height} pixels are more than a {name} can have")
        self._keeps_bytes = self.size == original and self._format == JPEG and self._is_storable()

    @cached_property
    def pixels(self) -> Pixels:
        """The upright pixels, read-only.

        Raises:
            RecordError: `truncated`, `not_an_image`.
        """
        pixels = decode_resized(self._body, self._image, self.size, fast=self._rules.fast)
        pixels.flags.writeable = False
        return pixels

    def encode(self) -> StoredImage:
        """The image to store.

        Raises:
            RecordError: `truncated`, `not_an_image`.
        """
        if not self._keeps_bytes:
            encode = encode_webp if self._format == WEBP else encode_jpeg
            content = encode(self.pixels, self._rules.quality)
        else:
            content = self._body
            if "pixels" not in vars(self):  # otherwise they have been decoded to the end
                check_jpeg(self._body, self._image)
        return StoredImage(content, self._format, *self.size)

    def _is_storable(self) -> bool:
        """True if the bytes may be stored as they are, provided that they decode."""
        num_values = 3 * self._image.width * self._image.height
        return is_upright_jpeg(self._image) and len(self._body) <= num_values + _MAX_METADATA_BYTES


def make_stored_image(body: bytes, image: Image.Image, rules: Images) -> StoredImage:
    """The image to store: downsampled by the recipe's rule, never enlarged.

    Where the format is JPEG, an upright 8-bit JPEG within the limits keeps its bytes after a
    complete decode, unless most of them are not pixels.

    Raises:
        RecordError: `truncated`, `not_an_image`, `bomb`.
    """
    return ResizedImage(body, image, rules).encode()
