"""The sample world from the web to batches: the trainer reads what the pipeline builds."""

import dataclasses
import json
import subprocess
import sys
import tarfile
from collections import Counter
from contextlib import closing

import pytest
import torch
from rich.console import Console
from tiny import TINY

from flava_train.data.config import DataConfig
from flava_train.data.loader import load_batches
from flava_train.data.manifests import check_manifest
from flava_train.data.needs import StreamShares
from flava_train.data.training_data import TrainingData
from flava_train.evaluation.batches import evaluation_batches
from flava_train.objective.objective import Objective
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.dataset.build import BuildRequest, build_all
from pmd_pipeline.demo.world import serve, write_world
from pmd_pipeline.shards.image_locations import WEB

pytestmark = pytest.mark.slow
QUIET = Reporter(Console(quiet=True), quiet=True)
BATCH = 16
TRUE_PAIRS = Objective(itm_rate=0.0, streams=StreamShares(1.0, 0.0, 0.0))


def pmd(*words):
    command = [sys.executable, "-m", "pmd_pipeline.cli", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The nine sources of the sample world with codes and a tokenizer."""
    out = tmp_path_factory.mktemp("built")
    world = write_world(out / "world", scenes=40, seed=0)
    with serve(world) as origin:
        request = BuildRequest(
            recipes=("pmd",),
            out=str(out / "data"),
            manifests=str(out / "manifests"),
            raw=str(world.folder / "raw"),
            images=(WEB, *(str(path) for paths in world.images.values() for path in paths)),
            changes={"fetch": {"connect_to": {"*": origin}}, "part_records": 25},
            runner="local",
            workers=2,
        )
        assert build_all(request, QUIET).failures == []
    manifest = out / "manifests" / "pmd.json"
    pmd("codes", "make", manifest, "--grid", 4, "--vocabulary", 32, "--views", 3,
        "--runner", "local", "-q")  # fmt: skip
    pmd("tokenizer", manifest, "--size", 400, "--out", out / "vocab.txt", "-q")
    return out


@pytest.fixture
def data(built, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = DataConfig(
        pairs=str(built / "manifests" / "pmd.json"),
        tokenizer=str(built / "vocab.txt"),
        caption_tokens=20,
        window_shards=4,
    )
    model = dataclasses.replace(TINY, text_vocab=400)
    return TrainingData(config, TRUE_PAIRS.data_needs, model, seed=3, batch=BATCH)


def test_an_epoch_has_every_pair_once_except_less_than_a_batch(built, data):
    manifest, sources = check_manifest(built / "manifests" / "pmd.json")
    pairs = Counter()
    for shard in manifest.shards:
        with tarfile.open(built / "manifests" / shard.path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    captions = json.load(tar.extractfile(member))["captions"]
                    pairs.update((member.name[:16], caption) for caption in captions)
    total = sum(one.pairs for one in sources)

    seen = Counter(
        (row.key, row.text) for step in range(total // BATCH) for row in data.describe(step)
    )

    assert pairs.total() == total
    assert seen <= pairs
    assert seen.total() == total - total % BATCH


def test_regions_of_visual_genome_have_a_crop_each(data):
    rows = [row for step in range(40) for row in data.describe(step)]

    regions = Counter((row.key, row.crop) for row in rows if row.source == "visual_genome")
    assert regions
    assert set(regions.values()) == {1}
    assert {row.crop for row in rows if row.source == "cc12m"} == {1, 2}


def test_workers_load_the_same_batches_as_one_process(data):
    with closing(load_batches(data, 5, 12, workers=2, chunk=5)) as loaded:
        for batch in loaded:
            expected = data.load(batch.step, range(BATCH))
            assert batch.keys == expected.keys
            assert torch.equal(batch.rows.images.pixels, expected.rows.images.pixels)
            assert torch.equal(batch.rows.images.codes, expected.rows.images.codes)
            assert torch.equal(batch.rows.texts.masked_tokens, expected.rows.texts.masked_tokens)


def test_evaluation_has_every_image_and_region(built, data):
    _, sources = check_manifest(built / "manifests" / "pmd.json")
    expected = sum(one.pairs if one.source == "visual_genome" else one.images for one in sources)

    images = list(evaluation_batches(str(built / "manifests" / "pmd.json"), data.wordpiece, 32, 20))

    assert sum(len(one.keys) for one in images) == expected
    assert sum(len(one.tokens) for one in images) == sum(one.pairs for one in sources)
