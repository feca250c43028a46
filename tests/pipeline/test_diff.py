import json
import random
import shutil
import sys
from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import QUIET, toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

from pmd_pipeline import cli
from pmd_pipeline.base.record import key_of
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest, save_manifest
from pmd_pipeline.dataset.manifest import merge_manifests
from pmd_pipeline.inspect import diff
from pmd_pipeline.inspect.diff import as_lines, compare


def key(number):
    return key_of("cc3m", f"http://a.test/{number}.jpg")


def build(folder, rows, names, **changes):
    """The manifest of a toy build in `folder`, of the pictures of these names."""
    write_rows(folder / "raw", rows)
    write_pictures(folder / "pictures", names)
    order = toy_source_build(folder, toy_recipe(**changes), pictures=folder / "pictures")
    toy_build(order)
    return order.manifest


def differences(before, after):
    with QUIET.stage("diff", "records") as stage:
        return compare(str(before), str(after), stage)


@pytest.fixture
def before(tmp_path):
    names = [f"{number}.jpg" for number in range(20)]
    return build(tmp_path / "before", toy_rows(24), names, part_records=6)


def test_a_dataset_is_equal_to_its_copy_in_another_folder(before, tmp_path):
    shutil.copytree(tmp_path / "before", tmp_path / "moved")

    found = differences(before, tmp_path / "moved" / "manifests" / "cc3m.json")

    assert found.are_equal
    assert found.sources == []
    assert list(as_lines(found))[-1] == "the same dataset"


def test_gained_lost_and_changed_images_and_pairs_are_counted(before, tmp_path):
    folder = tmp_path / "after"
    write_pictures(folder / "other", ["100.jpg"], side=60)
    names = [f"{number}.jpg" for number in (*range(2, 20), 20, 21, 22)]
    write_pictures(folder / "pictures", names)
    (folder / "other" / "100.jpg").rename(folder / "pictures" / "5.jpg")
    rows = [("a new word of picture 7" if n == 7 else text, url)
            for n, (text, url) in enumerate(toy_rows(24))
            if text != "picture 3 once more"]  # fmt: skip
    write_rows(folder / "raw", [*rows, ("a third caption of 9", "http://a.test/9.jpg")])
    order = toy_source_build(folder, toy_recipe(part_records=6), pictures=folder / "pictures")
    toy_build(order)

    [found] = differences(before, order.manifest).sources

    assert found.images == {
        "gained": 3, "lost": 2, "changed": 1, "with another caption": 1
    }  # fmt: skip
    assert found.pairs == {"gained": 3 + 1 + 1, "lost": 2 + 1 + 1}  # 0 and 21 have two captions
    assert found.examples["lost"] == sorted([key(0), key(1)])
    assert found.examples["gained"] == sorted(key(n) for n in (20, 21, 22))
    assert found.examples["changed"] == [key(5)]
    assert found.examples["with another caption"] == [key(7)]
    assert found.gained["not_in_archive"] == 3
    assert found.lost["not_in_archive"] == 2


def test_rules_and_upstream_files_are_compared_value_by_value(before, tmp_path):
    shutil.copytree(tmp_path / "before" / "raw", tmp_path / "after" / "raw")
    names = [f"{number}.jpg" for number in range(20)]
    after = build(tmp_path / "after", toy_rows(23), names, images={"size": 32}, part_records=6)

    [found] = differences(before, after).sources

    changes = [str(change) for change in found.changes]
    assert "rules.images.size: 256 -> 32" in changes
    assert any(one.startswith("upstream.GCC-training.tsv: ") for one in changes)
    assert "counts.pairs_in: 32 -> 31" in changes
    assert found.images == {"stored otherwise": 20}
    assert found.moved == {"not_in_archive -> absent": 1}


def test_another_division_into_parts_changes_no_images(before, tmp_path):
    names = [f"{number}.jpg" for number in range(20)]
    after = build(tmp_path / "after", toy_rows(24), names, part_records=9)

    [found] = differences(before, after).sources

    assert (found.images, found.pairs, found.moved) == ({}, {}, {})
    assert [str(change) for change in found.changes] == ["rules.part_records: 6 -> 9"]
    assert found.shards["with other bytes"] > 0


