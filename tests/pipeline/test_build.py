"""Shards: conservation, determinism, idempotence, and a ledger that locates every byte."""

import hashlib
import json
import random
import socket
import tarfile
import threading
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import polars as pl
import pytest
from fake_host import FakeHost, by_path, response
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy import toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.contract.models import Report
from pmd_pipeline.dataset import build as build_module
from pmd_pipeline.dataset.source_build import SourceBuild
from pmd_pipeline.images.fetch import rate_limiter
from pmd_pipeline.index.records import IndexRecord
from pmd_pipeline.recipe import load_recipe
from pmd_pipeline.shards import pipeline
from pmd_pipeline.shards.image_locations import WEB
from pmd_pipeline.shards.part import build_part
from pmd_pipeline.shards.shard import ShardBuild, fetch_images

KINDS = ("good", "missing", "html", "empty", "truncated", "tiny")


def write_kinds(folder: Path, kinds: list[str]) -> Path:
    """A file of each kind: a good picture, or one of the faults."""
    write_pictures(folder, [f"{n}.jpg" for n in range(len(kinds))], side=64)
    for number, kind in enumerate(kinds):
        path = folder / f"{number}.jpg"
        if kind == "missing":
            path.unlink()
        elif kind == "html":
            path.write_bytes(b"<html>gone</html>")
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "truncated":
            path.write_bytes(path.read_bytes()[:-200])
        elif kind == "tiny":
            Image.new("RGB", (4, 4)).save(path, "JPEG")
    return folder


@pytest.fixture
def toy(tmp_path):
    """Thirty pictures in five parts, two of them missing."""
    write_rows(tmp_path / "raw", toy_rows(30))
    pictures = write_pictures(tmp_path / "pictures", [f"{n}.jpg" for n in range(28)])
    return toy_source_build(tmp_path, toy_recipe(part_records=6), pictures=pictures)


def files(source_build):
    return {path.name: path for path in Path(source_build.shards).iterdir()}


def digests(source_build):
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files(source_build).items()
        if not name.endswith(".json")
    }


@settings(max_examples=15)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
def test_every_pair_is_kept_dropped_or_failed(tmp_path_factory, kinds):
    folder = tmp_path_factory.mktemp("build")
    write_rows(folder / "raw", toy_rows(len(kinds)))
    pictures = write_kinds(folder / "pictures", kinds)
    recipe = toy_recipe(images={"filters": {"is_large": {"least": 8}}}, part_records=5)

    manifest = toy_build(toy_source_build(folder, recipe, pictures=pictures))

    counts = manifest.sources["cc3m"].counts
    assert counts.unaccounted() == 0
    assert counts.pairs_in == len(toy_rows(len(kinds)))
    pairs = [1 + (number % 3 == 0) for number in range(len(kinds))]
    by_kind = {
        kind: sum(p for p, k in zip(pairs, kinds, strict=True) if k == kind) for kind in KINDS
    }
    assert counts.kept == by_kind["good"]
    assert counts.dropped.get("is_large", 0) == by_kind["tiny"]
    assert counts.failed.get("not_in_archive", 0) == by_kind["missing"]
    assert sum(counts.failed.values()) == sum(
        by_kind[kind] for kind in ("missing", "html", "empty", "truncated")
    )


def test_a_second_run_builds_nothing_and_gives_the_same_manifest(toy, monkeypatch):
    first = toy_build(toy)
    before = {name: path.stat().st_mtime_ns for name, path in files(toy).items()}

    monkeypatch.setattr(build_module, "build_part", None)  # would fail if it were called

    assert toy_build(toy) == first
    assert {name: path.stat().st_mtime_ns for name, path in files(toy).items()} == before


@pytest.mark.parametrize("ending", [".tar", ".parquet", ".json"])
def test_only_a_part_without_one_of_its_files_is_built_again(toy, ending):
    first = toy_build(toy)
    content = digests(toy)
    before = {name: path.stat().st_mtime_ns for name, path in files(toy).items()}
    files(toy)[f"00001{ending}"].unlink()

    assert toy_build(toy) == first

    assert digests(toy) == content
    after = {name: path.stat().st_mtime_ns for name, path in files(toy).items()}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"00001.tar", "00001.parquet", "00001.json"}


