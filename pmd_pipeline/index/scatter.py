"""The first half of the external sort: rows of some spans are read, chosen and written to runs."""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

from pmd_pipeline.base.parallel import ReportProgress
from pmd_pipeline.base.record import BadRow, Row, key_of
from pmd_pipeline.base.storage import load_model
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import write_whole
from pmd_pipeline.contract.models import StoredModel
from pmd_pipeline.index.choose import Chooser, Pair
from pmd_pipeline.index.external_sort import KEYS, Run, RunWriter
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.sources.upstream.files import Span
from pmd_pipeline.sources.upstream.held_out import HeldOutImages

_SKETCH = 4096
"""The number of records is estimated from so many of the smallest keys."""

_FIRST_ROWS = 100
"""If so many first rows of a file are all bad, it is the wrong file."""

_PROGRESS_ROWS = 5000


@dataclass(frozen=True)
class ScatterTask:
    """Spans to read into runs.

    Args:
        spans: with their numbers in upstream order.
        prefix: of the addresses of the runs and of the result.
        dependency: digest of all that the result depends on.
    """

    recipe: Recipe
    spans: tuple[tuple[int, Span], ...]
    heldout: HeldOutImages | None
    prefix: str
    bucket_bits: int
    dependency: str

    def __str__(self) -> str:
        more = f" and {len(self.spans) - 1} more" if len(self.spans) > 1 else ""
        return f"reading {self.spans[0][1].file}{more} into {self.prefix}"


class Scattered(StoredModel):
    """The result of one scatter task.

    Args:
        rows: read.
        pairs: kept and dropped.
        fields: candidate captions, by field and reason.
        smallest: the smallest keys with a kept pair, at most `_SKETCH`.
    """

    dependency: str
    runs: list[Run]
    rows: int
    pairs: int
    fields: dict[str, dict[str, int]]
    smallest: list[int]


def scatter(task: ScatterTask, report_progress: ReportProgress) -> Scattered:
    """Read the spans of `task` into runs; a stored result with the same dependency is reused."""
    folder, _, name = task.prefix.rpartition("/")
    old = load_model(Scattered, folder, f"{name}.json")
    if old and old.dependency == task.dependency:
        return old
    source = task.recipe.load_source()
    chooser = Chooser(task.recipe.captions, task.recipe.kind)
    heldout = task.heldout.coco_ids() if task.heldout else frozenset[int]()
    writer = RunWriter(task.prefix, task.bucket_bits)
    smallest = _Smallest()
    num_rows = num_pairs = 0
    with _few_collections():
        for number, span in task.spans:
            rows = _checked_rows(source.read(span, **task.recipe.options), span)
            for position, row in enumerate(rows):
                if isinstance(row, BadRow):
                    content = Row(id=f"{span.file.name}:{span.start}:{position}")
                    pairs = [Pair(row.detail, None, None, row.reason)]
                else:
                    content, pairs = row, chooser.pairs(row)
                key = int(key_of(source.name, content.id), 16)
                is_heldout = bool(heldout) and content.meta.get("coco_id") in heldout
                writer.add(key, (number, position), content, pairs, heldout=is_heldout)
                if any(pair.reason is None for pair in pairs):
                    smallest.add(key)
                num_rows += 1
                num_pairs += len(pairs)
                if num_rows % _PROGRESS_ROWS == 0:
                    report_progress({"rows": num_rows})
    result = Scattered(
        dependency=task.dependency,
        runs=writer.close(),
        rows=num_rows,
        pairs=num_pairs,
        fields=by_field(chooser.fields),
        smallest=smallest.keys(),
    )
    write_whole(f"{task.prefix}.json", result.model_dump_json().encode())
    return result


def estimated_records(sketches: Iterable[Sequence[int]]) -> int:
    """The number of different keys, from the smallest keys of each task.

    Exact below `_SKETCH`. Above, it comes from the k-th smallest key, since keys are uniform: the
    standard error is about 1.5 %. The estimate does not depend on the split into tasks.
    """
    smallest = sorted(set(chain.from_iterable(sketches)))[:_SKETCH]
    if len(smallest) < _SKETCH:
        return len(smallest)
    return (_SKETCH - 1) * KEYS // smallest[-1]


def by_field(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Counts as field -> reason -> count."""
    nested: dict[str, dict[str, int]] = {}
    for (field, reason), count in sorted(counts.items()):
        nested.setdefault(field, {})[reason] = count
    return nested


class _Smallest:
    """The smallest of all added keys, without repeats."""

    def __init__(self) -> None:
        self._keys: set[int] = set()
        self._limit = KEYS

    def add(self, key: int) -> None:
        if key >= self._limit:
            return
        self._keys.add(key)
        if len(self._keys) >= 2 * _SKETCH:
            self._keys = set(sorted(self._keys)[:_SKETCH])
            self._limit = max(self._keys)

    def keys(self) -> list[int]:
        return sorted(self._keys)[:_SKETCH]


def _checked_rows(rows: Iterator[Row | BadRow], span: Span) -> Iterator[Row | BadRow]:
    """The rows of a span, whose file must not begin with bad rows only.

    Raises:
        PmdError: the first rows are all bad.
    """
    if span.start:
        yield from rows
        return
    first = list(islice(rows, _FIRST_ROWS))
    if len(first) > 2 and all(isinstance(row, BadRow) for row in first):
        detail = next(row.detail for row in first if isinstance(row, BadRow))
        raise PmdError(
            f"{span.file}: none of the first {len(first)} rows can be used ({detail}): "
            "is it another source's file?"
        )
    yield from first
    yield from rows


@contextmanager
def _few_collections() -> Iterator[None]:
    """Run the cycle collector rarely: it spent a sixth of the time on the buffer's tuples."""
    before = gc.get_threshold()
    gc.set_threshold(1_000_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
