"""Second stage for texts: the documents of a part become sequences that fill a model's window."""

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
from pmd_pipeline.build.part import PartTask
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import is_local, write_whole
from pmd_pipeline.contract.models import Counts, FileDigest, Report
from pmd_pipeline.contract.schemas import TEXT_SCHEMA
from pmd_pipeline.contract.tokens import DOCUMENT_SEPARATOR
from pmd_pipeline.index.records import read_part
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.text.wordpiece import load_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ROW_GROUP = 64
"""Rows that a reader of one row has to unpack."""

_CLS = _SEP = 1


Words: TypeAlias = list[tuple[int, int]]
"""Where in a document each word begins, and how many pieces it has."""


class Sequence(NamedTuple):
    """A row of a shard; see `TEXT_SCHEMA`."""

    text: str
    tokens: int
    keys: list[str]


class Packer:
    """Fills sequences with documents, one after another; what does not fit goes on in the next.

    A document is cut between words only, so the pieces of its stretches are those of the whole.

    Args:
        tokens: most pieces of a sequence; a word has at most a hundred.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._empty()

    def add(self, key: str, document: str, cuts: Words) -> Iterator[Sequence]:
        """The sequences that a document of these words makes full."""
        begin = pieces = 0
        for start, count in cuts:
            if self._used + pieces + count + _SEP > self._tokens:
                self._put(key, document[begin:start], pieces)
                yield from self.close()
                begin, pieces = start, 0
            pieces += count
        self._put(key, document[begin:], pieces)

    def close(self) -> Iterator[Sequence]:
        """The sequence in hand, if anything is in it."""
        if self._texts:
            yield Sequence(DOCUMENT_SEPARATOR.join(self._texts), self._used, self._keys)
        self._empty()

    def _empty(self) -> None:
        self._texts: list[str] = []
        self._keys: list[str] = []
        self._used = _CLS

    def _put(self, key: str, stretch: str, pieces: int) -> None:
        if pieces:
            self._texts.append(stretch.strip())
            self._keys.append(key)
            self._used += pieces + _SEP


@dataclass
class _Tally:
    documents: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    records: int = 0


def build_texts(task: PartTask, report_progress: ReportProgress) -> Report:
    """Build the shard and, last, the report of one part; `counts` are documents.

    Raises:
        PmdError: the tokenizer is not the one that the recipe means.
    """
    stopwatch = Stopwatch()
    paths, names = task.shard.paths, task.shard.names
    remove(paths.report)  # nothing may vouch for a file that is being replaced
    tally = _Tally()
    sequences = list(_packed(task, tally, report_progress))
    content = _as_parquet(sequences)
    write_whole(paths.ledger, content)
    shard = FileDigest.of(names.ledger, content)
    report = Report(
        source=task.shard.recipe.source,
        part=task.part.part,
        dependency=task.shard.dependency,
        counts=Counts(
            pairs_in=tally.documents, kept=tally.kept, dropped=dict(sorted(tally.dropped.items()))
        ),
        records=tally.records,
        images=0,
        words=dict(sorted(tally.words.items())),
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
    """The recipe, with the digest of its tokenizer if it is one for texts.

    Raises:
        PmdError: it names no tokenizer, or one that cannot be read or is another than it means.
    """
    if recipe.kind != "text":
        return recipe
    path = recipe.texts.tokenizer
    if not path:
        raise PmdError(
            f"{recipe.source} needs a tokenizer to fill sequences by: give --tokenizer vocab.txt, "
            "BERT's or one that `pmd tokenizer` made"
        )
    sha256 = load_vocabulary(path).sha256
    _check(path, sha256, recipe.texts.sha256 or sha256)
    here = str(Path(path).resolve()) if is_local(path) else path
    texts = recipe.texts.model_copy(update={"tokenizer": here, "sha256": sha256})
    return recipe.model_copy(update={"texts": texts})


def words(cutter: "Tokenizer", document: str) -> Words:
    """The words of a document, as `cutter` sees them; see `Vocabulary.wordpiece`."""
    encoding = cutter.encode(document, add_special_tokens=False)
    found: Words = []
    last = None
    for number, (start, _) in zip(encoding.word_ids, encoding.offsets, strict=True):
        if number == last:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((start, 1))
        last = number
    return found


def _packed(task: PartTask, tally: _Tally, report_progress: ReportProgress) -> Iterator[Sequence]:
    texts = task.shard.recipe.texts
    vocabulary = load_vocabulary(texts.tokenizer)
    _check(texts.tokenizer, vocabulary.sha256, texts.sha256)
    cutter = vocabulary.wordpiece()
    packer = Packer(texts.tokens)
    for record in read_part(task.index, task.part, task.limit):
        tally.records += 1
        for document in record.captions:
            tally.documents += 1
            if cuts := words(cutter, document):
                tally.kept += 1
                tally.words[len(document.split())] += 1
                yield from packer.add(record.key, document, cuts)
            else:
                tally.dropped["no_text"] += 1  # signs that BERT does not see
        report_progress({"records": tally.records})
    yield from packer.close()


def _as_parquet(sequences: Iterable[Sequence]) -> bytes:
    rows = [sequence._asdict() for sequence in sequences]
    out = BytesIO()
    pq.write_table(
        pa.Table.from_pylist(rows, schema=TEXT_SCHEMA),
        out,
        row_group_size=_ROW_GROUP,
        compression="zstd",
    )
    return out.getvalue()


def _check(path: str, sha256: str, meant: str) -> None:
    if sha256 != meant:
        raise PmdError(
            f"the vocabulary in {path} has sha256 {sha256}, but {meant} is meant: give that one, "
            "or change texts.sha256 in the recipe"
        )