def test_a_part_with_a_truncated_tar_is_built_again(toy):
    first = toy_build(toy)
    tar = files(toy)["00002.tar"]
    tar.write_bytes(tar.read_bytes()[:-1])

    assert toy_build(toy) == first


def test_a_damaged_ledger_is_an_error_with_advice_that_helps(toy):
    before = toy_build(toy)
    ledger = Path(toy.shards) / "00001.parquet"
    ledger.write_bytes(ledger.read_bytes()[:-20] + bytes(20))

    with pytest.raises(PmdError, match=r"00001\.parquet is no whole Parquet .*: delete the \.json"):
        toy_build(toy)

    ledger.with_suffix(".json").unlink()
    assert toy_build(toy).digest == before.digest


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_index_is_an_error_with_advice_that_helps(toy, workers):
    before = toy_build(toy)
    damaged = next(Path(toy.data, "index", "cc3m").glob("kept-00001*"))
    damaged.write_bytes(damaged.read_bytes()[:-20] + bytes(20))
    (Path(toy.shards) / "00001.json").unlink()

    with (
        open_pool("local", workers, None) as pool,
        pytest.raises(PmdError, match=r"kept-00001.* is no whole Parquet .*: delete index\.json"),
    ):
        toy_build(toy, pool)

    (damaged.parent / "index.json").unlink()
    assert toy_build(toy).digest == before.digest


def test_a_part_is_built_again_when_its_rules_change(toy):
    first = toy_build(toy)
    smaller = toy_source_build(
        Path(toy.data).parent,
        toy_recipe(part_records=6, images={"size": 20}),
        pictures=Path(toy.images[0]),
    )

    second = toy_build(smaller)

    assert second.digest != first.digest
    ledger = pl.read_parquet(files(toy)["00000.parquet"])
    assert set(ledger["height"].drop_nulls()) == {20}


@pytest.mark.parametrize("concurrency", [1, 16])
def test_bytes_do_not_depend_on_the_concurrency_of_local_images(toy, tmp_path, concurrency):
    toy_build(toy)
    recipe = toy_recipe(part_records=6, fetch={"concurrency": concurrency})
    write_rows(tmp_path / "other" / "raw", toy_rows(30))
    other = toy_source_build(tmp_path / "other", recipe, pictures=Path(toy.images[0]))

    toy_build(other)

    assert digests(other) == digests(toy)


@pytest.fixture
def slow_host(tmp_path):
    """A host of thirty pictures, two of them missing, that answers after random delays."""
    names = [f"{n}.jpg" for n in range(28)]
    pictures = write_pictures(tmp_path / "there", names)
    bodies = {f"/{name}": (pictures / name).read_bytes() for name in names}
    event, rng = threading.Event(), random.Random()

    def respond_late(head):
        event.wait(rng.uniform(0, 0.02))
        body = bodies.get(head.split(" ")[1])
        return response(404) if body is None else response(body=body)

    with FakeHost(respond_late) as host:
        yield host


def test_bytes_do_not_depend_on_the_concurrency_of_requests_nor_on_the_order_of_responses(
    slow_host, tmp_path
):
    builds = []
    for concurrency in (1, 16, 256, 256):
        folder = tmp_path / str(len(builds))
        write_rows(folder / "raw", toy_rows(30))
        politeness = {"concurrency": concurrency, "per_host": 64}
        routes = {"connect_to": {"*": slow_host.origin}}
        recipe = toy_recipe(part_records=12, fetch={**politeness, **routes})
        source_build = replace(toy_source_build(folder, recipe, pictures=folder), images=(WEB,))
        manifest = toy_build(source_build)
        builds.append((manifest.digest, digests(source_build)))

    assert manifest.sources["cc3m"].counts.failed == {"http_404": 2}
    assert all(one == builds[0] for one in builds)


@pytest.mark.parametrize(("workers", "share"), [(1, 1), (2, 2), (8, 2)])
def test_parts_have_the_number_of_workers_that_share_the_hosts(toy, tmp_path, workers, share):
    given_workers = []

    class RecordingPool:
        def __init__(self):
            self.workers = workers

        def run(self, function, tasks, on_progress):
            for task in tasks:
                given_workers.append(getattr(getattr(task, "shard", None), "workers", None))
                yield task, function(task, partial(on_progress, str(task)))

    toy_build(replace(toy, recipe=toy_recipe(part_records=12)), RecordingPool())  # two parts

    assert [one for one in given_workers if one] == [share] * 2


