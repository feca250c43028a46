"""The index: conservation, order, determinism, and records of rows that are far apart upstream."""

import json
import random
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import index_of, toy_recipe, toy_rows, write_rows

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.base.record import key_of
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.index import build as build_module
from pmd_pipeline.index import external_sort, scatter
from pmd_pipeline.index.build import Index, load_index
from pmd_pipeline.index.records import part_of, read_part
from pmd_pipeline.index.scatter import estimated_records
from pmd_pipeline.recipe import load_recipe
from pmd_pipeline.sources.upstream import files as upstream

words = st.sampled_from(["a dog", "two cats", "", "ein Hund", "\u2028", "x" * 50, "  blank  "])
addresses = st.sampled_from(
    ["http://a.test/1.jpg", "http://a.test/2.jpg", "HTTP://A.test/1.jpg", "ftp://a.test/3.jpg", ""]
)
lines = st.one_of(
    st.builds("{}\t{}".format, words, addresses),
    st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=20),
)


def build(folder: Path, raw: Path, **changes: object) -> Index:
    with open_pool("local", 1, None) as pool:
        return index_of(toy_recipe(**changes), raw, folder, pool)


def records(folder: Path, index: Index) -> list[object]:
    return [record for part in index.parts for record in read_part(str(folder), part)]


def digests(index: Index) -> list[str]:
    return [file.sha256 for part in index.parts for file in (part.kept, part.dropped)]


@given(st.lists(lines, max_size=30))
def test_every_upstream_row_is_kept_or_dropped_with_a_reason(tmp_path_factory, given_lines):
    folder = tmp_path_factory.mktemp("index")
    good = [
        f"a good row {n}\thttp://good.test/{n}" for n in range(3)
    ]  # a file without good rows is refused
    (folder / "raw").mkdir()
    (folder / "raw" / "GCC-training.tsv").write_bytes("\n".join(good + given_lines).encode())

    index = build(folder / "index", folder / "raw")

    num_rows = len(good) + len(given_lines) - bool(given_lines and given_lines[-1] == "")
    assert index.rows == num_rows
    assert index.counts.pairs_in == num_rows
    assert index.counts.unaccounted() == 0
    dropped = [pl.read_parquet(folder / "index" / part.dropped.name) for part in index.parts]
    assert pl.concat(dropped)["reason"].is_not_null().all()
    assert sum(map(len, dropped)) == sum(index.counts.dropped.values())


def test_records_come_in_the_order_of_their_keys_and_parts_are_key_ranges(tmp_path):
    raw = write_rows(tmp_path / "raw", toy_rows(300))

    index = build(tmp_path / "index", raw, part_records=50)

    found = records(tmp_path / "index", index)
    keys = [record.key for record in found]
    assert keys == sorted(key_of("cc3m", f"http://a.test/{n}.jpg") for n in range(300))
    assert len(index.parts) == 6
    for part in index.parts:
        for record in read_part(str(tmp_path / "index"), part):
            assert part_of(record.key, len(index.parts)) == part.part


def test_rows_of_one_image_become_one_record_in_upstream_order(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "SPAN_BYTES", 200)
    monkeypatch.setattr(external_sort, "_FLUSH_LINES", 7)
    raw = write_rows(tmp_path / "raw", toy_rows(90))

    index = build(tmp_path / "index", raw)

    by_url = {record.url: record for record in records(tmp_path / "index", index)}
    assert len(by_url) == 90
    assert by_url["http://a.test/3.jpg"].captions == [
        "a caption of picture 3",
        "picture 3 once more",
    ]
    assert by_url["http://a.test/4.jpg"].captions == ["a caption of picture 4"]


@pytest.mark.parametrize(
    ("span_bytes", "flush_lines", "gather_bytes"), [(99, 5, 400), (1000, 64, 5000)]
)
def test_the_index_does_not_depend_on_the_sizes_of_spans_runs_and_gather_tasks(
    tmp_path, monkeypatch, span_bytes, flush_lines, gather_bytes
):
    raw = write_rows(tmp_path / "raw", toy_rows(200))
    whole = build(tmp_path / "one", raw, part_records=30)
    monkeypatch.setattr(upstream, "SPAN_BYTES", span_bytes)
    monkeypatch.setattr(external_sort, "_FLUSH_LINES", flush_lines)
    monkeypatch.setattr(build_module, "GATHER_BYTES", gather_bytes)

    other = build(tmp_path / "two", raw, part_records=30)

    kept = [part.kept for part in whole.parts]
    assert [r.captions for r in records(tmp_path / "one", whole)] == [
        r.captions for r in records(tmp_path / "two", other)
    ]
    assert [part.kept.name for part in other.parts] == [file.name for file in kept]
    assert other.counts == whole.counts


def test_an_index_is_reused_while_its_dependency_is_the_same(tmp_path, monkeypatch):
    raw = write_rows(tmp_path / "raw", toy_rows(20))
    first = build(tmp_path / "index", raw)

    monkeypatch.setattr(build_module, "scatter", None)  # would fail if it were called

    assert build(tmp_path / "index", raw) == first