def test_records_beyond_a_limit_are_absent(before, tmp_path):
    shutil.copytree(tmp_path / "before", tmp_path / "short")
    recipe, pictures = toy_recipe(part_records=6), tmp_path / "before" / "pictures"
    toy_build(short := toy_source_build(tmp_path / "short", recipe, pictures=pictures, limit=8))

    [found] = differences(before, short.manifest).sources

    kept = 20 - load_manifest(short.manifest).sources["cc3m"].images
    assert found.lost == {"absent": kept}
    assert "limit: null -> 8" in [str(change) for change in found.changes]


def test_a_missing_source_and_another_version_are_differences(before, tmp_path):
    manifest = load_manifest(before)
    both = merge_manifests("two", before, [(before, manifest)])
    other = both.model_copy(update={"sources": {}, "shards": [], "versions": {"pillow": "1"}})
    save_manifest(
        f"{tmp_path}/none.json", other.model_copy(update={"digest": other.computed_digest()})
    )

    found = differences(before, tmp_path / "none.json")

    assert [one.there for one in found.sources] == ["before"]
    assert "cc3m: only before" in list(as_lines(found))
    assert any(str(change).startswith("versions.pillow: ") for change in found.changes)


def test_datasets_of_two_kinds_are_not_compared(before, tmp_path):
    other = load_manifest(before).model_copy(update={"kind": "images"})
    save_manifest(
        f"{tmp_path}/i.json", other.model_copy(update={"digest": other.computed_digest()})
    )

    with pytest.raises(PmdError, match="cannot be compared"):
        differences(before, tmp_path / "i.json")


def test_a_broken_ledger_is_one_sentence(before, tmp_path):
    names = [f"{number}.jpg" for number in range(19)]
    after = build(tmp_path / "after", toy_rows(24), names, part_records=6)
    for ledger in (tmp_path / "after" / "data" / "shards" / "cc3m").glob("*.parquet"):
        ledger.write_bytes(b"PAR1 and no more")

    with pytest.raises(PmdError, match=r"0000\d\.parquet is no whole ledger: run pmd verify"):
        differences(before, after)


@given(st.integers(0, 2**32))
def test_ledgers_are_joined_by_key_for_any_batches(seed):
    dice = random.Random(seed)
    sides = [sorted(dice.sample(range(100), dice.randrange(100))) for _ in range(2)]

    def frames(numbers):
        while numbers:
            cut = dice.randrange(1, 20)
            rows = {name: [None] * len(numbers[:cut]) for name in diff._COLUMNS}
            rows |= {"key": [f"{n:03d}" for n in numbers[:cut]], "num_pairs": numbers[:cut]}
            yield pl.DataFrame(rows, schema=diff._NO_ROWS.schema)
            numbers = numbers[cut:]

    joined = [
        (row["key"], row["num_pairs"], row["num_pairs_right"])
        for frame in diff._join_by_key(*map(frames, sides))
        for row in frame.iter_rows(named=True)
    ]

    one, two = map(set, sides)
    assert joined == [
        (f"{n:03d}", n if n in one else None, n if n in two else None) for n in sorted(one | two)
    ]


def test_the_command_exits_with_1_if_datasets_differ(before, tmp_path, monkeypatch, capsys):
    names = [f"{number}.jpg" for number in range(19)]
    after = build(tmp_path / "after", toy_rows(24), names, part_records=6)
    (tmp_path / "after" / "nothing.json").write_text("{}")

    def pmd(*arguments):
        monkeypatch.setattr(sys, "argv", ["pmd", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, capsys.readouterr()

    same, printed = pmd("diff", before, before)
    other, as_json = pmd("diff", before, after, "--json", "--quiet")
    wrong, refused = pmd("diff", before, tmp_path / "after" / "nothing.json")

    assert (same, other, wrong) == (0, 1, 2)
    assert printed.out.endswith("the same dataset\n")
    [source] = json.loads(as_json.out)["sources"]
    assert source["lost"] == {"not_in_archive": 1}
    assert as_json.err == ""
    assert refused.err.count("\n") == 1
    assert Counter(source["images"]) == {"lost": 1}
