"""Made corpora for tests of texts: documents, files in every form, and a vocabulary."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from toy import QUIET

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.dataset.build import build_source
from pmd_pipeline.dataset.source_build import SourceBuild
from pmd_pipeline.recipe import load_recipe
from pmd_pipeline.text.packing import with_tokenizer
from pmd_pipeline.text.wordpiece import WordCounts, learn_wordpiece

WORDS = ["the", "a", "dog", "cat", "runs", "under", "beach", "while", "rain", "falls,", "it."]


def article(number, num_words=None):
    """A document of a few lines, other for every number."""
    dice = random.Random(number)
    count = num_words or dice.randint(5, 400)
    told = [dice.choice(WORDS) for _ in range(count)]
    told[:: max(1, count // 3)] = [f"\n\nPart {number}:" for _ in told[:: max(1, count // 3)]]
    return " ".join(told).strip()


def write_vocabulary(path):
    """A small WordPiece of the words above and of single letters; its path as text."""
    counts = WordCounts()
    for text in [*WORDS, "abcdefghijklmnopqrstuvwxyz0123456789:"]:
        counts.add(f"{text} {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(learn_wordpiece(counts.words(), 400).content)
    return str(path)


def write_table(path, rows, **columns):
    """Rows as the hub stores them, a hundred in a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": rows, **columns}), path, row_group_size=100)
    return path


def write_lines(path, rows):
    """Rows as JSON Lines; packed if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def order_of(folder, source="ccnews", **changes):
    """What to build of the corpus in `folder/raw`, by a vocabulary of its own."""
    vocabulary = write_vocabulary(folder / "vocab.txt")
    texts = {"tokenizer": vocabulary, "tokens": 128, **changes.pop("texts", {})}
    recipe = with_tokenizer(load_recipe(source, {"texts": texts, **changes})[0])
    return SourceBuild(
        recipe=recipe,
        raw=str(folder / "raw"),
        data=str(folder / "data"),
        manifest=str(folder / "manifests" / f"{source}.json"),
    )


def built(order, pool=None):
    """The manifest of a build without failed parts."""
    if pool is None:
        with open_pool("local", 1, None) as here:
            return built(order, here)
    manifest, failures = build_source(order, pool, QUIET)
    assert failures == []
    return manifest


def sequences(order, manifest):
    """Every row of every shard, in order."""
    base = Path(order.manifest).parent
    return [
        row for shard in manifest.shards for row in pq.read_table(base / shard.path).to_pylist()
    ]
