import csv
import io
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from pmd_pipeline import sources
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest, located, save_manifest
from pmd_pipeline.contract.models import FORMAT, Counts, Manifest, SourceEntry
from pmd_pipeline.inspect.stats import (
    as_csv,
    as_json,
    as_markdown,
    as_table,
    lengths,
    paper_order,
    percentile,
    plot,
    remarks,
)
from pmd_pipeline.recipe import load_recipe


def entry(words, **known):
    kept = sum(words.values())
    dropped = {"is_language": 3, "has_words": 20}
    counts = Counts(pairs_in=kept + 24, kept=kept, dropped=dropped, failed={"http_404": 1})
    stated = {
        "licence": "",
        "citation": "",
        "counts": counts,
        "images": kept,
        "unique_images": kept,
        "words": words,
        "rules": {},
        "rules_sha256": "0" * 64,
        "upstream": [],
        "leakage": "none",
    }
    return SourceEntry(**stated | known)


def manifest(missing=None, **entries):
    unsealed = Manifest(name="toy", sources=entries, shards=[], versions={}, missing=missing or {})
    return unsealed.model_copy(update={"digest": unsealed.computed_digest()})


def nine(count=10_000_000):
    return manifest(**{name: entry({5: count, 12: count, 200: 1}) for name in sources.names("pmd")})


