"""One image under many URLs is reported, since it is often a placeholder for removed images."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from toy import QUIET, toy_build, toy_recipe, toy_source_build, write_pictures, write_rows

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.contract.manifest import load_manifest, save_manifest
from pmd_pipeline.dataset import manifest as manifest_module
from pmd_pipeline.dataset.build import build_source
from pmd_pipeline.dataset.manifest import MANY, count_equal
from pmd_pipeline.inspect.diff import as_lines, compare
from pmd_pipeline.inspect.stats import remarks
from pmd_pipeline.inspect.verify.dataset import verify
from pmd_pipeline.publish.lockfile.lock import lock
from pmd_pipeline.publish.lockfile.rebuild import RebuildRequest, rebuild
from pmd_pipeline.shards.optout import REASON, add_to_list

NUM, SAME = 40, 12


@pytest.fixture
def source_build(tmp_path):
    """Forty URLs in five parts, of which twelve, in several parts, have the same image."""
    names = [f"{number}.jpg" for number in range(NUM)]
    folder = write_pictures(tmp_path / "pictures", names)
    for name in names[:SAME]:
        (folder / name).write_bytes((folder / "0.jpg").read_bytes())
    for name in names[SAME : SAME + MANY - 1]:  # one record below the threshold
        (folder / name).write_bytes((folder / f"{SAME}.jpg").read_bytes())
    write_rows(tmp_path / "raw", [(f"picture {n}", f"http://a.test/{n}.jpg") for n in range(NUM)])
    return toy_source_build(tmp_path, toy_recipe(part_records=8), pictures=folder)


def sha256(source_build, number):
    return hashlib.sha256(Path(source_build.images[0], f"{number}.jpg").read_bytes()).hexdigest()


def test_the_manifest_and_the_build_report_an_image_that_many_records_share(source_build):
    output = io.StringIO()
    with open_pool("local", 1, None) as pool:
        manifest, _ = build_source(
            source_build, pool, Reporter(Console(file=output, width=300), quiet=True)
        )

    assert manifest.sources["cc3m"].repeated == {sha256(source_build, 0): SAME}
    [sentence] = remarks(manifest)[-1:]
    assert sentence == (
        f"cc3m: 12 records share one picture; if it stands for removed ones, give --optout a file "
        f"with the line {sha256(source_build, 0)}"
    )
    assert sentence in output.getvalue()


def test_the_line_that_is_printed_excludes_the_image(source_build, tmp_path):
    before = toy_build(source_build)
    save_manifest(str(tmp_path / "manifests" / "before.json"), before)
    (tmp_path / "list.txt").write_text(sha256(source_build, 0))
    add_to_list(source_build.data, str(tmp_path / "list.txt"))

    now = toy_build(source_build)

    entry = now.sources["cc3m"]
    assert entry.counts.dropped[REASON] == SAME
    assert (entry.images, entry.repeated) == (before.sources["cc3m"].images - SAME, {})
    with QUIET.stage("diff", "records") as stage:
        differences = compare(
            str(tmp_path / "manifests" / "before.json"), source_build.manifest, stage
        )
    assert not any("repeated" in line for line in as_lines(differences))


def test_verify_counts_repeated_images_again(source_build):
    manifest = toy_build(source_build)
    entry = manifest.sources["cc3m"]
    wrong = entry.model_copy(update={"repeated": {sha256(source_build, 0): SAME + 1}})
    changed = manifest.model_copy(update={"sources": {"cc3m": wrong}, "digest": ""})
    changed = changed.model_copy(update={"digest": changed.computed_digest()})

    with open_pool("local", 1, None) as pool:
        assert [str(one) for one in verify(source_build.manifest, pool, QUIET)] == []
        save_manifest(source_build.manifest, changed)
        [fault] = [str(one) for one in verify(source_build.manifest, pool, QUIET)]

    name = sha256(source_build, 0)[:16]
    assert fault.endswith(f"the manifest states 13 images of sha256 {name}..., the shards have 12")


def test_a_rebuild_reports_the_same_and_counts_missing_images(source_build, tmp_path):
    result = toy_build(source_build)
    with open_pool("local", 1, None) as pool:
        lock(source_build.manifest, str(tmp_path / "kit"), pool, QUIET, hashed=False)
        again = RebuildRequest(
            lockfile=str(tmp_path / "kit"),
            out=str(tmp_path / "again"),
            manifests=str(tmp_path / "again"),
            images=source_build.images,
        )
        assert rebuild(again, pool, QUIET).manifest.digest == result.digest

        less = write_pictures(tmp_path / "less", [])
        for number in range(1, NUM):  # one of the twelve is missing
            name = f"{number}.jpg"
            (less / name).write_bytes((tmp_path / "pictures" / name).read_bytes())
        fewer = replace(
            again,
            out=str(tmp_path / "fewer"),
            manifests=str(tmp_path / "fewer"),
            images=(str(less),),
        )
        counted = rebuild(fewer, pool, QUIET).manifest.sources["cc3m"].repeated
    assert counted == {sha256(source_build, 1): SAME - 1}
    assert load_manifest(source_build.manifest).digest == result.digest


def test_a_rebuild_reports_images_that_are_the_most_repeated_after_others_are_missing(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(manifest_module, "_MAX_REPEATED", 1)
    names = [f"{number}.jpg" for number in range(25)]
    folder = write_pictures(tmp_path / "pictures", names)
    for number, name in enumerate(names):  # thirteen of one, twelve of another
        (folder / name).write_bytes((folder / f"{number % 2}.jpg").read_bytes())
    write_rows(tmp_path / "raw", [(f"picture {n}", f"http://a.test/{n}.jpg") for n in range(25)])
    source_build = toy_source_build(tmp_path, toy_recipe(part_records=8), pictures=folder)
    assert toy_build(source_build).sources["cc3m"].repeated == {sha256(source_build, 0): 13}
    with open_pool("local", 1, None) as pool:
        lock(source_build.manifest, str(tmp_path / "kit"), pool, QUIET, hashed=False)
        for number in (0, 2, 4):
            (folder / f"{number}.jpg").unlink()
        again = RebuildRequest(
            lockfile=str(tmp_path / "kit"),
            out=str(tmp_path / "again" / "data"),
            manifests=str(tmp_path / "again"),
            images=source_build.images,
        )
        result = rebuild(again, pool, QUIET)
        assert result.manifest.sources["cc3m"].repeated == {sha256(source_build, 1): 12}
        assert [str(one) for one in verify(result.path, pool, QUIET)] == []


@given(st.lists(st.lists(st.integers(0, 9)), max_size=6))
def test_copies_are_counted_over_all_shards(shards):
    hashes = [np.array(shard, dtype=np.uint64) for shard in shards]
    flat = [one for shard in shards for one in shard]

    unique, copies = count_equal(hashes)

    assert unique == len(set(flat))
    assert copies == {f"{n:016x}": flat.count(n) for n in range(10) if flat.count(n) >= MANY}


def test_only_the_most_repeated_are_reported():
    copies = [np.repeat(np.arange(30, dtype=np.uint64), MANY + np.arange(30))]

    _, reported = count_equal(copies)

    assert reported == {f"{n:016x}": MANY + n for n in range(10, 30)}
    assert list(reported) == sorted(reported)
    assert json.dumps(reported)
