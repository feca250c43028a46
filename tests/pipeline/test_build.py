"""Laws of shards: conservation, determinism, idempotence, and a ledger that finds every byte."""

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
from toy import toy_build, toy_order, toy_recipe, toy_rows, write_pictures, write_rows

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.build import pipeline as flow
from pmd_pipeline.build.image_locations import WEB
from pmd_pipeline.build.part import build_part
from pmd_pipeline.build.shard import ShardBuild, fetch_images
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.contract.models import Report
from pmd_pipeline.dataset import build as dataset
from pmd_pipeline.dataset.source_build import SourceBuild
from pmd_pipeline.images.fetch import rate_limiter
from pmd_pipeline.index.records import IndexRecord
from pmd_pipeline.recipe import load_recipe

KINDS = ("good", "missing", "html", "empty", "truncated", "tiny")


def write_kinds(folder: Path, kinds: list[str]) -> Path:
    """A picture, or what stands in its place, for each kind."""
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
    return toy_order(tmp_path, toy_recipe(part_records=6), pictures=pictures)


def files(order):
    return {path.name: path for path in Path(order.shards).iterdir()}


def digests(order):
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files(order).items()
        if not name.endswith(".json")
    }


@settings(max_examples=15)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
def test_every_pair_is_kept_dropped_or_failed(tmp_path_factory, kinds):
    folder = tmp_path_factory.mktemp("build")
    write_rows(folder / "raw", toy_rows(len(kinds)))
    pictures = write_kinds(folder / "pictures", kinds)
    recipe = toy_recipe(images={"filters": {"is_large": {"least": 8}}}, part_records=5)

    manifest = toy_build(toy_order(folder, recipe, pictures=pictures))

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


def test_a_second_run_does_nothing_and_says_the_same(toy, monkeypatch):
    first = toy_build(toy)
    before = {name: path.stat().st_mtime_ns for name, path in files(toy).items()}

    monkeypatch.setattr(dataset, "build_part", None)  # would fail if it were called

    assert toy_build(toy) == first
    assert {name: path.stat().st_mtime_ns for name, path in files(toy).items()} == before


@pytest.mark.parametrize("ending", [".tar", ".parquet", ".json"])
def test_a_part_that_lost_a_file_is_built_again_and_no_other(toy, ending):
    first = toy_build(toy)
    content = digests(toy)
    before = {name: path.stat().st_mtime_ns for name, path in files(toy).items()}
    files(toy)[f"00001{ending}"].unlink()

    assert toy_build(toy) == first

    assert digests(toy) == content
    after = {name: path.stat().st_mtime_ns for name, path in files(toy).items()}
    touched = {name for name in after if after[name] != before[name]}
    assert touched == {"00001.tar", "00001.parquet", "00001.json"}


def test_a_part_cut_short_is_built_again(toy):
    first = toy_build(toy)
    tar = files(toy)["00002.tar"]
    tar.write_bytes(tar.read_bytes()[:-1])

    assert toy_build(toy) == first


def test_a_damaged_ledger_is_one_sentence_which_helps(toy):
    before = toy_build(toy)
    ledger = Path(toy.shards) / "00001.parquet"
    ledger.write_bytes(ledger.read_bytes()[:-20] + bytes(20))

    with pytest.raises(PmdError, match=r"00001\.parquet is no whole Parquet .*: delete the \.json"):
        toy_build(toy)

    ledger.with_suffix(".json").unlink()
    assert toy_build(toy).digest == before.digest


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_index_is_one_sentence_which_helps(toy, workers):
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


def test_a_report_is_not_believed_when_its_rules_have_changed(toy):
    first = toy_build(toy)
    smaller = toy_order(
        Path(toy.data).parent,
        toy_recipe(part_records=6, images={"size": 20}),
        pictures=Path(toy.images[0]),
    )

    second = toy_build(smaller)

    assert second.digest != first.digest
    ledger = pl.read_parquet(files(toy)["00000.parquet"])
    assert set(ledger["height"].drop_nulls()) == {20}


@pytest.mark.parametrize("concurrency", [1, 16])
def test_bytes_do_not_depend_on_how_many_threads_fetch(toy, tmp_path, concurrency):
    toy_build(toy)
    recipe = toy_recipe(part_records=6, fetch={"concurrency": concurrency})
    write_rows(tmp_path / "other" / "raw", toy_rows(30))
    other = toy_order(tmp_path / "other", recipe, pictures=Path(toy.images[0]))

    toy_build(other)

    assert digests(other) == digests(toy)


