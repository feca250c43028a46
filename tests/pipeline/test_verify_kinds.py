"""`pmd verify`, `pmd lock` and `pmd rebuild` on datasets of images or of texts alone."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import article, built, order_of, write_lines
from toy import QUIET, write_pictures

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.contract.manifest import load_manifest, save_manifest
from pmd_pipeline.dataset.source_build import SourceBuild
from pmd_pipeline.inspect.verify.dataset import verify
from pmd_pipeline.publish.lockfile.lock import lock
from pmd_pipeline.publish.lockfile.rebuild import RebuildRequest, rebuild
from pmd_pipeline.recipe import load_recipe


def findings(manifest, *, fast=False):
    with open_pool("local", 1, None) as pool:
        return [str(one) for one in verify(str(manifest), pool, QUIET, fast=fast)]


@pytest.fixture
def corpus(tmp_path):
    """The order of a corpus of three shards."""
    write_lines(tmp_path / "raw" / "news.jsonl", [article(number) for number in range(60)])
    order = order_of(tmp_path, part_records=20)
    built(order)
    return order


@pytest.fixture
def classes(tmp_path):
    """The order of twenty images of one class."""
    write_pictures(
        tmp_path / "raw" / "train" / "n01440764", [f"n01440764_{n}.JPEG" for n in range(20)]
    )
    order = SourceBuild(
        recipe=load_recipe("imagenet1k", {"part_records": 8})[0],
        raw=str(tmp_path / "raw"),
        data=str(tmp_path / "data"),
        manifest=str(tmp_path / "manifests" / "imagenet1k.json"),
    )
    built(order)
    return order


def test_undamaged_texts_and_images_have_no_faults(corpus, classes):
    for order in (corpus, classes):
        assert findings(order.manifest) == findings(order.manifest, fast=True) == []


def change_rows(order, change):
    """Change the rows of the first shard of texts, and adjust all digests."""
    path = Path(order.shards) / "00000.parquet"
    table = pq.read_table(path)
    rows = change(table.to_pylist())
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    content = path.read_bytes()
    report = json.loads(path.with_suffix(".json").read_text())
    manifest = load_manifest(order.manifest)
    digest = {"sha256": hashlib.sha256(content).hexdigest()}
    report["tar"] |= digest | {"num_bytes": len(content)}
    report["ledger"] = report["tar"]
    path.with_suffix(".json").write_text(json.dumps(report))
    first = manifest.shards[0].model_copy(
        update=digest | {"ledger_sha256": digest["sha256"], "num_bytes": len(content)}
    )
    manifest = manifest.model_copy(update={"shards": [first, *manifest.shards[1:]]})
    save_manifest(
        order.manifest, manifest.model_copy(update={"digest": manifest.computed_digest()})
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows[1:], " rows, "),
        (lambda rows: rows[::-1], "has documents in another order than that of keys"),
        (lambda rows: [rows[0] | {"text": ""}, *rows[1:]], "row 0 has no text"),
        (lambda rows: [rows[0] | {"tokens": 1}, *rows[1:]], " tokens, "),
    ],
)
def test_damaged_texts_are_a_fault_even_if_all_digests_are_adjusted(corpus, change, sentence):
    change_rows(corpus, change)

    assert any(sentence in one and "/00000.parquet: " in one for one in findings(corpus.manifest))


def test_flipped_bytes_of_texts_are_a_fault(corpus):
    path = Path(corpus.shards) / "00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)

    assert any("has changed: its SHA-256 is" in one for one in findings(corpus.manifest))


def test_a_manifest_with_another_number_of_tokens_is_a_fault(corpus):
    manifest = load_manifest(corpus.manifest)
    entry = manifest.sources["ccnews"].model_copy(update={"tokens": 7})
    manifest = manifest.model_copy(update={"sources": {"ccnews": entry}})
    save_manifest(
        corpus.manifest, manifest.model_copy(update={"digest": manifest.computed_digest()})
    )

    [found] = findings(corpus.manifest)

    assert "ccnews: the manifest states 7 tokens, the reports " in found


def test_images_without_captions_are_locked_and_rebuilt(classes, tmp_path):
    with open_pool("local", 1, None) as pool:
        lock(classes.manifest, str(tmp_path / "kit"), pool, QUIET)
        again = tmp_path / "again"
        order = RebuildRequest(
            lockfile=str(tmp_path / "kit"),
            out=str(again / "data"),
            manifests=str(again / "manifests"),
            images=(str(tmp_path / "raw"),),
        )
        made = rebuild(order, pool, QUIET)

    assert made.is_same
    assert findings(made.path) == []
