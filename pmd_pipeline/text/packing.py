"""Second stage for texts: the documents of a part are packed into sequences of limited length."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from pmd_pipeline.base.parallel import ReportProgress
from pmd_pipeline.base.stopwatch import Stopwatch
from pmd_pipeline.base.storage import remove
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import is_local, write_whole
from pmd_pipeline.contract.models import Counts, FileDigest, Report
from pmd_pipeline.contract.schemas import TEXT_SCHEMA
from pmd_pipeline.contract.tokens import DOCUMENT_SEPARATOR
from pmd_pipeline.index.records import read_part
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.shards.part import PartTask
from pmd_pipeline.text.wordpiece import load_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ROW_GROUP = 64
"""Rows that a reader decompresses to read one."""

_CLS = _SEP = 1
"""Tokens that each of them counts."""

Words: TypeAlias = list[tuple[int, int]]
"""For each word of a document: its first character, and its number of tokens."""


class PackedSequence(NamedTuple):
    """A row of a shard; see `TEXT_SCHEMA`."""

    text: str
    tokens: int
    keys: list[str]


class Packer:
    """Packs documents into sequences one after another; a document may continue in the next.

    A document is split between words only, so its segments have the tokens of the whole.

    Args:
        max_tokens: of a sequence; a word has at most a hundred.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._start_sequence()

    def add(self, key: str, document: str, words: Words) -> Iterator[PackedSequence]:
        """The sequences that are full after a document with these words."""
        begin = num_tokens = 0
        for start, count in words:
            if self._num_tokens + num_tokens + count + _SEP > self._max_tokens:
                self._append(key, document[begin:start], num_tokens)
                yield from self.close()
                begin, num_tokens = start, 0
            num_tokens += count
        self._append(key, document[begin:], num_tokens)

    def close(self) -> Iterator[PackedSequence]:
        """The unfinished sequence, unless it is empty."""
        if self._texts:
            yield PackedSequence(DOCUMENT_SEPARATOR.join(self._texts), self._num_tokens, self._keys)
        self._start_sequence()

    def _start_sequence(self) -> None:
        self._texts: list[str] = []
        self._keys: list[str] = []
        self._num_tokens = _CLS

    def _append(self, key: str, segment: str, num_tokens: int) -> None:
        if num_tokens:
            self._texts.append(segment.strip())
            self._keys.append(key)
            self._num_tokens += num_tokens + _SEP


@dataclass
class _DocumentCounts:
    documents: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    records: int = 0


def build_texts(task: PartTask, report_progress: ReportProgress) -> Report:
    """Build the shard and, last, the report of one part; `counts` of the report are documents.

    Raises:
        PmdError: the tokenizer is not the one of the recipe.
    """
    stopwatch = Stopwatch()
    paths, names = task.shard.paths, task.shard.names
    remove(paths.report)  # it belongs to a file that is replaced from here on
    counts = _DocumentCounts()
    sequences = list(_pack(task, counts, report_progress))
    content = _as_parquet(sequences)
    write_whole(paths.ledger, content)
    shard = FileDigest.of(names.ledger, content)
    report = Report(
        source=task.shard.recipe.source,
        part=task.part.part,
        dependency=task.shard.dependency,
        counts=Counts(
            pairs_in=counts.documents,
            kept=counts.kept,
            dropped=dict(sorted(counts.dropped.items())),
        ),
        records=counts.records,
        images=0,
        words=dict(sorted(counts.words.items())),
        sequences=len(sequences),
        tokens=sum(sequence.tokens for sequence in sequences),
        fetched_bytes=0,
        tar=shard,
        ledger=shard,
        versions={"pyarrow": pa.__version__, "tokenizers": version("tokenizers")},
        timing=stopwatch.timing(),
    )
    assert report.counts.unaccounted() == 0
    write_whole(paths.report, report.model_dump_json(indent=1).encode())
    return report


def with_tokenizer(recipe: Recipe) -> Recipe:
    """The recipe; one for texts with the digest of its tokenizer.

    Raises:
        PmdError: it names no tokenizer, or one that cannot be read or has another digest.
    """
    if recipe.kind != "text":
        return recipe
    path = recipe.texts.tokenizer
    if not path:
        raise PmdError(
            f"{recipe.source} needs a tokenizer to pack sequences: give --tokenizer vocab.txt, "
            "from BERT or from `pmd tokenizer`"
        )
    sha256 = load_vocabulary(path).sha256
    _check_sha256(path, sha256, recipe.texts.sha256 or sha256)
    absolute = str(Path(path).resolve()) if is_local(path) else path
    texts = recipe.texts.model_copy(update={"tokenizer": absolute, "sha256": sha256})
    return recipe.model_copy(update={"texts": texts})


def split_words(tokenizer: "Tokenizer", document: str) -> Words:
    """The words of a document that have tokens, as `Vocabulary.tokenizer` splits them."""
    encoding = tokenizer.encode(document, add_special_tokens=False)
    words: Words = []
    previous = None
    for number, (start, _) in zip(encoding.word_ids, encoding.offsets, strict=True):
        if number == previous:
            words[-1] = (words[-1][0], words[-1][1] + 1)
        else:
            words.append((start, 1))
        previous = number
    return words


def _pack(
    task: PartTask, counts: _DocumentCounts, report_progress: ReportProgress
) -> Iterator[PackedSequence]:
    texts = task.shard.recipe.texts
    vocabulary = load_vocabulary(texts.tokenizer)
    _check_sha256(texts.tokenizer, vocabulary.sha256, texts.sha256)
    tokenizer = vocabulary.tokenizer()
    packer = Packer(texts.tokens)
    for record in read_part(task.index, task.part, task.limit):
        counts.records += 1
        for document in record.captions:
            counts.documents += 1
            if words := split_words(tokenizer, document):
                counts.kept += 1
                counts.words[len(document.split())] += 1
                yield from packer.add(record.key, document, words)
            else:
                counts.dropped["no_text"] += 1  # only characters that BERT ignores
        report_progress({"records": counts.records})
    yield from packer.close()


def _as_parquet(sequences: Iterable[PackedSequence]) -> bytes:
    rows = [sequence._asdict() for sequence in sequences]
    out = BytesIO()
    pq.write_table(
        pa.Table.from_pylist(rows, schema=TEXT_SCHEMA),
        out,
        row_group_size=_ROW_GROUP,
        compression="zstd",
    )
    return out.getvalue()


def _check_sha256(path: str, sha256: str, expected: str) -> None:
    if sha256 != expected:
        raise PmdError(
            f"the vocabulary in {path} has sha256 {sha256}, the recipe {expected}: give that one, "
            "or change texts.sha256 in the recipe"
        )
