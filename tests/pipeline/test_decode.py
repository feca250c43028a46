"""Decoding, resizing and encoding: drawn images in every format, and photographs if present."""

import contextlib
import gzip
import io
import struct
import subprocess
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin
from source_helpers import SAMPLES

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.image_format import JPEG
from pmd_pipeline.contract.reasons import FAILURE_REASONS
from pmd_pipeline.images.decode.decoder import ACCEPTED_FORMATS, open_image, upright_size
from pmd_pipeline.images.decode.resize import target_size
from pmd_pipeline.images.decode.stored_image import make_stored_image
from pmd_pipeline.recipe import Images

PHOTOGRAPHS = sorted((SAMPLES / "coco" / "mini" / "train2017").glob("*.jpg"))[:12]
SMALL = Images(size=32)

# pytest's own filters come before those of the module
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::UserWarning:PIL.{module}")
    for module in ("Image", "JpegImagePlugin", "PngImagePlugin", "TiffImagePlugin")
]


def scene(width=60, height=40):
    """A smooth image with a bright corner, so that every rotation of it differs."""
    across, down = np.linspace(0, 200, width), np.linspace(0, 200, height)
    red, green = np.meshgrid(across, down)
    pixels = np.stack([red, green, 0 * red + 60], axis=-1)
    pixels[: height // 4, : width // 4] = 255
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image, name="PNG", **options):
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


def stored(body, rules=SMALL):
    return make_stored_image(body, open_image(body, rules), rules)


def decoded(result):
    image = Image.open(io.BytesIO(result.content))
    assert image.size == (result.width, result.height)
    return np.asarray(image.convert("RGB")).astype(float)


def kind_of(body, rules=SMALL):
    with pytest.raises(RecordError) as caught:
        stored(body, rules)
    assert caught.value.kind in FAILURE_REASONS
    return caught.value.kind


def psnr(one, other):
    return 10 * np.log10(255**2 / np.mean((one - other) ** 2))


BODIES = {
    "JPEG": encoded(scene(), "JPEG", quality=95),
    "MPO": encoded(scene(), "MPO", save_all=True, append_images=[scene().rotate(180)], quality=95),
    "PNG": encoded(scene()),
    "WEBP": encoded(scene(), "WEBP", lossless=True),
    "GIF": encoded(scene().quantize(256), "GIF"),
    "BMP": encoded(scene(), "BMP"),
    "TIFF": encoded(scene(), "TIFF"),
    "AVIF": encoded(scene(), "AVIF", quality=95),
}


@pytest.mark.parametrize("name", [*ACCEPTED_FORMATS, "MPO"])
def test_every_accepted_format_is_decoded(name):
    body = BODIES[name]
    assert open_image(body, SMALL).format == name

    result = stored(body)

    assert (result.width, result.height) == (48, 32)
    assert upright_size(open_image(body, SMALL)) == (60, 40)
    expected = np.asarray(scene().resize((48, 32), Image.Resampling.LANCZOS)).astype(float)
    assert psnr(decoded(result), expected) > 25


def test_a_stored_image_is_a_jpeg_without_metadata():
    exif = Image.Exif()
    exif[0x013B] = "the name of somebody"
    for name in ("PNG", "WEBP", "TIFF"):
        image = Image.open(io.BytesIO(stored(encoded(scene(), name, exif=exif)).content))

        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_a_comment_is_not_stored_whatever_its_length():
    for comment in (b"hello", b"x" * 70_000):
        result = stored(encoded(scene().quantize(), "GIF", comment=comment))

        assert "comment" not in Image.open(io.BytesIO(result.content)).info


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_small_upright_jpeg_keeps_its_bytes(mode, progressive):
    body = encoded(scene(32, 20).convert(mode), "JPEG", quality=60, progressive=progressive)

    result = stored(body)

    assert result.content is body
    assert (result.width, result.height, result.format) == (32, 20, JPEG)


