"""Reading: the rows of some spans become runs, sorted by key, with what was counted on the way."""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

from pydantic import BaseModel, ConfigDict

from pmd_pipeline.base.parallel import ReportProgress
from pmd_pipeline.base.record import BadRow, Row, key_of
from pmd_pipeline.base.storage import load_model
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import write_whole
from pmd_pipeline.index.choose import Chooser, Pair
from pmd_pipeline.index.external_sort import KEYS, Run, RunWriter
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.sources.upstream.files import Span
from pmd_pipeline.sources.upstream.held_out import HeldOutImages

_SKETCH = 4096
"""How many of the smallest keys are kept to estimate the number of different ones."""

_FIRST_ROWS = 100
"""A file whose first rows are all bad is the wrong file."""

_TICK_ROWS = 5000


@dataclass(frozen=True)
class ScatterTask:
    """Spans, with their numbers in upstream order, to be read into runs.

    Args:
        prefix: what the addresses of the runs and of the result begin with.
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


class Scattered(BaseModel):
    """What one scatter task read.

    Args:
        pairs: kept and dropped.
        smallest: its smallest keys with a kept pair, at most `_SKETCH`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dependency: str
    runs: list[Run]
    rows: int
    pairs: int
    fields: dict[str, dict[str, int]]
    smallest: list[int]


def scatter(task: ScatterTask, report_progress: ReportProgress) -> Scattered:
    """Read the spans of `task` into runs; nothing is read where that was done before."""
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
            for place, row in enumerate(_usable(source.read(span, **task.recipe.options), span)):
                if isinstance(row, BadRow):
                    content = Row(id=f"{span.file.name}:{span.start}:{place}")
                    pairs = [Pair(row.detail, None, None, row.reason)]
                else:
                    content, pairs = row, chooser.pairs(row)
                key = int(key_of(source.name, content.id), 16)
                is_heldout = bool(heldout) and content.meta.get("coco_id") in heldout
                writer.add(key, (number, place), content, pairs, heldout=is_heldout)
                if any(pair.reason is None for pair in pairs):
                    smallest.add(key)
                num_rows += 1
                num_pairs += len(pairs)
                if num_rows % _TICK_ROWS == 0:
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
    """How many different keys there are, from the smallest of each task.

    Exact below `_SKETCH`; above, the k-th smallest of evenly spread keys tells their density, to
    about one and a half per cent. A function of the keys alone, however they were split into tasks.
    """
    smallest = sorted(set(chain.from_iterable(sketches)))[:_SKETCH]
    if len(smallest) < _SKETCH:
        return len(smallest)
    return (_SKETCH - 1) * KEYS // smallest[-1]


def by_field(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Counts by field, then by reason."""
    nested: dict[str, dict[str, int]] = {}
    for (field, reason), count in sorted(counts.items()):
        nested.setdefault(field, {})[reason] = count
    return nested


class _Smallest:
    """The smallest of all keys added, without repeats."""

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


def _usable(rows: Iterator[Row | BadRow], span: Span) -> Iterator[Row | BadRow]:
    """The rows, unless the file begins with nothing but bad ones.

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
    """Let the cycle collector rest: a sixth of the time went into walking the buffer's tuples."""
    before = gc.get_threshold()
    gc.set_threshold(1_000_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)