@pytest.fixture
def dawdling(tmp_path):
    """A host of thirty pictures, two of them missing, that answers when it likes."""
    names = [f"{n}.jpg" for n in range(28)]
    pictures = write_pictures(tmp_path / "there", names)
    bodies = {f"/{name}": (pictures / name).read_bytes() for name in names}
    pause, dice = threading.Event(), random.Random()

    def late(head):
        pause.wait(dice.uniform(0, 0.02))
        body = bodies.get(head.split(" ")[1])
        return response(404) if body is None else response(body=body)

    with FakeHost(late) as host:
        yield host


def test_bytes_do_not_depend_on_how_many_are_asked_for_at_once_nor_on_who_answers_first(
    dawdling, tmp_path
):
    found = []
    for concurrency in (1, 16, 256, 256):
        folder = tmp_path / str(len(found))
        write_rows(folder / "raw", toy_rows(30))
        manners = {"concurrency": concurrency, "per_host": 64}
        places = {"connect_to": {"*": dawdling.origin}}
        recipe = toy_recipe(part_records=12, fetch={**manners, **places})
        order = replace(toy_order(folder, recipe, pictures=folder), images=(WEB,))
        manifest = toy_build(order)
        found.append((manifest.digest, digests(order)))

    assert manifest.sources["cc3m"].counts.failed == {"http_404": 2}
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize(("workers", "share"), [(1, 1), (2, 2), (8, 2)])
def test_parts_know_how_many_are_built_beside_them_and_ask_the_same_hosts(
    toy, tmp_path, workers, share
):
    told = []

    class Somewhere:
        def __init__(self):
            self.workers = workers

        def run(self, function, tasks, watch):
            for task in tasks:
                told.append(getattr(getattr(task, "shard", None), "workers", None))
                yield task, function(task, partial(watch, str(task)))

    toy_build(replace(toy, recipe=toy_recipe(part_records=12)), Somewhere())  # two parts

    assert [one for one in told if one] == [share] * 2


