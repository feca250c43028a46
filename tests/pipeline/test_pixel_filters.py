"""Filters on pixels: their values, their order, and what a build counts."""

import hashlib
import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from toy import toy_build, toy_recipe, toy_source_build, write_rows

from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.filters.pixels import fills_frame, has_detail
from pmd_pipeline.images.decode import stored_image
from pmd_pipeline.images.decode.processor import ImageProcessor
from pmd_pipeline.images.fetch.client import FetchedImage
from pmd_pipeline.inspect.report.funnel import meaning
from pmd_pipeline.recipe import Images

any_pixels = arrays.arrays(
    np.uint8,
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3)),
    elements=st.integers(0, 255),
)


@given(any_pixels)
def test_detail_is_the_standard_deviation_of_luma(pixels):
    luma = np.floor(pixels.astype(float) @ [0.299, 0.587, 0.114] + 0.5 + 1e-9)
    deviation = luma.std()

    assert has_detail(pixels, least=max(0, deviation - 1e-6))
    assert not has_detail(pixels, least=deviation + 1e-6)


@pytest.mark.parametrize(("white", "deviation"), [(0, 0), (8, 255 / 2), (4, 255 * 3**0.5 / 4)])
def test_detail_of_black_and_white_columns(white, deviation):
    pixels = np.zeros((4, 16, 3), np.uint8)
    pixels[:, :white] = 255

    assert has_detail(pixels, least=max(0, deviation - 1e-9))
    assert not has_detail(pixels, least=deviation + 1e-9)


def test_detail_does_not_overflow_in_a_large_image():
    pixels = np.zeros((3000, 3000, 3), np.uint8)
    pixels[:1500] = 255

    assert has_detail(pixels, least=127.4)
    assert not has_detail(pixels, least=127.6)