def test_a_part_reports_that_the_network_is_down_and_resumes_when_it_is_up(tmp_path, monkeypatch):
    getaddrinfo, reports = socket.getaddrinfo, []

    def failing_getaddrinfo(*_args, **keywords):
        if not any(counts.get("cut") for counts in reports):  # the network is up once reported
            raise socket.gaierror(socket.EAI_AGAIN, "no name server")
        return getaddrinfo("127.0.0.1", None, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", failing_getaddrinfo)
    monkeypatch.setattr(rate_limiter, "_FIRST_OFFLINE_SECONDS", 0.3)
    monkeypatch.setattr(pipeline, "_IDLE_SECONDS", 0.05)
    body = (write_pictures(tmp_path / "there", ["1.jpg"]) / "1.jpg").read_bytes()
    rows = [(f"picture {n}", f"http://{n}.example/1.jpg") for n in range(20)]
    write_rows(tmp_path / "raw", rows)
    with FakeHost(by_path({"/robots.txt": response(404), "/1.jpg": response(body=body)})) as host:
        fetch = {"connect_to": {"*": f"http://somewhere.example:{host.port}"}, "concurrency": 4}
        source_build = toy_source_build(tmp_path, toy_recipe(fetch=fetch), pictures=tmp_path)
        monkeypatch.setattr(
            build_module, "build_part", lambda task, _: build_part(task, reports.append)
        )
        manifest = toy_build(replace(source_build, images=(WEB,)))

    counts = manifest.sources["cc3m"].counts
    assert counts.kept >= 10  # the requests before the network counted as down may have failed
    assert counts.kept + sum(counts.failed.values()) == 20
    assert max(counts.get("cut", 0) for counts in reports) == 1
    assert reports[-1].get("cut", 0) == 0


def test_an_address_of_several_records_is_requested_once(tmp_path):
    body = (write_pictures(tmp_path / "there", ["1.jpg"]) / "1.jpg").read_bytes()
    names = ["1.jpg", "1.jpg#a", "1.jpg#b"]
    records = [record(f"{n:016x}", f"http://a.test/{name}") for n, name in enumerate(names)]
    with FakeHost(by_path({"/robots.txt": response(404), "/1.jpg": response(body=body)})) as host:
        recipe = toy_recipe(fetch={"connect_to": {"*": host.origin}})
        build = ShardBuild(recipe, 0, str(tmp_path))

        results = list(fetch_images(build, records, lambda _: None))

    assert host.paths == ["/robots.txt", "/1.jpg"]
    assert [result.image.content for result in results] == [body] * 3


def record(key, url):
    """A record of an index, with one caption."""
    unknown = dict.fromkeys(("file", "licence", "width", "height", "sha256", "meta", "boxes"), None)
    return IndexRecord(
        key=key, id=key, url=url, captions=["a"], fields=["caption"], spans=[0], rows=[0], **unknown
    )


def test_parts_that_are_built_at_the_same_time_do_not_disturb_each_other(toy):
    first = toy_build(toy)
    content = digests(toy)
    for name in ("00000.json", "00003.json"):
        files(toy)[name].unlink()

    with open_pool("local", 2, None) as pool:
        assert toy_build(toy, pool) == first

    assert digests(toy) == content
    assert not [name for name in files(toy) if name.endswith(".tmp")]


def test_a_limit_builds_the_first_records_in_key_order(toy, tmp_path):
    whole = toy_build(toy)
    keys = pl.concat(
        [
            pl.read_parquet(path)
            for name, path in sorted(files(toy).items())
            if name.endswith("parquet")
        ]
    )["key"].to_list()
    write_rows(tmp_path / "few" / "raw", toy_rows(30))
    source_build = toy_source_build(
        tmp_path / "few", toy_recipe(part_records=6), pictures=Path(toy.images[0]), limit=10
    )

    few = toy_build(source_build)

    built = pl.concat(
        [
            pl.read_parquet(path)
            for name, path in sorted(files(source_build).items())
            if name.endswith("parquet")
        ]
    )["key"].to_list()
    assert built == keys[:10]
    counts = few.sources["cc3m"].counts
    assert counts.unaccounted() == 0
    assert counts.dropped["limit"] == counts.pairs_in - counts.kept - sum(counts.failed.values())
    assert few.sources["cc3m"].limit == 10
    assert whole.sources["cc3m"].counts.pairs_in == counts.pairs_in


def test_raising_the_limit_builds_only_the_missing_parts(toy):
    source_build = toy_source_build(
        Path(toy.data).parent, toy.recipe, pictures=Path(toy.images[0]), limit=12
    )
    toy_build(source_build)
    before = {name: path.stat().st_mtime_ns for name, path in files(toy).items()}

    toy_build(toy)

    whole_parts = sorted(name for name in before if name.endswith(".tar"))[:-1]
    for name in whole_parts:
        assert files(toy)[name].stat().st_mtime_ns == before[name]


def test_the_ledger_locates_every_byte_of_the_tar(toy):
    toy_build(toy)

    for name, path in files(toy).items():
        if not name.endswith(".parquet"):
            continue
        content = path.with_suffix(".tar").read_bytes()
        with tarfile.open(fileobj=BytesIO(content)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        rows = pl.read_parquet(path).filter(pl.col("status") == "success")
        assert len(members) == 3 * len(rows)
        for row in rows.iter_rows(named=True):
            image = content[row["image_offset"] :][: row["image_size"]]
            metadata = content[row["json_offset"] :][: row["json_size"]]
            assert image == members[f"{row['key']}.jpg"]
            assert metadata == members[f"{row['key']}.json"]
            assert json.loads(metadata)["captions"][0] == row["caption"]
            assert members[f"{row['key']}.txt"].decode() == row["caption"]


def test_the_tar_has_no_times_owners_or_modes_of_its_builder(toy):
    toy_build(toy)

    with tarfile.open(files(toy)["00000.tar"]) as tar:
        members = tar.getmembers()

    assert [member.name for member in members] == sorted(member.name for member in members)
    assert all(member.name.count(".") == 1 for member in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }
    assert files(toy)["00000.tar"].read_bytes()[257:265] == b"ustar\x0000"


def test_the_report_has_the_digests_of_its_files(toy):
    toy_build(toy)

    for name, path in files(toy).items():
        if name.endswith(".json"):
            report = Report.model_validate_json(path.read_bytes())
            for file in (report.tar, report.ledger):
                content = path.with_name(file.name).read_bytes()
                assert file.sha256 == hashlib.sha256(content).hexdigest()
                assert file.num_bytes == len(content)


def test_an_image_with_another_aspect_ratio_than_upstreams_fails(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    images = [
        {"image_id": n, "url": f"https://a.test/VG_100K/{n}.jpg", "width": 480, "height": 400,
         "coco_id": None, "flickr_id": None}
        for n in (1, 2)
    ]  # fmt: skip
    region = {"x": 40, "y": 50, "width": 120, "height": 100, "phrase": "a red dog"}
    regions = [{"id": n, "regions": [{**region, "image_id": n, "region_id": n}]} for n in (1, 2)]
    (raw / "image_data.json").write_text(json.dumps(images))
    (raw / "region_descriptions.json").write_text(json.dumps(regions))
    pictures = write_pictures(tmp_path / "pictures", ["1.jpg"], side=40)  # 48 x 40: fits
    Image.new("RGB", (40, 48)).save(pictures / "2.jpg", "JPEG")
    source_build = toy_source_build(tmp_path, load_recipe("visual_genome")[0], pictures=pictures)

    manifest = toy_build(source_build)

    counts = manifest.sources["visual_genome"].counts
    assert (counts.kept, counts.failed) == (1, {"wrong_size": 1})
    with tarfile.open(Path(source_build.shards) / "00000.tar") as tar:
        sample = json.load(tar.extractfile(next(m for m in tar if m.name.endswith("json"))))
    assert sample["boxes"] == [pytest.approx([1 / 12, 1 / 8, 1 / 3, 3 / 8])]


def test_index_and_shards_may_be_at_any_fsspec_address(toy, tmp_path):
    local = toy_build(toy)
    remote = SourceBuild(
        recipe=toy.recipe,
        raw=toy.raw,
        data="memory://toy",
        manifest="memory://toy/manifests/cc3m.json",
        images=toy.images,
    )

    first, second = toy_build(remote), toy_build(remote)

    assert first == second
    assert first.digest == local.digest
    assert load_manifest(remote.manifest) == first
    assert first.shards[0].path == "memory://toy/shards/cc3m/00000.tar"
