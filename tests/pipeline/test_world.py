"""The whole pipeline on the sample world, whose counts are known in advance."""

import gc
import json
import random
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import polars as pl
import pytest
import webdataset
from datasets import load_dataset
from PIL import Image
from toy import QUIET

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.dataset.build import BuildRequest, build_all
from pmd_pipeline.demo.world import World, serve, write_world
from pmd_pipeline.inspect.trace import find_traces
from pmd_pipeline.inspect.trace_text import outcome, trace_lines
from pmd_pipeline.inspect.verify.dataset import verify
from pmd_pipeline.publish.lockfile.lock import lock
from pmd_pipeline.publish.lockfile.rebuild import RebuildRequest, rebuild
from pmd_pipeline.shards.image_locations import WEB
from pmd_pipeline.text.vocabulary import learn_vocabulary

pytestmark = pytest.mark.slow

SOURCES = (
    "cc12m",
    "cc3m",
    "coco",
    "localized_narratives",
    "redcaps",
    "sbu",
    "visual_genome",
    "wit",
    "yfcc100m",
)


def build(world: World, origin: str, out: Path, runner: str, workers: int):
    request = BuildRequest(
        recipes=("pmd",),
        out=str(out / "data"),
        manifests=str(out / "manifests"),
        raw=str(world.folder / "raw"),
        images=(WEB, *(str(path) for paths in world.images.values() for path in paths)),
        changes={"fetch": {"connect_to": {"*": origin}}, "part_records": 25},
        runner=runner,
        workers=workers,
    )
    result = build_all(request, QUIET)
    assert result.failures == []
    return result.manifests[-1][1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), scenes=80)


@pytest.fixture(scope="module")
def origin(world):
    with serve(world) as origin:
        yield origin


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("built")


@pytest.fixture(scope="module")
def manifest(world, origin, out):
    return build(world, origin, out, "local", 1)


@pytest.mark.parametrize("source", SOURCES)
def test_the_counts_of_a_source_are_those_planted_in_the_world(manifest, world, source):
    assert manifest.sources[source].counts == world.expected[source]
    assert manifest.sources[source].counts.unaccounted() == 0


@pytest.mark.parametrize("source", ["ccnews", "bookcorpus"])
def test_the_counts_of_a_text_source_are_those_planted_in_the_world(
    manifest, world, out, tmp_path, source
):
    vocabulary, _ = learn_vocabulary(str(out / "manifests" / "pmd.json"), 400, lambda *_: None)
    (tmp_path / "vocab.txt").write_bytes(vocabulary.content)
    request = BuildRequest(
        recipes=(source,),
        out=str(tmp_path / "data"),
        manifests=str(tmp_path / "manifests"),
        raw=str(world.folder / "raw" / source),
        changes={"texts": {"tokenizer": str(tmp_path / "vocab.txt")}},
        runner="local",
        workers=1,
    )

    [(_, built)] = build_all(request, QUIET).manifests

    assert built.kind == "text"
    assert built.sources[source].counts == world.expected[source]
    assert built.sources[source].tokens > 0


@pytest.mark.parametrize(("runner", "workers"), [("local", 2), ("ray", 1), ("ray", 2)])
def test_the_digest_is_the_same_for_any_runner_and_number_of_workers(
    manifest, world, origin, tmp_path, runner, workers
):
    assert build(world, origin, tmp_path, runner, workers).digest == manifest.digest


def test_no_shard_has_an_evaluation_image(manifest, world, out):
    text = (world.folder / "raw" / "coco" / "dataset_coco.json").read_text()
    heldout = {i["cocoid"] for i in json.loads(text)["images"] if i["split"] in {"val", "test"}}

    coco_ids = [
        sample["meta"]["coco_id"]
        for source in ("coco", "localized_narratives", "visual_genome")
        for sample in samples(manifest, out, source)
        if sample["meta"].get("coco_id")
    ]

    assert len(heldout) > 3
    assert len(coco_ids) > 50
    assert heldout.isdisjoint(coco_ids)
    assert all(entry.leakage != "not checked" for entry in manifest.sources.values())


@pytest.mark.parametrize("kills", [5])
def test_a_build_killed_at_random_moments_ends_with_the_same_digest(
    manifest, world, origin, tmp_path, kills
):
    recipe = tmp_path / "pmd.toml"
    names = json.dumps(list(SOURCES))
    recipe.write_text(
        f'include = {names}\npart_records = 25\n[fetch.connect_to]\n"*" = "{origin}"\n'
    )
    images = [
        option for paths in world.images.values() for p in paths for option in ("--images", p)
    ]
    command = [
        *(sys.executable, "-m", "pmd_pipeline.cli", "build", "--recipe", recipe),
        *("--raw", world.folder / "raw", "--out", tmp_path / "data"),
        *("--manifests", tmp_path / "manifests", "--images", "web", *images),
        *("--runner", "local", "--workers", "2", "--quiet"),
    ]
    rng = random.Random(7)
    killed = 0
    for _ in range(kills):
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.8, 2.2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)

    assert killed >= 2
    assert load_manifest(str(tmp_path / "manifests" / "pmd.json")).digest == manifest.digest


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_open_with_webdataset(manifest, out):
    for source in SOURCES:
        urls = [str(path) for path in tars(manifest, out, source)]
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        count = 0
        for sample in dataset:
            metadata = json.loads(sample["json"])
            image = Image.open(BytesIO(sample["jpg"]))
            assert image.size == (metadata["width"], metadata["height"])
            assert sample["txt"].decode() == metadata["captions"][0]
            count += 1
        assert count == manifest.sources[source].images
    del dataset
    gc.collect()  # webdataset does not close its files; the collector then warns