def test_a_part_tells_that_the_network_is_cut_and_goes_on_when_it_is_mended(tmp_path, monkeypatch):
    lead, ticks = socket.getaddrinfo, []

    def cut(*_args, **keywords):
        if not any(tick.get("cut") for tick in ticks):  # mended once it is told
            raise socket.gaierror(socket.EAI_AGAIN, "no name server")
        return lead("127.0.0.1", None, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", cut)
    monkeypatch.setattr(rate_limiter, "_FIRST_OFFLINE_SECONDS", 0.3)
    monkeypatch.setattr(flow, "_IDLE_SECONDS", 0.05)
    body = (write_pictures(tmp_path / "there", ["1.jpg"]) / "1.jpg").read_bytes()
    rows = [(f"picture {n}", f"http://{n}.example/1.jpg") for n in range(20)]
    write_rows(tmp_path / "raw", rows)
    with FakeHost(by_path({"/robots.txt": response(404), "/1.jpg": response(body=body)})) as host:
        fetch = {"connect_to": {"*": f"http://somewhere.example:{host.port}"}, "concurrency": 4}
        order = toy_order(tmp_path, toy_recipe(fetch=fetch), pictures=tmp_path)
        monkeypatch.setattr(dataset, "build_part", lambda task, _: build_part(task, ticks.append))
        manifest = toy_build(replace(order, images=(WEB,)))

    counts = manifest.sources["cc3m"].counts
    assert counts.kept >= 10  # those that showed that the network is cut may have failed
    assert counts.kept + sum(counts.failed.values()) == 20
    assert max(tick.get("cut", 0) for tick in ticks) == 1
    assert ticks[-1].get("cut", 0) == 0


def test_an_address_that_several_records_share_is_asked_once(tmp_path):
    body = (write_pictures(tmp_path / "there", ["1.jpg"]) / "1.jpg").read_bytes()
    names = ["1.jpg", "1.jpg#a", "1.jpg#b"]
    records = [record(f"{n:016x}", f"http://a.test/{name}") for n, name in enumerate(names)]
    with FakeHost(by_path({"/robots.txt": response(404), "/1.jpg": response(body=body)})) as host:
        recipe = toy_recipe(fetch={"connect_to": {"*": host.origin}})
        build = ShardBuild(recipe, 0, str(tmp_path))

        outcomes = list(fetch_images(build, records, lambda _: None))

    assert host.paths == ["/robots.txt", "/1.jpg"]
    assert [outcome.image.content for outcome in outcomes] == [body] * 3


def record(key, url):
    """A record as an index has it, with one caption."""
    unknown = dict.fromkeys(("file", "licence", "width", "height", "sha256", "meta", "boxes"), None)
    return IndexRecord(
        key=key, id=key, url=url, captions=["a"], fields=["caption"], spans=[0], rows=[0], **unknown
    )


def test_two_builds_of_one_part_do_not_meet(toy):
    first = toy_build(toy)
    content = digests(toy)
    for name in ("00000.json", "00003.json"):
        files(toy)[name].unlink()

    with open_pool("local", 2, None) as pool:
        assert toy_build(toy, pool) == first

    assert digests(toy) == content
    assert not [name for name in files(toy) if name.endswith(".tmp")]


def test_a_limit_takes_the_first_records_in_key_order(toy, tmp_path):
    whole = toy_build(toy)
    keys = pl.concat(
        [
            pl.read_parquet(path)
            for name, path in sorted(files(toy).items())
            if name.endswith("parquet")
        ]
    )["key"].to_list()
    write_rows(tmp_path / "few" / "raw", toy_rows(30))
    order = toy_order(
        tmp_path / "few", toy_recipe(part_records=6), pictures=Path(toy.images[0]), limit=10
    )

    few = toy_build(order)

    built = pl.concat(
        [
            pl.read_parquet(path)
            for name, path in sorted(files(order).items())
            if name.endswith("parquet")
        ]
    )["key"].to_list()
    assert built == keys[:10]
    counts = few.sources["cc3m"].counts
    assert counts.unaccounted() == 0
    assert counts.dropped["limit"] == counts.pairs_in - counts.kept - sum(counts.failed.values())
    assert few.sources["cc3m"].limit == 10
    assert whole.sources["cc3m"].counts.pairs_in == counts.pairs_in


def test_raising_the_limit_builds_only_what_is_missing(toy):
    order = toy_order(Path(toy.data).parent, toy.recipe, pictures=Path(toy.images[0]), limit=12)
    toy_build(order)
    before = {name: path.stat().st_mtime_ns for name, path in files(toy).items()}

    toy_build(toy)

    whole_parts = sorted(name for name in before if name.endswith(".tar"))[:-1]
    for name in whole_parts:
        assert files(toy)[name].stat().st_mtime_ns == before[name]


def test_the_ledger_finds_every_byte_of_the_tar(toy):
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
            described = content[row["json_offset"] :][: row["json_size"]]
            assert image == members[f"{row['key']}.jpg"]
            assert described == members[f"{row['key']}.json"]
            assert json.loads(described)["captions"][0] == row["caption"]
            assert members[f"{row['key']}.txt"].decode() == row["caption"]


def test_the_tar_tells_nothing_of_when_where_or_by_whom_it_was_made(toy):
    toy_build(toy)

    with tarfile.open(files(toy)["00000.tar"]) as tar:
        members = tar.getmembers()

    assert [member.name for member in members] == sorted(member.name for member in members)
    assert all(member.name.count(".") == 1 for member in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }
    assert files(toy)["00000.tar"].read_bytes()[257:265] == b"ustar\x0000"


def test_the_report_holds_the_digests_of_its_files(toy):
    toy_build(toy)

    for name, path in files(toy).items():
        if name.endswith(".json"):
            report = Report.model_validate_json(path.read_bytes())
            for file in (report.tar, report.ledger):
                content = path.with_name(file.name).read_bytes()
                assert file.sha256 == hashlib.sha256(content).hexdigest()
                assert file.num_bytes == len(content)


def test_images_of_other_proportions_than_upstreams_do_not_get_its_boxes(tmp_path):
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
    order = toy_order(tmp_path, load_recipe("visual_genome")[0], pictures=pictures)

    manifest = toy_build(order)

    counts = manifest.sources["visual_genome"].counts
    assert (counts.kept, counts.failed) == (1, {"wrong_size": 1})
    with tarfile.open(Path(order.shards) / "00000.tar") as tar:
        sample = json.load(tar.extractfile(next(m for m in tar if m.name.endswith("json"))))
    assert sample["boxes"] == [pytest.approx([1 / 12, 1 / 8, 1 / 3, 3 / 8])]


def test_index_and_shards_may_lie_under_any_fsspec_address(toy, tmp_path):
    here = toy_build(toy)
    away = SourceBuild(
        recipe=toy.recipe,
        raw=toy.raw,
        data="memory://toy",
        manifest="memory://toy/manifests/cc3m.json",
        images=toy.images,
    )

    first, second = toy_build(away), toy_build(away)

    assert first == second
    assert first.digest == here.digest
    assert load_manifest(away.manifest) == first
    assert first.shards[0].path == "memory://toy/shards/cc3m/00000.tar"
