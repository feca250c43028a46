"""The poster of a run: its queries, its images, and what is drawn."""

import sys

import numpy as np
import pytest
from PIL import Image
from toy import toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.demo.poster import SearchResult, draw_poster, image_digests, sample_queries
from pmd_pipeline.demo.training_summary import DIRECTIONS, LOSSES, RANKS, TrainingSummary

GREEN = (42, 157, 92)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    write_rows(folder / "raw", toy_rows(9))
    pictures = write_pictures(folder / "pictures", [f"{n}.jpg" for n in range(9)])
    order = toy_source_build(folder, toy_recipe(part_records=4), pictures=pictures)
    toy_build(order)
    return order.manifest


@pytest.fixture
def summary():
    metrics = {f"{direction}_r{rank}": 0.05 * rank for direction in DIRECTIONS for rank in RANKS}
    recall = {100: {**metrics, "chance": dict.fromkeys(metrics, 0.01)}}
    losses = {name: (list(range(100)), [4 - step / 50 for step in range(100)]) for name in LOSSES}
    return TrainingSummary(100, losses, recall)


def test_queries_are_captions_of_different_images_from_the_whole_manifest(manifest):
    queries = sample_queries(manifest, 3)

    keys = [key for key, _ in queries]
    assert keys == sorted(set(keys))
    assert all(text.startswith("a caption of picture ") for _, text in queries)


def test_an_image_has_the_digest_of_its_fetched_bytes(manifest):
    results = list(image_digests(manifest))

    assert len(results) == len(set(results)) == 9
    assert all(len(one) == 64 for one in results)


def green_pixels(path):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    rows = pixels[pixels.shape[0] // 2 :]  # the curves above are green too
    return int((np.abs(rows - GREEN).max(axis=2) < 8).sum())


def test_a_hit_is_framed_in_green(manifest, summary, tmp_path):
    keys = [key for key, _ in sample_queries(manifest, 9)]
    missed = [
        SearchResult("words", keys[0], keys[1:6]),
        SearchResult("more words", keys[1], keys[2:7]),
    ]
    hit = [*missed[:1], SearchResult("more words", keys[1], keys[1:6])]

    for name, results in (("missed", missed), ("hit", hit)):
        draw_poster(summary, results, manifest, str(tmp_path / f"{name}.png"))

    assert green_pixels(tmp_path / "hit.png") > green_pixels(tmp_path / "missed.png") + 1000


def test_without_matplotlib_a_poster_is_refused_in_a_sentence(
    manifest, summary, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(PmdError, match=r"pmd-flava\[plot\]"):
        draw_poster(summary, [], manifest, str(tmp_path / "a.png"))