def test_shards_open_with_datasets(manifest, out, tmp_path):
    files = [str(path) for path in tars(manifest, out, "coco")]

    rows = load_dataset(
        "webdataset", data_files={"train": files}, split="train", cache_dir=str(tmp_path)
    )

    assert len(rows) == manifest.sources["coco"].images
    assert rows[0]["json"]["captions"][0] == rows[0]["txt"]
    assert rows[0]["jpg"].size == (rows[0]["json"]["width"], rows[0]["json"]["height"])


def test_ledgers_open_with_polars(manifest, out):
    ledgers = pl.scan_parquet(out / "data" / "shards" / "*" / "*.parquet").collect()

    kept = ledgers.filter(pl.col("status") == "success")
    assert len(kept) == sum(entry.images for entry in manifest.sources.values())
    assert kept["num_pairs"].sum() == sum(entry.counts.kept for entry in manifest.sources.values())
    assert ledgers["key"].n_unique() == len(ledgers)


def test_regions_of_visual_genome_keep_their_boxes(manifest, out):
    for sample in samples(manifest, out, "visual_genome"):
        assert len(sample["boxes"]) == len(sample["captions"])
        for x0, y0, x1, y1 in sample["boxes"]:
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1


def test_no_shard_has_a_user_name(manifest, world, out):
    author = json.loads(next((world.folder / "raw" / "redcaps").rglob("*_20*.json")).read_text())
    names = {post["author"] for post in author["annotations"] if post.get("author")}

    content = b"".join(path.read_bytes() for path in tars(manifest, out, "redcaps"))

    assert not [name for name in names if name.encode() in content]


def test_traces_have_every_reason_of_every_source(manifest, out):
    queries = {}  # one record of each source and reason, or kept
    for files in ("shards/*/[0-9]*.parquet", "index/*/dropped-*.parquet"):
        for path in sorted((out / "data").glob(files)):
            for row in pl.read_parquet(path).iter_rows(named=True):
                queries.setdefault((path.parent.name, row["reason"]), row["key"])
    assert len(queries) > 40

    with open_pool("local", 1, None) as pool:
        for (source, reason), key in queries.items():
            [trace] = find_traces(str(out / "data"), key, pool)
            lines = list(trace_lines(trace))

            assert (trace.source, trace.key) == (source, key)
            assert f"{reason}" in "\n".join(lines) if reason else outcome(trace)[:6] == "kept: "
            assert lines[2].startswith("read: row ")
            assert not [row.problem for row in trace.rows if row.problem]


def test_an_address_finds_the_records_of_sources_that_have_other_ids(manifest, out):
    rows = pl.read_parquet(out / "data" / "index" / "coco" / "kept-*.parquet")

    with open_pool("local", 1, None) as pool:
        found = find_traces(str(out / "data"), rows["url"][0], pool)

    assert [trace.key for trace in found if trace.source == "coco"] == [rows["key"][0]]


@pytest.fixture(scope="module")
def kit(manifest, out):
    with open_pool("local", 1, None) as pool:
        lock(str(out / "manifests" / "pmd.json"), str(out / "kit"), pool, QUIET)
    return out / "kit"


def rebuild_at(origin, world, kit, folder, runner="local"):
    order = RebuildRequest(
        lockfile=str(kit),
        out=str(folder / "data"),
        manifests=str(folder / "manifests"),
        images=(WEB, *(str(path) for paths in world.images.values() for path in paths)),
        changes={"fetch": {"connect_to": {"*": origin}}},
    )
    with open_pool(runner, 2, None) as pool:
        return rebuild(order, pool, QUIET)


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_a_kit_makes_the_same_dataset_over_an_unchanged_web(
    manifest, world, origin, kit, tmp_path, runner
):
    made = rebuild_at(origin, world, kit, tmp_path, runner)

    assert made.is_same
    assert made.manifest.digest == manifest.digest


def test_a_rebuild_names_exactly_the_tenth_that_has_changed_or_gone(world, kit, out, tmp_path):
    ledgers = [pl.read_parquet(path) for path in (out / "data/shards").glob("*/[0-9]*.parquet")]
    rows = pl.concat(ledgers).filter(
        (pl.col("status") == "success") & (pl.col("url") == pl.col("final_url"))
    )
    chosen = rows.sample(fraction=0.1, seed=1).sort("key").to_dicts()
    web, expected = dict(world.web), set()
    for number, row in enumerate(chosen):
        address = row["url"].split("://")[1]
        expected.add(address)
        if number % 2:
            del web[address]
        else:
            web[address] = web[address]._replace(scene=another(world, web[address].scene))
    with serve(replace(world, web=web)) as origin:
        made = rebuild_at(origin, world, kit, tmp_path)

    trace_lines = [json.loads(line) for line in Path(made.missing).read_text().splitlines()]
    assert {row["url"].split("://")[1] for row in trace_lines} == expected
    assert {row["reason"] for row in trace_lines} == {"changed", "http_404"}
    with open_pool("local", 1, None) as pool:
        assert list(verify(made.path, pool, QUIET)) == []


def another(world, scene):
    """Some other scene of the world."""
    return next(one.scene for one in world.web.values() if one.scene and one.scene != scene)


def tars(manifest, out, source):
    return [out / "manifests" / shard.path for shard in manifest.shards if shard.source == source]


def samples(manifest, out, source):
    for path in tars(manifest, out, source):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    yield json.load(tar.extractfile(member))


def test_a_build_leaves_no_temporary_files(manifest, out):
    assert manifest.missing == {}
    assert not list(out.rglob("*.tmp"))
    assert not list(out.rglob("runs"))