def text_of(tables, width):
    console = Console(width=width, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.file.getvalue()


@given(
    counts=st.dictionaries(st.integers(0, 60), st.integers(1, 20), min_size=1),
    share=st.integers(0, 100),
)
def test_percentiles_are_those_of_numpy(counts, share):
    captions = [words for words, count in counts.items() for _ in range(count)]

    expected = np.percentile(captions, share, method="inverted_cdf")

    assert percentile(counts, share) == expected


def test_no_captions_have_no_percentile():
    assert percentile({}, 50) is None


def test_a_row_has_the_lengths_beside_the_papers():
    [row] = lengths(manifest(coco=entry({10: 3, 20: 1}, images=2, unique_images=1)))

    assert (row.dataset, row.pairs, row.images, row.unique_images) == ("coco", 4, 2, 1)
    assert (row.words_mean, row.paper_words, row.difference) == (12.5, 12.4, 0.1)
    assert (row.words_p5, row.words_p50, row.words_p95, row.words_max) == (10, 10, 20, 20)
    assert (row.paper_pairs, row.dropped, row.failed) == (900_000, 23, 1)


def test_a_source_without_pairs_or_without_a_paper_has_empty_columns():
    empty, strange = lengths(manifest(coco=entry({}), strange=entry({3: 1})))[:2]

    assert (empty.pairs, empty.words_mean, empty.words_p50, empty.difference) == (
        0,
        None,
        None,
        None,
    )
    assert (strange.paper_pairs, strange.paper_words, strange.difference) == (None, None, None)


def test_the_order_is_that_of_the_papers_table_and_of_the_recipe():
    assert [row.dataset for row in lengths(nine())] == [*paper_order(), "total"]
    assert [recipe.source for recipe in load_recipe("pmd")] == paper_order()


def test_the_total_adds_counts_and_takes_lengths_over_all_pairs():
    rows = lengths(manifest(coco=entry({10: 3}), sbu=entry({2: 1}), other=entry({4: 2})))

    assert [row.dataset for row in rows] == ["coco", "sbu", "other", "total"]
    assert (rows[-1].pairs, rows[-1].images, rows[-1].dropped, rows[-1].failed) == (6, 6, 69, 3)
    assert (rows[-1].words_mean, rows[-1].words_p50, rows[-1].words_max) == (6.667, 4, 10)
    assert (rows[-1].paper_pairs, rows[-1].paper_words) == (1_900_000, None)


def test_the_total_adds_captions_of_one_length():
    total = lengths(manifest(coco=entry({10: 3}), sbu=entry({10: 1, 2: 4})))[-1]

    assert (total.pairs, total.words_mean) == (8, 6.0)


def test_only_all_nine_sources_have_the_papers_total_mean():
    """FLAVA, table of PMD: 70M pairs, 12.1 words."""
    total = lengths(nine())[-1]

    assert (total.paper_pairs, total.paper_words) == (70_000_000, 12.1)


@pytest.mark.parametrize("width", [80, 160])
def test_the_tables_of_nine_sources_are_readable(width):
    made = nine()

    text = text_of(as_table(lengths(made), made), width)

    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for name in (*paper_order(), "total"):
        assert name in text
    assert "180,000,009" in text
    assert "has_words 20, is_language 3; http_404 1" in text


def test_a_difference_that_rounds_to_zero_has_no_minus_sign():
    made = manifest(coco=entry({12: 61, 13: 39}))

    assert lengths(made)[0].difference == -0.01
    assert " +0.0 " in text_of(as_table(lengths(made), made), 80)


def test_json_has_counts_by_reason():
    made = manifest(coco=entry({10: 3}), sbu=entry({2: 1}))

    printed = json.loads(as_json(lengths(made), made))

    assert (printed["manifest"], printed["digest"]) == ("toy", made.digest)
    assert [row["dataset"] for row in printed["datasets"]] == ["coco", "sbu", "total"]
    assert printed["datasets"][0]["dropped_by"] == {"is_language": 3, "has_words": 20}
    assert printed["datasets"][0]["failed_by"] == {"http_404": 1}
    assert "dropped_by" not in printed["datasets"][-1]


def test_csv_and_markdown_have_the_same_rows():
    rows = lengths(manifest(coco=entry({10: 3}), strange=entry({2: 1})))

    [coco, strange, total] = csv.DictReader(io.StringIO(as_csv(rows)))
    [header, rule, first, *_] = as_markdown(rows).splitlines()

    assert (coco["dataset"], coco["pairs"], coco["words_mean"]) == ("coco", "3", "10.0")
    assert (strange["paper_words"], total["pairs"]) == ("", "4")
    assert header.startswith("| dataset | pairs | paper_pairs | ")
    assert header.count("|") == rule.count("|") == first.count("|")
    assert first.startswith("| coco | 3 | 900000 | ")


def test_the_plot_is_a_readable_png(tmp_path):
    made = manifest(**{name: entry({3: 5, 9: 2}) for name in paper_order()}, empty=entry({}))

    plot(lengths(made), made, str(tmp_path / "below" / "lengths.png"))

    with Image.open(tmp_path / "below" / "lengths.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert len(set(image.convert("L").resize((200, 100)).tobytes())) > 20


def test_a_plot_without_captions_or_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    empty, made = manifest(coco=entry({})), manifest(coco=entry({3: 1}))

    with pytest.raises(PmdError, match="toy has no pairs to plot"):
        plot(lengths(empty), empty, str(tmp_path / "a.png"))
    with pytest.raises(PmdError, match=r"cannot write .*/file/a\.png: a file is where"):
        plot(lengths(made), made, str(tmp_path / "file" / "a.png"))

    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_plot_without_matplotlib_names_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    made = manifest(coco=entry({3: 1}))

    with pytest.raises(PmdError, match=r'pip install "pmd-flava\[plot\]"'):
        plot(lengths(made), made, str(tmp_path / "a.png"))


def test_remarks_name_limits_missing_parts_and_leakage():
    made = manifest(
        missing={"coco": [3, 4]},
        coco=entry({3: 1}, leakage="not checked"),
        sbu=entry({3: 1}, limit=1000),
        wit=entry({3: 1}),
    )

    assert remarks(made) == [
        "coco lacks 2 parts: run its build again",
        "coco may hold evaluation images: there was no dataset_coco.json",
        "sbu was built with --limit 1,000",
    ]


def test_a_manifest_that_was_changed_is_refused(tmp_path):
    path = str(tmp_path / "toy.json")
    save_manifest(path, manifest(coco=entry({3: 1})))
    assert lengths(load_manifest(path))[0].pairs == 1
    changed = (tmp_path / "toy.json").read_text().replace('"3": 1', '"3": 2')
    (tmp_path / "toy.json").write_text(changed)

    with pytest.raises(PmdError, match=r"toy\.json was changed: its digest is not"):
        load_manifest(path)


def test_the_papers_table_adds_up():
    assert sum(sources.load(name).info.paper.pairs for name in paper_order()) == 70_000_000


def test_another_version_and_a_changed_manifest_have_different_errors(tmp_path):
    path = tmp_path / "toy.json"
    save_manifest(str(path), manifest(coco=entry({3: 1})))
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', '"format": 1'))

    with pytest.raises(PmdError, match=rf"toy\.json is of format 1, this version has {FORMAT}"):
        load_manifest(str(path))


@pytest.mark.parametrize(
    ("manifest", "path", "address"),
    [
        ("manifests/pmd.json", "../data/a.tar", "data/a.tar"),
        ("pmd.json", "data/a.tar", "data/a.tar"),
        ("s3://bucket/pmd/manifests/pmd.json", "../data/a.tar", "s3://bucket/pmd/data/a.tar"),
        ("memory://manifests/pmd.json", "../data/a.tar", "memory://data/a.tar"),
        ("manifests/pmd.json", "s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("s3://bucket/pmd.json", "/data/a.tar", "/data/a.tar"),
    ],
)
def test_shard_addresses_in_object_stores_have_no_dots(manifest, path, address):
    assert located(manifest, path) == address
