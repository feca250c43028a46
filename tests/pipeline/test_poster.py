"""The picture of a run: what is asked, what is compared, and what is drawn."""

import sys

import numpy as np
import pytest
from PIL import Image
from toy import toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.demo.poster import Found, draw, fingerprints, first_captions
from pmd_pipeline.demo.training_summary import DIRECTIONS, LOSSES, RANKS, Learned

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
def learned():
    figures = {f"{way}_r{rank}": 0.05 * rank for way in DIRECTIONS for rank in RANKS}
    recall = {100: {**figures, "chance": dict.fromkeys(figures, 0.01)}}
    losses = {name: (list(range(100)), [4 - step / 50 for step in range(100)]) for name in LOSSES}
    return Learned(100, losses, recall)


def test_queries_are_captions_of_different_images_from_the_whole_manifest(manifest):
    asked = first_captions(manifest, 3)

    keys = [key for key, _ in asked]
    assert keys == sorted(set(keys))
    assert all(text.startswith("a caption of picture ") for _, text in asked)


def test_an_image_has_the_digest_of_its_fetched_bytes(manifest):
    found = list(fingerprints(manifest))

    assert len(found) == len(set(found)) == 9
    assert all(len(one) == 64 for one in found)


def green_pixels(path):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    rows = pixels[pixels.shape[0] // 2 :]  # the curves above are green too
    return int((np.abs(rows - GREEN).max(axis=2) < 8).sum())


def test_a_hit_is_framed_in_green(manifest, learned, tmp_path):
    keys = [key for key, _ in first_captions(manifest, 9)]
    missed = [Found("words", keys[0], keys[1:6]), Found("more words", keys[1], keys[2:7])]
    hit = [*missed[:1], Found("more words", keys[1], keys[1:6])]

    for name, found in (("missed", missed), ("hit", hit)):
        draw(learned, found, manifest, str(tmp_path / f"{name}.png"))

    assert green_pixels(tmp_path / "hit.png") > green_pixels(tmp_path / "missed.png") + 1000


def test_without_matplotlib_a_poster_is_refused_in_a_sentence(
    manifest, learned, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with pytest.raises(PmdError, match=r"pmd-flava\[plot\]"):
        draw(learned, [], manifest, str(tmp_path / "a.png"))
