"""Packing: no document is lost, no sequence too long, and the result always the same."""

import hashlib
import io
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from corpora import article, built, order_of, sequences, write_lines, write_table, write_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from source_helpers import SAMPLES, needs_samples
from typer.testing import CliRunner

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.base.record import full_text
from pmd_pipeline.cli import app
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.contract.tokens import DOCUMENT_SEPARATOR
from pmd_pipeline.inspect import stats as statistics
from pmd_pipeline.recipe import load_recipe
from pmd_pipeline.text.packing import Packer, split_words, with_tokenizer
from pmd_pipeline.text.wordpiece import learn_wordpiece, load_vocabulary

LETTERS = {chr(n): 9 for n in range(33, 127)}
TOKENIZER = learn_wordpiece(
    {**LETTERS, "dog": 5, "running": 5, "ing": 2, "x" + "abc" * 3: 4}, 900
).tokenizer()
SIGNS = st.text(st.characters(codec="utf-8"), max_size=60)
PROSE = st.lists(st.sampled_from(["dog", "running", "x" * 90, "[SEP]", "é", "中文", ".", "\n\n"]))
DOCUMENTS = st.lists(st.one_of(SIGNS, PROSE.map(" ".join)), max_size=12)


def token_ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def packed(documents, tokens):
    packer = Packer(tokens)
    found = [
        row
        for number, document in enumerate(documents)
        for row in packer.add(f"{number:04d}", document, split_words(TOKENIZER, document))
    ]
    return [*found, *packer.close()]


@given(DOCUMENTS, st.sampled_from([128, 512]))
@settings(max_examples=300)
def test_no_token_is_lost_between_documents_and_sequences(texts, tokens):
    documents = [full_text(text) for text in texts]

    rows = packed(documents, tokens)

    segments = [one for row in rows for one in row.text.split(DOCUMENT_SEPARATOR)]
    assert [*chain(*map(token_ids, segments))] == [*chain(*map(token_ids, documents))]
    assert list(dict.fromkeys(key for row in rows for key in row.keys)) == [
        f"{number:04d}" for number, document in enumerate(documents) if token_ids(document)
    ]


@given(DOCUMENTS, st.sampled_from([128, 512]))
@settings(max_examples=300)
def test_a_sequence_has_the_tokens_that_it_states_and_no_more_than_allowed(texts, tokens):
    for row in packed([full_text(text) for text in texts], tokens):
        segments = row.text.split(DOCUMENT_SEPARATOR)
        assert row.tokens == 1 + sum(len(token_ids(one)) + 1 for one in segments) <= tokens
        assert len(row.keys) == len(segments)
        assert all(map(token_ids, segments))


def test_sequences_are_full_but_for_the_last():
    rows = packed([article(number) for number in range(50)], 512)

    assert all(row.tokens > 512 - 8 for row in rows[:-1])


def test_a_document_is_cut_where_a_word_begins():
    rows = packed(["dog " * 200], 128)

    assert [row.text for row in rows] == [" ".join(["dog"] * count) for count in (126, 74)]