@pytest.mark.parametrize(
    "change",
    [
        {"captions": {"choose": "first"}},
        {"captions": {"filters": {"has_words": {"least": 3}}}},
        {"part_records": 7},
    ],
)
def test_an_index_is_made_again_when_its_rules_change(tmp_path, change):
    raw = write_rows(tmp_path / "raw", toy_rows(20))
    first = build(tmp_path / "index", raw)

    assert build(tmp_path / "index", raw, **change).dependency != first.dependency


def test_an_index_is_made_again_when_upstream_changes(tmp_path):
    raw = write_rows(tmp_path / "raw", toy_rows(20))
    first = build(tmp_path / "index", raw)
    write_rows(raw, toy_rows(21))

    second = build(tmp_path / "index", raw)

    assert second.rows > first.rows


def test_an_index_is_made_again_when_one_of_its_files_is_cut_short(tmp_path):
    raw = write_rows(tmp_path / "raw", toy_rows(20))
    first = build(tmp_path / "index", raw)
    broken = tmp_path / "index" / first.parts[0].kept.name
    broken.write_bytes(broken.read_bytes()[:-5])

    again = build(tmp_path / "index", raw)

    assert digests(again) == digests(first)
    assert broken.stat().st_size == first.parts[0].kept.num_bytes


def test_manners_of_fetching_do_not_touch_the_index(tmp_path):
    raw = write_rows(tmp_path / "raw", toy_rows(20))
    first = build(tmp_path / "index", raw)

    assert build(tmp_path / "index", raw, fetch={"timeout": 5}, images={"size": 64}) == first


def test_a_file_of_another_source_is_refused(tmp_path):
    swapped = [(address, caption) for caption, address in toy_rows(10)]
    raw = write_rows(tmp_path / "raw", swapped)

    with pytest.raises(PmdError, match=r"GCC-training.tsv: none of the first 14 rows can be used"):
        build(tmp_path / "index", raw)

    assert load_index(str(tmp_path / "index")) is None


def test_repeats_within_a_record_are_kept_unless_the_recipe_drops_them(tmp_path):
    raw = write_rows(
        tmp_path / "raw", [*toy_rows(3), ("a caption of picture 1", "http://a.test/1.jpg")]
    )

    kept = build(tmp_path / "kept", raw)
    dropped = build(tmp_path / "dropped", raw, captions={"drop_repeats": True})

    assert kept.counts.dropped == {}
    assert dropped.counts.dropped == {"repeat": 1}
    assert dropped.counts.kept == kept.counts.kept - 1


def test_two_images_with_one_key_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(scatter, "key_of", lambda source, image: "00000000000000aa")
    raw = write_rows(tmp_path / "raw", toy_rows(2))

    with pytest.raises(PmdError, match="have one key, 00000000000000aa"):
        build(tmp_path / "index", raw)


@given(st.sets(st.integers(0, 2**64 - 1), max_size=300), st.integers(1, 5))
def test_few_keys_are_counted_exactly_for_any_split_into_tasks(keys, num_tasks):
    tasks = [sorted(keys)[start::num_tasks] for start in range(num_tasks)]

    assert estimated_records([*tasks, sorted(keys)[:3]]) == len(keys)


def test_many_keys_are_estimated_to_five_per_cent():
    rng = random.Random(0)
    sketch = scatter._Smallest()
    for _ in range(200_000):
        sketch.add(rng.getrandbits(64))

    assert estimated_records([sketch.keys()]) == pytest.approx(200_000, rel=0.05)


def test_an_interrupted_index_resumes_from_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "SPAN_BYTES", 300)
    raw = write_rows(tmp_path / "raw", toy_rows(100))
    whole = build(tmp_path / "whole", raw)
    gather = build_module.gather_parts
    monkeypatch.setattr(build_module, "gather_parts", None)
    with pytest.raises(TypeError):
        build(tmp_path / "index", raw)
    names_left = {path.name for path in (tmp_path / "index" / "runs").iterdir()}
    monkeypatch.setattr(build_module, "gather_parts", gather)
    monkeypatch.setattr(scatter, "_checked_rows", None)  # reading again would fail

    resumed = build(tmp_path / "index", raw)

    assert any(name.endswith(".json") for name in names_left)
    assert digests(resumed) == digests(whole)
    assert not (tmp_path / "index" / "runs").exists()


def test_a_lone_surrogate_in_json_does_not_stop_the_index(tmp_path):
    narrative = {
        "dataset_id": "mscoco_train2017",
        "image_id": "7",
        "annotator_id": 1,
        "caption": "A dog \ud800 runs. It is brown.",
    }
    raw = tmp_path / "raw"
    raw.mkdir()
    for family in ("open_images_train_v6", "coco_train", "flickr30k_train", "ade20k_train"):
        rows = json.dumps(narrative) + "\n" if family == "coco_train" else ""
        (raw / f"{family}_captions.jsonl").write_text(rows)

    with open_pool("local", 1, None) as pool:
        recipe = load_recipe("localized_narratives")[0]
        index = index_of(recipe, raw, tmp_path / "index", pool)

    assert index.counts.kept + sum(index.counts.dropped.values()) >= 1
