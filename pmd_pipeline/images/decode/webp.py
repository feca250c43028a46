"""WebP by libwebp, through Pillow."""

from io import BytesIO

from PIL import Image

from pmd_pipeline.contract.image_format import WEBP, Pixels

_METHOD = 4
"""libwebp's effort, 0 to 6; fixed, because it shapes the bytes."""


def encode_webp(pixels: Pixels, quality: int) -> bytes:
    """A lossy WebP without metadata."""
    out = BytesIO()
    image = Image.fromarray(pixels)
    image.save(out, WEBP.pillow, quality=quality, method=_METHOD, lossless=False, exact=True)
    return out.getvalue()