@given(st.lists(st.sampled_from(["", " \n", "a dog", "a dog\n", "\0", "x" * 99, "\u0301"])))
@settings(max_examples=25)
def test_every_document_is_kept_or_dropped_with_a_reason(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("texts")
    write_lines(folder / "raw" / "news.jsonl", [*rows, "one that is sound"])

    entry = built(order_of(folder, options={"most_chars": 50})).sources["ccnews"]

    count_of = Counter(rows)
    assert entry.counts.pairs_in == len(rows) + 1
    assert entry.counts.unaccounted() == 0
    assert entry.counts.kept == count_of["a dog"] + count_of["a dog\n"] + 1
    assert entry.counts.dropped == {
        reason: count
        for reason, count in {
            "no_text": count_of[""] + count_of[" \n"] + count_of["\u0301"],
            "not_text": count_of["\0"],
            "too_long": count_of["x" * 99],
        }.items()
        if count
    }


def test_the_manifest_counts_documents_and_sequences(tmp_path):
    write_table(tmp_path / "raw" / "train.parquet", [article(n) for n in range(300)])
    source_build = order_of(tmp_path, part_records=100)

    manifest = built(source_build)

    rows = sequences(source_build, manifest)
    entry = manifest.sources["ccnews"]
    assert manifest.kind == "text"
    assert load_manifest(source_build.manifest) == manifest
    assert entry.counts.kept == sum(entry.words.values()) == 300
    assert entry.tokens == sum(row["tokens"] for row in rows)
    assert sum(shard.pairs for shard in manifest.shards) == len(rows)
    assert {shard.sha256 == shard.ledger_sha256 for shard in manifest.shards} == {True}
    assert all(shard.path == shard.ledger_path for shard in manifest.shards)
    assert len(manifest.shards) == 3
    assert (
        entry.rules["texts"]["sha256"]
        == load_vocabulary(source_build.recipe.texts.tokenizer).sha256
    )
    assert "tokenizer" not in entry.rules["texts"]
    for shard in manifest.shards:
        content = (Path(source_build.manifest).parent / shard.path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard.sha256


def test_equal_documents_are_kept_unless_the_recipe_drops_repeats(tmp_path):
    again = [article(n % 20) for n in range(50)]
    write_table(tmp_path / "raw" / "a.parquet", again[:30])
    write_table(tmp_path / "raw" / "b.parquet", [f" {text}\n\n" for text in again[30:]])

    all_ = built(order_of(tmp_path)).sources["ccnews"].counts
    once = built(order_of(tmp_path, captions={"drop_repeats": True})).sources["ccnews"].counts

    assert (all_.kept, all_.dropped) == (50, {})
    assert (once.kept, once.dropped) == (20, {"repeat": 30})


def test_filters_apply_to_documents(tmp_path):
    write_table(tmp_path / "raw" / "a.parquet", ["short", *[article(n) for n in range(9)]])

    entry = built(order_of(tmp_path, captions={"filters": {"has_words": {"least": 3}}}))

    assert entry.sources["ccnews"].counts.dropped == {"has_words": 1}


def test_a_limit_counts_the_rest_as_dropped(tmp_path):
    write_table(tmp_path / "raw" / "a.parquet", [article(n) for n in range(60)])
    source_build = order_of(tmp_path, part_records=20)
    limited = type(source_build)(**{**vars(source_build), "limit": 25})

    entry = built(limited).sources["ccnews"]

    assert (entry.counts.kept, entry.counts.dropped) == (25, {"limit": 35})


def test_another_order_of_files_and_forms_gives_the_same_sequences(tmp_path):
    texts = [article(n) for n in range(80)]
    write_table(tmp_path / "a" / "raw" / "a.parquet", texts)
    write_lines(tmp_path / "b" / "raw" / "1.jsonl.gz", texts[50:])
    write_lines(tmp_path / "b" / "raw" / "2.jsonl", texts[:50])
    source_builds = [order_of(tmp_path / name, part_records=40) for name in "ab"]

    first, second = (
        [shard.sha256 for shard in built(source_build).shards] for source_build in source_builds
    )

    assert first == second


def test_a_second_build_does_nothing_and_another_tokenizer_makes_all_parts_stale(tmp_path):
    write_table(tmp_path / "raw" / "a.parquet", [article(n) for n in range(40)])
    source_build = order_of(tmp_path, part_records=20)
    first = built(source_build)
    reports = sorted((tmp_path / "data" / "shards" / "ccnews").glob("*.json"))
    times = [report.stat().st_mtime_ns for report in reports]
    index = tmp_path / "data" / "index" / "ccnews" / "index.json"
    indexed = index.stat().st_mtime_ns

    assert built(source_build) == first
    assert [report.stat().st_mtime_ns for report in reports] == times

    (tmp_path / "vocab.txt").write_bytes(
        load_vocabulary(str(tmp_path / "vocab.txt")).content + b"zq\n"
    )
    recipe = source_build.recipe.model_copy(
        update={"texts": source_build.recipe.texts.model_copy(update={"sha256": ""})}
    )
    other = built(type(source_build)(**{**vars(source_build), "recipe": with_tokenizer(recipe)}))
    assert other.digest != first.digest
    assert index.stat().st_mtime_ns == indexed
    assert [report.stat().st_mtime_ns for report in reports] != times


def test_the_tokenizer_must_exist_and_have_the_digest_of_the_recipe(tmp_path):
    path = write_vocabulary(tmp_path / "vocab.txt")

    with pytest.raises(PmdError, match="--tokenizer"):
        with_tokenizer(load_recipe("ccnews")[0])
    with pytest.raises(PmdError, match="the recipe 0000"):
        with_tokenizer(load_recipe("ccnews", {"texts": {"tokenizer": path, "sha256": "0" * 64}})[0])
    assert with_tokenizer(load_recipe("coco")[0]) == load_recipe("coco")[0]


@needs_samples
def test_berts_vocabulary_packs_to_512(tmp_path):
    write_table(tmp_path / "raw" / "a.parquet", [article(n) for n in range(40)])
    vocabulary = str(SAMPLES / "bert_vocab" / "vocab.txt")
    source_build = order_of(tmp_path, texts={"tokenizer": vocabulary, "tokens": 512})

    rows = sequences(source_build, built(source_build))

    tokenizer = load_vocabulary(vocabulary).tokenizer()
    num_tokens = [
        sum(len(tokenizer.encode(d).ids) + 1 for d in r["text"].split(DOCUMENT_SEPARATOR))
        for r in rows
    ]
    assert [row["tokens"] for row in rows] == [1 + count for count in num_tokens]
    assert max(row["tokens"] for row in rows) <= 512


@pytest.mark.slow
@pytest.mark.parametrize(("runner", "workers"), [("local", 2), ("ray", 2)])
def test_any_number_of_workers_gives_the_same_manifest(tmp_path, runner, workers):
    for number in range(3):
        texts = [article(n) for n in range(number * 150, number * 150 + 200)]
        write_table(tmp_path / "raw" / f"{number}.parquet", texts)
    source_builds = [order_of(tmp_path, part_records=50) for _ in range(2)]
    source_builds[1] = type(source_builds[1])(
        **{**vars(source_builds[1]), "data": str(tmp_path / "other")}
    )
    alone = built(source_builds[0])

    with open_pool(runner, workers, None) as pool:
        together = built(source_builds[1], pool)

    assert together.digest == alone.digest


@pytest.mark.slow
def test_a_killed_build_is_resumed_to_the_same_manifest(tmp_path):
    write_table(tmp_path / "raw" / "a.parquet", [article(n) for n in range(3000)])
    whole = built(order_of(tmp_path, part_records=100))
    build = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests/pipeline')\n"
        "from corpora import built, order_of\n"
        "source_build = order_of(Path(sys.argv[1]), part_records=100)\n"
        "built(type(source_build)(**{**vars(source_build), 'data': sys.argv[1] + '/again'}))\n"
    )
    command = [sys.executable, "-c", build, str(tmp_path)]
    shards = tmp_path / "again" / "shards" / "ccnews"
    for least in (1, 9):
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        while process.poll() is None and len(list(shards.glob("*.json"))) < least:
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert 0 < len(list(shards.glob("*.json"))) < 30

    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])

    assert load_manifest(str(tmp_path / "manifests" / "ccnews.json")).digest == whole.digest


