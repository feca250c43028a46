"""Real photographs with real captions, from local files into shards."""

import json
import tarfile
from pathlib import Path

import polars as pl
import pytest
from source_helpers import SAMPLES, needs_samples
from toy import QUIET, toy_build, toy_source_build

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.dataset.build import build_source
from pmd_pipeline.dataset.source_build import SourceBuild
from pmd_pipeline.recipe import load_recipe

pytestmark = needs_samples


def test_eighty_photographs_of_coco_with_their_400_captions(tmp_path):
    mini = SAMPLES / "coco" / "mini"
    order = SourceBuild(
        recipe=load_recipe("coco")[0],
        raw=str(mini),
        data=str(tmp_path / "data"),
        manifest=str(tmp_path / "coco.json"),
        images=(str(mini),),
    )

    entry = toy_build(order).sources["coco"]

    assert (entry.images, entry.unique_images, entry.counts.kept) == (80, 80, 400)
    assert entry.counts.failed == entry.counts.dropped == {}
    assert entry.leakage == "not checked"
    ledger = pl.read_parquet(Path(order.shards) / "00000.parquet")
    assert ledger.select(pl.min_horizontal("width", "height")).to_series().max() == 256


@pytest.mark.parametrize(("name", "images"), [("captions_train", 875), ("captions_heldout", 125)])
def test_a_thousand_photographs_read_from_their_zip(tmp_path, name, images):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / f"{name}.json").write_bytes((SAMPLES / "photos" / f"{name}.json").read_bytes())
    order = toy_source_build(
        tmp_path, load_recipe("coco")[0], pictures=SAMPLES / "photos" / "photos.zip"
    )

    with open_pool("local", 2, None) as pool:
        manifest, failures = build_source(order, pool, QUIET)

    entry = manifest.sources["coco"]
    assert failures == []
    assert (entry.images, entry.counts.kept) == (images, 5 * images)
    assert entry.counts.failed == {}
    with tarfile.open(Path(order.shards) / "00000.tar") as tar:
        first = tar.next()
        assert first.size > 1000
        sample = json.load(tar.extractfile(tar.next()))
    assert len(sample["captions"]) == 5


def test_orphans_of_coco_are_counted(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    source = SAMPLES / "coco" / "first100" / "captions_train2017.json"
    (raw / source.name).write_bytes(source.read_bytes())
    order = toy_source_build(tmp_path, load_recipe("coco")[0], pictures=SAMPLES / "coco" / "mini")

    counts = toy_build(order).sources["coco"].counts

    content = json.loads(source.read_text())
    ids = {image["id"] for image in content["images"]}
    orphans = [a for a in content["annotations"] if a["image_id"] not in ids]
    described = {a["image_id"] for a in content["annotations"]}
    assert counts.dropped == {
        "no_image": len(orphans),
        "no_caption": len(ids - described),
    }
    assert counts.unaccounted() == 0