def test_a_truncated_small_jpeg_is_not_kept():
    body = encoded(scene(32, 20), "JPEG")

    open_image(body[:-20], SMALL)  # the header is complete
    assert kind_of(body[:-20]) == "truncated"


def test_a_small_jpeg_with_many_bytes_after_it_is_encoded_again():
    body = encoded(scene(32, 20), "JPEG") + bytes(1 << 20)

    assert len(stored(body).content) < 10_000


def test_a_small_image_of_another_format_or_mode_is_encoded_as_rgb_jpeg():
    for image in (scene(32, 20).convert("CMYK"), scene(32, 20)):
        body = encoded(image, "JPEG" if image.mode == "CMYK" else "PNG")

        assert Image.open(io.BytesIO(stored(body).content)).mode == "RGB"


def rotated(image, orientation):
    """The image as a camera in that orientation stores it: the inverse of EXIF's table."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's numbers of the operations
    return image.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else image


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encoded(rotated(scene(), orientation), name, exif=exif, quality=95)

    result = stored(body)

    assert upright_size(open_image(body, SMALL)) == (60, 40)
    assert (result.width, result.height) == (48, 32)
    expected = np.asarray(scene().resize((48, 32), Image.Resampling.LANCZOS)).astype(float)
    assert psnr(decoded(result), expected) > 25


@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_images_are_upright_after_a_scaled_decode(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encoded(rotated(scene(600, 400), orientation), "JPEG", exif=exif, quality=95)

    result = stored(body)

    expected = np.asarray(scene(600, 400).resize((48, 32), Image.Resampling.LANCZOS)).astype(float)
    assert psnr(decoded(result), expected) > 30


def test_a_rotated_jpeg_is_encoded_again():
    exif = Image.Exif()
    exif[0x0112] = 6
    body = encoded(scene(32, 20), "JPEG", exif=exif)

    result = stored(body)

    assert (result.width, result.height) == (20, 32)
    assert result.content != body


@pytest.mark.parametrize("value", [0, 9, 65_535])
def test_an_undefined_orientation_is_ignored(value):
    exif = Image.Exif()
    exif[0x0112] = value

    assert stored(encoded(scene(), exif=exif)).width == 48


def test_broken_exif_is_ignored():
    for exif in (b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9, b"not a header", b"II"):
        for name in ("JPEG", "PNG", "WEBP"):
            assert stored(encoded(scene(), name, exif=b"Exif\0\0" + exif)).width == 48


@pytest.mark.parametrize("depth", ["grey", "rgb"])
@pytest.mark.parametrize("side", [16, 64])
def test_sixteen_bits_become_eight_of_the_same_brightness(depth, side):
    rng = np.random.default_rng(7)
    shape = (side, side) if depth == "grey" else (side, side, 3)
    levels = rng.integers(0, 1 << 16, shape, dtype=np.uint16)

    result = stored(png_of(levels))

    assert decoded(result).mean() == pytest.approx(levels.mean() / 257, abs=1)


@pytest.mark.parametrize(
    "levels",
    [
        np.linspace(0, 65_535, 400).reshape(20, 20).astype(np.uint16),
        np.linspace(0, 65_535, 400).reshape(20, 20).astype(np.int32),
        np.linspace(0, 255, 400).reshape(20, 20).astype(np.int32),
        np.linspace(0, 1, 400).reshape(20, 20).astype(np.float32),
        np.linspace(0, 255, 400).reshape(20, 20).astype(np.float32),
    ],
    ids=["uint16", "int32", "int32 up to 255", "float up to 1", "float up to 255"],
)
def test_deep_tiffs_keep_their_brightness(levels):
    result = stored(encoded(Image.fromarray(levels), "TIFF"))

    assert decoded(result).mean() == pytest.approx(127.5, abs=1)


def test_nan_and_infinity_become_black():
    levels = np.full((20, 20), np.nan, dtype=np.float32)
    levels[0] = np.inf

    assert decoded(stored(encoded(Image.fromarray(levels), "TIFF"))).mean() == 0


def png_of(levels):
    """A PNG of 16-bit samples, which Pillow does not write in colour."""
    height, width = levels.shape[:2]
    colour = 0 if levels.ndim == 2 else 2
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, content) for name, content in chunks)


def chunk(name, content):
    length, check = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(name + content))
    return length + name + content + check


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparent_pixels_become_white(mode):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 20, 40))
    body = encoded(image.convert(mode), "TIFF" if mode == "PA" else "PNG")

    pixels = decoded(stored(body))

    assert pixels[:, 2:14].max() < 10
    assert pixels[:, 18:30].min() > 245


@pytest.mark.parametrize("transparent", [0, b"\0\xff", b"\0"])
def test_a_palette_may_have_transparent_entries(transparent):
    image = Image.new("P", (40, 40), 0)
    image.putpalette([0, 0, 0, 90, 90, 90])
    image.paste(1, (0, 0, 20, 40))

    pixels = decoded(stored(encoded(image, transparency=transparent)))

    assert abs(pixels[:, 2:14] - 90).max() < 10
    assert pixels[:, 18:30].min() > 245


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_a_grey_image_has_the_same_brightness_in_every_mode(mode):
    grey = Image.new("RGB", (40, 40), (255, 255, 255) if mode == "1" else (90, 90, 90))
    body = encoded(grey.convert(mode), "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG")

    assert decoded(stored(body)).mean() == pytest.approx(255 if mode == "1" else 90, abs=3)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_stored(name):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "green")]
    body = encoded(frames[0], name, save_all=True, append_images=frames[1:], duration=50)

    assert decoded(stored(body)).mean(axis=(0, 1)) == pytest.approx([255, 0, 0], abs=5)


@pytest.mark.parametrize(
    ("size", "rules", "target"),
    [
        ((1024, 768), Images(size=256, mode="shorter"), (341, 256)),
        ((768, 1024), Images(size=256, mode="shorter"), (256, 341)),
        ((1024, 768), Images(size=256, mode="longer"), (256, 192)),
        ((1024, 768), Images(size=256, mode="none"), (1024, 768)),
        ((1000, 200), Images(size=256, mode="shorter"), (1000, 200)),
        ((256, 256), Images(size=256), (256, 256)),
        ((10_000, 1), Images(size=256, mode="longer"), (256, 1)),
        ((1, 10_000), Images(size=256, mode="shorter"), (1, 10_000)),
        ((10_000, 300), Images(size=256, mode="shorter"), (8533, 256)),
    ],
)
def test_images_are_downsampled_and_never_enlarged(size, rules, target):
    assert target_size(size, rules) == target

    result = stored(encoded(Image.new("RGB", size, "red")), rules)

    assert (result.width, result.height) == target
    assert Image.open(io.BytesIO(result.content)).size == target


def test_a_side_longer_than_a_jpeg_can_have_is_refused():
    body = encoded(Image.new("1", (70_000, 2)))

    assert kind_of(body) == "bomb"
    assert stored(body, Images(size=256, mode="longer")).width == 256


@pytest.mark.parametrize(
    "body",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xef\xbb\xbf<?xml version='1.0'?>\n<!DOCTYPE svg PUBLIC '-//W3C//DTD SVG 1.1'>\n<SVG>",
        b"  \n<!-- made by <b>somebody</b> " + b"x" * 5000 + b"--><svg:svg>",
        "<?xml version='1.0' encoding='utf-16'?><svg/>".encode("utf-16"),
        gzip.compress(b"<?xml version='1.0'?><svg/>", mtime=0),
        gzip.compress(b"<svg>" + bytes(1 << 20), mtime=0)[:800],
    ],
)
def test_an_svg_is_reported_as_svg(body):
    assert kind_of(body) == "svg"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0",
        b"\xff\xfe",
        b"\x1f\x8b",
        b"not found",
        b"<!doctype html><html><body><svg></svg></body></html>",
        b"<?xml version='1.0'?><rss/>",
        gzip.compress(b"<html/>", mtime=0),
        b"%PDF-1.7",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + bytes(99),
        b"\x89PNG\r\n\x1a\nIEND",
        b"P6 2 2 255\n" + bytes(12),
    ],
)
def test_other_bytes_are_reported_as_not_an_image(body):
    assert kind_of(body) == "not_an_image"


def test_a_zip_with_an_image_in_it_is_not_an_image():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("1.jpg", BODIES["JPEG"])

    assert kind_of(out.getvalue()) == "not_an_image"


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_an_image_that_ends_early_is_truncated(name, share):
    body = encoded(scene().effect_spread(20), name)

    assert kind_of(body[: int(len(body) * share)]) == "truncated"


@pytest.mark.parametrize("name", ["BMP", "TIFF"])
def test_pixels_that_end_early_are_truncated(name):
    body = BODIES["BMP"] if name == "BMP" else tiff_with_pixels_last()

    assert kind_of(body[: len(body) // 2]) == "truncated"


def tiff_with_pixels_last():
    body = encoded(scene(), "TIFF")
    assert struct.unpack("<I", body[4:8])[0] < 100  # Pillow writes the directory first
    return body


@pytest.mark.parametrize("name", ["PNG", "GIF", "BMP", "WEBP"])
def test_too_many_pixels_are_refused_by_the_header(name):
    bodies = {
        "PNG": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b""),
        "GIF": b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0)
        + b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\2\2\x4c\1\0;",
        "BMP": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "WEBP": encoded(Image.new("RGB", (400, 400)), "WEBP"),
    }  # fmt: skip

    assert kind_of(bodies[name], Images(max_pixels=100_000)) == "bomb"


def test_the_limit_of_pixels_is_that_of_the_recipe():
    body = encoded(Image.new("L", (100, 100)))

    assert stored(body, Images(max_pixels=10_000)).width == 100
    assert kind_of(body, Images(max_pixels=9_999)) == "bomb"


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_upright_size_needs_no_pixels(name, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    for body in (BODIES[name], encoded(scene(40, 60), name, exif=exif)):
        with monkeypatch.context() as patched:
            patched.setattr(ImageFile.ImageFile, "load", pytest.fail)

            assert upright_size(open_image(body, SMALL)) == (60, 40)


def ssim(one, other):
    """Mean structural similarity of luma, with the window of Wang et al. (2004)."""
    one, other = (pixels @ [0.299, 0.587, 0.114] for pixels in (one, other))

    def smoothed(pixels):
        return cv2.GaussianBlur(pixels, (11, 11), 1.5)[5:-5, 5:-5]

    means = smoothed(one), smoothed(other)
    variances = smoothed(one * one) + smoothed(other * other) - means[0] ** 2 - means[1] ** 2
    covariance = smoothed(one * other) - means[0] * means[1]
    light, contrast = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * means[0] * means[1] + light) * (2 * covariance + contrast)
    return (numerator / ((means[0] ** 2 + means[1] ** 2 + light) * (variances + contrast))).mean()


def size_of(path):
    with Image.open(path) as image:
        return image.size


def enlarged(path, factor):
    image = Image.open(path).convert("RGB")
    size = round(image.width * factor), round(image.height * factor)
    return encoded(image.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=90)


def collage(paths):
    """Photographs side by side, not enlarged, as one image of 2450 x 1800."""
    whole = Image.new("RGB", (2450, 1800))
    for number, path in enumerate(paths * 2):
        whole.paste(Image.open(path).convert("RGB"), (number % 4 * 613, number // 4 * 450))
    return encoded(whole, "JPEG", quality=92)


@cache
def photographs(kind):
    if kind == "as they are":
        return [path.read_bytes() for path in PHOTOGRAPHS]
    if kind == "a little larger":
        return [enlarged(path, 768 / min(size_of(path))) for path in PHOTOGRAPHS[:6]]
    if kind == "large":
        return [enlarged(path, 1800 / min(size_of(path))) for path in PHOTOGRAPHS[:4]]
    return [collage(PHOTOGRAPHS)]


def quality(body, size, *, fast=False):
    """PSNR and SSIM of our image and of img2dataset's, against Lanczos from a full decode.

    img2dataset's Resizer is a full decode, INTER_AREA and a JPEG of quality 95.
    """
    result = stored(body, Images(size=size, fast=fast))
    whole = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
    target = (result.width, result.height)
    theirs = cv2.resize(whole, target, interpolation=cv2.INTER_AREA)
    theirs = cv2.imencode(".jpg", theirs, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    whole = Image.open(io.BytesIO(body)).convert("RGB")
    reference = np.asarray(whole.resize(target, Image.Resampling.LANCZOS)).astype(float)
    images = [
        np.asarray(Image.open(io.BytesIO(one)).convert("RGB")).astype(float)
        for one in (result.content, theirs)
    ]
    return [(psnr(one, reference), ssim(one, reference)) for one in images]


@pytest.mark.skipif(not PHOTOGRAPHS, reason="no ../shared/samples here")
@pytest.mark.parametrize("kind", ["as they are", "a little larger", "large", "large and sharp"])
@pytest.mark.parametrize("size", [224, 256, 384, 512])
def test_quality_is_not_below_that_of_img2dataset(kind, size):
    bodies = [one for one in photographs(kind) if min(open_image(one, SMALL).size) > size]
    if not bodies:
        assert (kind, size) == ("as they are", 512)
        return

    ours, theirs = np.mean([quality(body, size) for body in bodies], axis=0)

    assert ours[0] > theirs[0] - 0.3
    assert ours[1] > theirs[1] - 0.002


@pytest.mark.skipif(not PHOTOGRAPHS, reason="no ../shared/samples here")
@pytest.mark.parametrize("kind", ["as they are", "a little larger", "large", "large and sharp"])
@pytest.mark.parametrize("size", [112, 224, 320])
def test_fast_decoding_loses_little_more_than_one_decibel(kind, size):
    bodies = photographs(kind)

    ours, theirs = np.mean([quality(body, size, fast=True) for body in bodies], axis=0)

    assert ours[0] > theirs[0] - 1.2
    assert ours[1] > theirs[1] - 0.01


@pytest.mark.parametrize("size", [(1601, 1203), (1607, 1199), (2555, 1927)])
def test_a_scaled_decode_shifts_no_pixel(size):
    """Nor does it stretch: the pixels of a scaled decode may extend beyond the image."""
    image = scene(*size)

    result = stored(encoded(image, "JPEG", quality=95), Images(size=64))

    reference = image.resize((result.width, result.height), Image.Resampling.LANCZOS)
    assert psnr(decoded(result), np.asarray(reference).astype(float)) > 37


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
def test_bytes_after_the_end_of_a_jpeg_have_no_effect(mode, options):
    body = encoded(scene(600, 400).convert(mode), "JPEG", **options)

    for tail in (b"\0" * 999, b"<html>", body[:2000], b"\xff\xd9"):
        assert stored(body + tail) == stored(body)
        kept = stored(body + tail, Images(size=400))
        assert kept.content == body + tail


@pytest.mark.parametrize("size", [32, 300, 400])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("tail", [b"", b"\xff\xd9", b"<html>", b"\0" * 99])
def test_a_truncated_jpeg_is_detected_at_every_scale(size, options, share, tail):
    """Whether its bytes are kept or it is decoded at a scale, and whatever bytes follow."""
    body = encoded(scene(600, 400).effect_spread(20), "JPEG", **options)

    assert kind_of(body[: int(len(body) * share)] + tail, Images(size=size)) == "truncated"


@pytest.mark.parametrize("cut", [1, 2, 3, 20])
def test_a_jpeg_without_its_last_bytes_is_truncated(cut):
    body = encoded(scene(600, 400), "JPEG")[:-cut]

    assert kind_of(body, Images(size=32)) == "truncated"
    assert kind_of(body, Images(size=400)) == "truncated"


def test_a_damaged_jpeg_is_decoded_without_output(capfd):
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    body = encoded(Image.fromarray(noise), "JPEG")
    middle = len(body) // 2
    damaged = body[:middle] + b"\x12\x34\x56" + body[middle + 3 :]

    with contextlib.suppress(RecordError):  # the rest is decoded wrongly and may be too short
        stored(damaged)
    assert stored(body[:-2] + b"more" + body[-2:]).width == 48
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_kind_of_jpeg_gives_the_same_pixels(mode, options):
    image = scene(600, 400).convert(mode)

    result = stored(encoded(image, "JPEG", quality=95, **options))

    reference = image.convert("RGB").resize((48, 32), Image.Resampling.LANCZOS)
    assert psnr(decoded(result), np.asarray(reference).astype(float)) > 30


@pytest.mark.skipif(not PHOTOGRAPHS, reason="no ../shared/samples here")
def test_photographs_keep_their_brightness():
    for path in PHOTOGRAPHS:
        result = stored(path.read_bytes(), Images(size=256))

        assert min(result.width, result.height) == 256
        mean = np.asarray(Image.open(path).convert("RGB")).mean()
        assert decoded(result).mean() == pytest.approx(mean, abs=1)


def test_the_same_bytes_give_the_same_image_in_many_threads():
    bodies = [*BODIES.values(), encoded(scene(600, 400), "JPEG")] * 8
    with ThreadPoolExecutor(8) as pool:
        result = list(pool.map(stored, bodies))

    assert result == [stored(body) for body in bodies[: len(bodies) // 8]] * 8


@pytest.mark.parametrize("name", [*ACCEPTED_FORMATS, "MPO"])
def test_damage_raises_at_most_a_record_error(name):
    body = BODIES[name]

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def check(data):
        broken = bytearray(body)
        for _ in range(data.draw(st.integers(1, 4))):
            broken[data.draw(st.integers(0, min(len(body) - 1, 400)))] = data.draw(
                st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)
            )
        cut = data.draw(st.just(len(broken)) | st.integers(0, len(broken)))
        try:
            result = stored(bytes(broken[:cut]), Images(size=32, max_pixels=1_000_000))
        except RecordError as error:
            assert error.kind in FAILURE_REASONS  # noqa: PT017 - one of two ways
        else:
            decoded(result)

    check()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_arbitrary_exif_raises_no_exception(exif, name):
    body = encoded(scene(), name, exif=b"Exif\0\0II*\0\x08\0\0\0" + exif)

    result = stored(body)

    assert {result.width, result.height} == {48, 32}


def test_arbitrary_metadata_raises_no_exception():
    text = PngImagePlugin.PngInfo()
    text.add(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20)))
    profile = b"not a profile" * 5000
    exif = b"Exif\0\0MM\0*" + struct.pack(">I", 8) * 9000

    assert stored(encoded(scene(), icc_profile=profile)).width == 48
    assert stored(encoded(scene(), "JPEG", icc_profile=profile, exif=exif)).width == 48
    assert kind_of(encoded(scene(), pnginfo=text)) == "not_an_image"


def test_warnings_of_pillow_are_neither_printed_nor_raised(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x12\x01\x03\0\x01\0\0\0" * 3
    (tmp_path / "1").write_bytes(encoded(scene(), "JPEG", exif=exif))
    (tmp_path / "2").write_bytes(BODIES["MPO"].replace(b"MPF\0", b"MPF\0xx", 1))
    palette = Image.new("P", (40, 40))
    (tmp_path / "3").write_bytes(encoded(palette, transparency=b"\0\x80"))
    code = (
        "import sys\n"
        "from pmd_pipeline.images.decode.decoder import open_image\n"
        "from pmd_pipeline.images.decode.stored_image import make_stored_image\n"
        "from pmd_pipeline.recipe import Images\n"
        "for name in sys.argv[1:]:\n"
        "    body = open(name, 'rb').read()\n"
        "    make_stored_image(body, open_image(body, Images(size=16)), Images(size=16))\n"
    )

    names = [str(tmp_path / name) for name in "123"]
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *names],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (run.returncode, run.stderr) == (0, "")
