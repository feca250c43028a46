from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tiny_datasets import jpeg, webp

from flava_train.data.pixels import crop_image, decode_rgb, resized_crop
from pmd_pipeline.contract.boxes import WHOLE_IMAGE

SIZE = (48, 40)


@pytest.mark.parametrize("box", [WHOLE_IMAGE, (0.11, 0.2, 0.73, 0.99), (0.5, 0.5, 0.51, 0.505)])
def test_a_crop_has_the_pixels_that_pillow_gives(box):
    image = decode_rgb(jpeg(3), SIZE)
    sides = tuple(side * length for side, length in zip(box, SIZE * 2, strict=True))

    crop = resized_crop(image, box, 32)

    expected = image.resize((32, 32), Image.Resampling.BICUBIC, box=sides)
    assert np.array_equal(crop.transpose(1, 2, 0), np.asarray(expected))


def test_jpeg_and_lossless_webp_decode_to_the_same_pixels():
    images = [np.asarray(decode_rgb(content, SIZE)) for content in (jpeg(1), webp(1))]

    assert np.array_equal(*images)
    assert np.array_equal(images[0], np.asarray(Image.open(BytesIO(jpeg(1)))))


@pytest.mark.parametrize("content", [jpeg(1), webp(1)])
def test_an_image_of_another_size_is_refused(content):
    with pytest.raises(ValueError, match="48 x 40 pixels"):
        decode_rgb(content, (40, 48))


@pytest.mark.parametrize("content", [webp(1)[:60], webp(1)[:16], b"GIF89a" + bytes(50)])
def test_what_cannot_be_decoded_is_a_value_error(content):
    with pytest.raises(ValueError):
        decode_rgb(content, SIZE)


def test_an_image_with_too_many_pixels_is_a_value_error(monkeypatch):
    with pytest.raises(ValueError, match="1000000 x 1000000 pixels"):
        decode_rgb(jpeg(1), (10**6, 10**6))
    content = webp(1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_rgb(content, SIZE)


def test_a_region_of_less_than_a_pixel_is_a_pixel():
    crop = crop_image(decode_rgb(jpeg(1), SIZE), (0.501, 0.501, 0.502, 0.502))

    assert crop.size == (1, 1)