def test_statistics_are_those_of_documents_and_sequences(tmp_path):
    write_table(tmp_path / "raw" / "a.parquet", [article(n) for n in range(60)])
    source_build = order_of(tmp_path)
    manifest = built(source_build)
    rows = sequences(source_build, manifest)
    console = Console(width=120, file=io.StringIO())

    [row] = statistics.lengths(manifest)
    console.print(*statistics.as_table([row], manifest))

    assert (row.pairs, row.sequences) == (60, len(rows))
    assert row.tokens == sum(one["tokens"] for one in rows)
    assert row.words_mean == pytest.approx(
        sum(len(article(n).split()) for n in range(60)) / 60, abs=1e-3
    )
    assert "words in a document" in console.file.getvalue()
    assert "documents not kept" in console.file.getvalue()


def test_why_and_show_list_the_sequences_of_a_document(tmp_path):
    write_table(tmp_path / "raw" / "a.parquet", [article(n, num_words=300) for n in range(9)])
    source_build = order_of(tmp_path)
    rows = sequences(source_build, built(source_build))
    key = rows[3]["keys"][0]
    inside = [str(number) for number, row in enumerate(rows) if key in row["keys"]]
    shard = str(tmp_path / "data" / "shards" / "ccnews" / "00000.parquet")

    why, show, held = (
        CliRunner().invoke(app, [*words, "--out", str(tmp_path / "data")]).stdout
        for words in (["why", key, "--workers", "1"], ["show", key], ["show", shard])
    )

    assert len(inside) > 1
    assert f"kept: in sequence {', '.join(inside)} of {shard}" in why
    assert re.findall(r"^sequence (\d+)$", show, re.MULTILINE) == inside
    assert rows[int(inside[0])]["text"] in show
    assert f"sequences: {len(rows)}" in held
    assert rows[0]["text"] in held