def framed(top, bottom, left, right, side=20):
    """Noise inside bars of so many rows and columns."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    pixels[:top] = pixels[side - bottom :] = 9
    pixels[:, :left] = pixels[:, side - right :] = 9
    return pixels


@pytest.mark.parametrize(
    ("bars", "most", "passes"),
    [
        ((0, 0, 0, 0), 0.0, True),
        ((1, 0, 0, 0), 0.0, False),
        ((1, 1, 0, 0), 0.1, True),
        ((2, 1, 0, 0), 0.1, False),
        ((0, 0, 3, 0), 0.1, False),
        ((0, 0, 0, 3), 0.1, False),
        ((2, 2, 2, 2), 0.2, True),
        ((19, 0, 0, 0), 0.95, True),
        ((20, 0, 0, 0), 0.95, False),
        ((20, 0, 0, 0), 1.0, True),
    ],
)
def test_bars_count_at_both_ends_of_each_axis(bars, most, passes):
    assert fills_frame(framed(*bars), most=most) is passes


def test_a_bar_may_vary_by_the_tolerance():
    pixels = framed(4, 0, 0, 0)
    pixels[:4, ::2, 1] += 5

    assert fills_frame(pixels, tolerance=4)
    assert not fills_frame(pixels, tolerance=5)


@given(any_pixels)
def test_a_filter_changes_no_pixel(pixels):
    before = pixels.copy()
    pixels.flags.writeable = False

    has_detail(pixels, least=1)
    fills_frame(pixels)

    assert (pixels == before).all()


def jpeg_of(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95)
    return out.getvalue()


NOISE = framed(0, 0, 0, 0, side=40)
FRAMED = framed(16, 16, 0, 0, side=64)  # whole blocks of a JPEG
BLANK = np.full((40, 40, 3), 128, np.uint8)
FILTERS = {"has_detail": {"least": 5.0}, "fills_frame": {"most": 0.2}}


def test_filters_run_in_order_on_the_resized_pixels_until_one_drops_the_image():
    calls = []

    def recording(name, passes):
        def call(pixels):
            calls.append((name, pixels.shape, pixels.flags.writeable))
            return passes(pixels)

        return call

    processor = ImageProcessor(Images(size=20, pixel_filters=FILTERS))
    for name, passes in processor._pixel_filters.items():
        processor._pixel_filters[name] = recording(name, passes)

    kept = processor.process(FetchedImage(jpeg_of(NOISE)))
    dropped = processor.process(FetchedImage(jpeg_of(BLANK)))

    shape = (20, 20, 3)
    assert calls == [
        ("has_detail", shape, False),
        ("fills_frame", shape, False),
        ("has_detail", shape, False),
    ]
    assert kept.status == Status.SUCCESS
    assert (dropped.status, dropped.reason, dropped.image) == (Status.DROPPED, "has_detail", None)
    assert dropped.original_size == (40, 40)


def test_a_jpeg_that_keeps_its_bytes_is_decoded_only_for_a_filter(monkeypatch):
    body = jpeg_of(NOISE)
    with monkeypatch.context() as patched:
        patched.setattr(stored_image, "decode_resized", pytest.fail)
        unfiltered = ImageProcessor(Images()).process(FetchedImage(body))
    with monkeypatch.context() as patched:
        patched.setattr(stored_image, "check_jpeg", pytest.fail)
        filtered = ImageProcessor(Images(pixel_filters=FILTERS)).process(FetchedImage(body))

    assert unfiltered.image.content == filtered.image.content == body


@pytest.mark.parametrize("filters", [{}, FILTERS])
def test_a_truncated_jpeg_is_truncated_with_or_without_filters(filters):
    result = ImageProcessor(Images(pixel_filters=filters)).process(
        FetchedImage(jpeg_of(NOISE)[:-30])
    )

    assert (result.status, result.reason) == (Status.FAILED_TO_RESIZE, "truncated")


def test_a_build_counts_each_drop_under_the_name_of_its_filter(tmp_path):
    images = {"noise.jpg": NOISE, "framed.jpg": FRAMED, "blank.jpg": BLANK}
    (tmp_path / "images").mkdir()
    for name, pixels in images.items():
        (tmp_path / "images" / name).write_bytes(jpeg_of(pixels))
    write_rows(tmp_path / "raw", [(f"see {name}", f"http://a.test/{name}") for name in images])
    recipe = toy_recipe(images={"pixel_filters": FILTERS})

    manifest = toy_build(toy_source_build(tmp_path, recipe, pictures=tmp_path / "images"))

    entry, [shard] = manifest.sources["cc3m"], manifest.shards
    assert (entry.counts.kept, entry.counts.unaccounted()) == (1, 0)
    assert entry.counts.dropped == {"has_detail": 1, "fills_frame": 1}
    ledger = pl.read_parquet(Path(tmp_path, "manifests", ShardPaths.of(shard.path).ledger))
    dropped = ledger.filter(pl.col("url").str.ends_with("blank.jpg"))
    assert dropped.select(
        "status", "reason", "error_message", "width", "original_width", "image_size"
    ).rows() == [("dropped", "has_detail", None, None, 40, None)]
    assert dropped["sha256"].null_count() == 0
    assert meaning("has_detail", entry.rules) == (
        "a filter of the recipe, least = 5.0: "
        "Keep images whose luma has a standard deviation of at least least."
    )


def test_a_build_takes_a_pixel_filter_from_a_module_of_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "def is_bright(pixels, *, least: int = 100):\n    return pixels.mean() >= least\n"
    (tmp_path / "own_pixel_filters.py").write_text(source)
    (tmp_path / "images").mkdir()
    for name, level in {"dark.jpg": 50, "bright.jpg": 150}.items():
        (tmp_path / "images" / name).write_bytes(jpeg_of(np.full((40, 40, 3), level, np.uint8)))
    write_rows(
        tmp_path / "raw", [(f"see {n}", f"http://a.test/{n}.jpg") for n in ("dark", "bright")]
    )
    recipe = toy_recipe(images={"pixel_filters": {"own_pixel_filters:is_bright": {}}})

    manifest = toy_build(toy_source_build(tmp_path, recipe, pictures=tmp_path / "images"))

    entry = manifest.sources["cc3m"]
    assert (entry.counts.kept, entry.counts.dropped) == (1, {"own_pixel_filters:is_bright": 1})
    digest = hashlib.sha256(source.encode()).hexdigest()
    assert entry.rules["images"]["filters_sha256"] == {"own_pixel_filters:is_bright": digest}
