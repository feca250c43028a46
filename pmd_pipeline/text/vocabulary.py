"""The texts of a manifest, in its order, and a vocabulary learned from them."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pmd_pipeline.base.parallel import OnProgress
from pmd_pipeline.base.tables import read_batches
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import open_read
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.contract.models import Manifest
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.text.wordpiece import MAX_WORDS, Vocabulary, WordCounts, learn_wordpiece

_PROGRESS_TEXTS = 10_000
_BATCH_ROWS = 1000


def learn_vocabulary(
    path: str, size: int, on_progress: OnProgress, max_words: int = MAX_WORDS
) -> tuple[Vocabulary, int]:
    """A vocabulary of at most `size` tokens, learned from all texts of the manifest at `path`.

    The second value is `WordCounts.max_error`.

    Raises:
        PmdError: the manifest has no texts, a shard is missing or damaged, or the library
            `tokenizers` is not installed.
    """
    counts = WordCounts(max_words)
    number = 0
    for number, text in enumerate(texts(path, load_manifest(path)), start=1):
        counts.add(text)
        if number % _PROGRESS_TEXTS == 0:
            on_progress(path, {"texts": number})
    on_progress(path, {"texts": number})
    words = counts.words()
    if not words:
        raise PmdError(f"{path} has no words to learn from: its shards are empty")
    return learn_wordpiece(words, size), counts.max_error


def texts(path: str, manifest: Manifest) -> Iterator[str]:
    """Every caption, or every sequence of a manifest of texts, in the order of the shards.

    Raises:
        PmdError: the manifest is one of images, or a shard is missing or damaged.
    """
    if manifest.kind == "images":
        raise PmdError(f"{path} holds images without texts: give a manifest of pairs or of texts")
    for shard in manifest.shards:
        where = located(path, shard.path)
        try:
            if manifest.kind == "text":
                yield from _sequences(where)
            else:
                yield from _captions(where, located(path, shard.ledger_path))
        except (pa.ArrowException, LookupError, TypeError, ValueError) as error:
            raise PmdError(f"{where} or its ledger is damaged: get it again") from error


def _sequences(shard: str) -> Iterator[str]:
    with open_read(shard) as file:
        for batch in read_batches(file, ["text"], _BATCH_ROWS):
            yield from batch.column("text").to_pylist()


def _captions(shard: str, ledger: str) -> Iterator[str]:
    """The captions of a shard, from the JSON members that its ledger points at."""
    columns = ["status", "json_offset", "json_size"]
    with open_read(ledger) as rows, open_read(shard) as tar:
        for batch in read_batches(rows, columns, _BATCH_ROWS):
            for row in batch.to_pylist():
                if row["status"] == Status.SUCCESS:
                    tar.seek(row["json_offset"])
                    described: dict[str, Any] = json.loads(tar.read(row["json_size"]))
                    yield from described["captions"]
