"""First stage: upstream's rows become an index of records, ordered by key and cut into parts.

Reading scatters rows into runs (`scatter`), then each stretch of keys is gathered into the index
files of its parts (`gather`). Both are functions from a task to a small result; `build_index` plans
them and hands them to a pool.
"""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pmd_pipeline import sources
from pmd_pipeline.choose import Chooser, Pair
from pmd_pipeline.errors import PmdError
from pmd_pipeline.filters.caption import lid_model
from pmd_pipeline.format import FORMAT, Counts, FileDigest, digest
from pmd_pipeline.leakage import HeldOut, find_heldout
from pmd_pipeline.parallel import Pool, Tick, Watch, WorkerDied
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.record import BadRow, Row, key_of
from pmd_pipeline.records import IndexPart, is_whole, part_bounds, write_parts
from pmd_pipeline.runs import KEYS, Run, RunWriter, read_range
from pmd_pipeline.storage import join, read_bytes, remove, sha256_of, sizes, write_whole
from pmd_pipeline.upstream import SPAN_BYTES, Span, UpstreamFile

GATHER_BYTES = 48 << 20
"""Bytes of runs that one gather task takes into memory at once."""

_SKETCH = 4096
"""How many of the smallest keys are kept to estimate the number of different ones."""

_FIRST_ROWS = 100
"""A file whose first rows are all bad is the wrong file."""

_TICK_ROWS = 5000
_DONE = "index.json"
_RUNS = "runs"


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpanEntry(_Stored):
    """A span as `index.json` keeps it, so that a pair can be traced to its upstream row."""

    path: str
    member: str | None
    start: int
    stop: int | None
    form: str
    role: str
    beside: list[tuple[str, str, str | None]]

    @classmethod
    def of(cls, span: Span) -> "SpanEntry":
        """The entry of `span`."""
        return cls(
            path=span.file.path,
            member=span.file.member,
            start=span.start,
            stop=span.stop,
            form=span.form,
            role=span.role,
            beside=[(role, file.path, file.member) for role, file in span.beside],
        )

    def span(self) -> Span:
        """The span again."""
        return Span(
            UpstreamFile(self.path, self.member),
            self.start,
            self.stop,
            self.form,
            self.role,
            tuple((role, UpstreamFile(path, member)) for role, path, member in self.beside),
        )


class Index(_Stored):
    """What `index.json` holds: every upstream row of a source, counted, and where its pairs are.

    Args:
        dependency: digest of the upstream files and of the rules that shaped the index.
        rules: those rules.
        rows: upstream rows read.
        counts: pairs; those kept here are the pairs that come into the shards.
        fields: what became of each candidate that was looked at, by field.
        upstream: the annotation files, named relative to the raw folder.
        leakage: see `SourceEntry`.
        parts: in order of key.
    """

    format: int = FORMAT
    source: str
    dependency: str
    rules: dict[str, Any]
    rows: int
    counts: Counts
    fields: dict[str, dict[str, int]]
    upstream: list[FileDigest]
    spans: list[SpanEntry]
    leakage: str
    parts: list[IndexPart]


@dataclass(frozen=True)
class ScatterTask:
    """Spans, with their numbers in upstream order, to be read into runs.

    Args:
        prefix: what the addresses of the runs and of the result begin with.
        dependency: digest of all that the result depends on.
    """

    recipe: Recipe
    spans: tuple[tuple[int, Span], ...]
    heldout: HeldOut | None
    prefix: str
    bucket_bits: int
    dependency: str

    def __str__(self) -> str:
        more = f" and {len(self.spans) - 1} more" if len(self.spans) > 1 else ""
        return f"reading {self.spans[0][1].file}{more} into {self.prefix}"


class Scattered(_Stored):
    """What one scatter task read.

    Args:
        pairs: kept and dropped.
        smallest: its smallest keys with a kept pair, at most `_SKETCH`.
    """

    dependency: str
    runs: list[Run]
    rows: int
    pairs: int
    fields: dict[str, dict[str, int]]
    smallest: list[int]


@dataclass(frozen=True)
class GatherTask:
    """Parts `first` to `stop` (excluded) of `num_parts`, to be gathered from `runs`."""

    folder: str
    runs: tuple[Run, ...]
    bucket_bits: int
    num_parts: int
    first: int
    stop: int
    drop_repeats: bool

    def __str__(self) -> str:
        return f"gathering index parts {self.first} to {self.stop - 1} of {self.folder}"


def build_index(recipe: Recipe, raw: str, folder: str, pool: Pool, watch: Watch) -> Index:
    """The finished index of `recipe` in `folder`, from the annotation files under `raw`.

    What is already there and still true is not made again, whether finished or not.

    Args:
        raw: folder of the source's annotation files; `dataset_coco.json` is also looked for in the
            folder `coco` beside it.

    Raises:
        PmdError: files are missing, broken, or not what the source reads.
    """
    source = sources.load(recipe.source)
    spans = sources.find_spans(source, raw, recipe.form)
    heldout = (
        find_heldout([raw, str(Path(raw).parent / "coco")]) if source.info.shares_coco else None
    )
    upstream, leakage = _digests(raw, folder, spans, heldout, pool, watch)
    if not source.info.shares_coco:
        leakage = "none"
    dependency = _dependency(recipe, upstream, leakage)
    old = load_index(folder)
    if old and old.dependency == dependency and is_whole(folder, old.parts):
        return old
    remove(join(folder, _DONE))
    bits = _bucket_bits(spans)
    scattered = _scatter_all(recipe, spans, heldout, folder, (dependency, bits), pool, watch)
    parts = _gather_all(recipe, scattered, folder, bits, pool, watch)
    index = Index(
        source=recipe.source,
        dependency=dependency,
        rules=recipe.index_rules(),
        rows=sum(one.rows for one in scattered),
        counts=total(part.counts for part in parts),
        fields=_by_field(scattered),
        upstream=upstream,
        spans=[SpanEntry.of(span) for span in spans],
        leakage=leakage,
        parts=parts,
    )
    assert index.counts.unaccounted() == 0
    bare = sum(part.bare for part in parts)
    assert index.counts.pairs_in - bare == sum(one.pairs for one in scattered)
    write_whole(join(folder, _DONE), index.model_dump_json(indent=1).encode())
    remove(join(folder, _RUNS))
    return index


def load_index(folder: str) -> Index | None:
    """The index in `folder`; None where there is none of this format."""
    index: Index | None = _load(Index, folder, _DONE)
    return index


def scatter(task: ScatterTask, tick: Tick) -> Scattered:
    """Read the spans of `task` into runs; nothing is read where that was done before."""
    folder, _, name = task.prefix.rpartition("/")
    old: Scattered | None = _load(Scattered, folder, f"{name}.json")
    if old and old.dependency == task.dependency:
        return old
    source = sources.load(task.recipe.source)
    chooser = Chooser(task.recipe.captions)
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
                    tick({"rows": num_rows})
    result = Scattered(
        dependency=task.dependency,
        runs=writer.close(),
        rows=num_rows,
        pairs=num_pairs,
        fields=_nested(chooser.fields),
        smallest=smallest.keys(),
    )
    write_whole(f"{task.prefix}.json", result.model_dump_json().encode())
    return result


@contextmanager
def _few_collections() -> Iterator[None]:
    """Let the cycle collector rest: a sixth of the time went into walking the buffer's tuples."""
    before = gc.get_threshold()
    gc.set_threshold(1_000_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def gather(task: GatherTask, _tick: Tick) -> list[IndexPart]:
    """Write the index files of the task's parts."""
    bounds = part_bounds(task.num_parts)
    low, high = bounds[task.first], bounds[task.stop]
    return write_parts(
        read_range(task.runs, low, high, task.bucket_bits),
        task.folder,
        range(task.first, task.stop),
        task.num_parts,
        drop_repeats=task.drop_repeats,
    )


def total(counts: Iterable[Counts]) -> Counts:
    """The sum of counts, reason by reason."""
    pairs_in = kept = 0
    dropped, failed = Counter[str](), Counter[str]()
    for one in counts:
        pairs_in += one.pairs_in
        kept += one.kept
        dropped.update(one.dropped)
        failed.update(one.failed)
    return Counts(
        pairs_in=pairs_in,
        kept=kept,
        dropped=dict(sorted(dropped.items())),
        failed=dict(sorted(failed.items())),
    )


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


def estimated_records(sketches: Iterable[Sequence[int]]) -> int:
    """How many different keys there are, from the smallest of each task.

    Exact below `_SKETCH`; above, the k-th smallest of evenly spread keys tells their density, to
    about one and a half per cent. A function of the keys alone, however they were split into tasks.
    """
    smallest = sorted(set(chain.from_iterable(sketches)))[:_SKETCH]
    if len(smallest) < _SKETCH:
        return len(smallest)
    return (_SKETCH - 1) * KEYS // smallest[-1]


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


def _dependency(recipe: Recipe, upstream: Sequence[FileDigest], leakage: str) -> str:
    uses_lid = "is_language" in recipe.captions.filters
    return digest(
        {
            "format": FORMAT,
            "rules": recipe.index_rules(),
            "lid": lid_model()[1] if uses_lid else None,
            "upstream": [(file.name, file.sha256) for file in upstream],
            "leakage": leakage,
        }
    )


def _scatter_all(
    recipe: Recipe,
    spans: Sequence[Span],
    heldout: HeldOut | None,
    folder: str,
    dependency: tuple[str, int],
    pool: Pool,
    watch: Watch,
) -> list[Scattered]:
    tasks = [
        ScatterTask(
            recipe=recipe,
            spans=tuple(group),
            heldout=heldout,
            prefix=join(folder, _RUNS, f"{number:06d}"),
            bucket_bits=dependency[1],
            dependency=digest([*dependency, [(n, str(s.file), s.start, s.stop) for n, s in group]]),
        )
        for number, group in enumerate(_grouped(spans))
    ]
    return _ordered(pool.run(scatter, tasks, watch), tasks)


def _gather_all(
    recipe: Recipe,
    scattered: Sequence[Scattered],
    folder: str,
    bucket_bits: int,
    pool: Pool,
    watch: Watch,
) -> list[IndexPart]:
    records = estimated_records(one.smallest for one in scattered)
    num_parts = max(1, round(records / recipe.part_records))
    runs = tuple(run for one in scattered for run in one.runs)
    num_bytes = sum(run.num_bytes for run in runs)
    step = max(1, num_parts * GATHER_BYTES // max(num_bytes, 1))
    tasks = [
        GatherTask(
            folder=folder,
            runs=runs,
            bucket_bits=bucket_bits,
            num_parts=num_parts,
            first=first,
            stop=min(first + step, num_parts),
            drop_repeats=recipe.captions.drop_repeats,
        )
        for first in range(0, num_parts, step)
    ]
    return list(chain.from_iterable(_ordered(pool.run(gather, tasks, watch), tasks)))


def _ordered(results: Iterable[tuple[Any, Any]], tasks: Sequence[Any]) -> list[Any]:
    """Results in the order of their tasks.

    Raises:
        WorkerDied: a worker died of a task: an index with a hole is no index.
    """
    by_task: dict[int, Any] = {}
    for task, result in results:
        if isinstance(result, WorkerDied):
            raise result
        by_task[id(task)] = result
    return [by_task[id(task)] for task in tasks]


def _grouped(spans: Sequence[Span]) -> Iterator[list[tuple[int, Span]]]:
    """Numbered spans in groups of about `SPAN_BYTES`, so that small files share a task."""
    pieces = Counter(span.file for span in spans)
    group: list[tuple[int, Span]] = []
    weight = 0
    for number, span in enumerate(spans):
        group.append((number, span))
        weight += Path(span.file.path).stat().st_size // pieces[span.file]
        if len(group) >= 64 or (span.file.member is None and weight >= SPAN_BYTES // 2):
            yield group
            group, weight = [], 0
    if group:
        yield group


def _bucket_bits(spans: Sequence[Span]) -> int:
    """Enough buckets that one gather task reads few lines it does not need."""
    paths = {span.file.path for span in spans}
    num_bytes = sum(Path(path).stat().st_size for path in paths)
    return min(12, max(1, (num_bytes // (GATHER_BYTES // 4)).bit_length()))


def _digests(
    raw: str,
    folder: str,
    spans: Sequence[Span],
    heldout: HeldOut | None,
    pool: Pool,
    watch: Watch,
) -> tuple[list[FileDigest], str]:
    """Digests of the files that are read and of the file of held-out images.

    A file whose size and time are those of its last digest is not read again.
    """
    files = [span.file for span in spans]
    files += [file for span in spans[:1] for _, file in span.beside]
    paths = list(dict.fromkeys(file.path for file in files + ([heldout.file] if heldout else [])))
    known = _load(_Known, folder, "upstream.json") or _Known()
    stamps = {path: f"{(stat := Path(path).stat()).st_size} {stat.st_mtime_ns}" for path in paths}
    fresh = [path for path in paths if known.stamps.get(path) != stamps[path]]
    found = {path: known.sha256[path] for path in paths if path not in fresh}
    found |= dict(zip(fresh, _ordered(pool.run(_hash, fresh, watch), fresh), strict=True))
    write_whole(
        join(folder, "upstream.json"),
        _Known(stamps=stamps, sha256=found).model_dump_json().encode(),
    )
    read = list(dict.fromkeys(file.path for file in files))
    digests = [
        FileDigest(
            name=Path(path).relative_to(raw).as_posix(),
            sha256=found[path],
            num_bytes=Path(path).stat().st_size,
        )
        for path in read
    ]
    return digests, found[heldout.file.path] if heldout else "not checked"


class _Known(_Stored):
    stamps: dict[str, str] = Field(default_factory=dict)
    sha256: dict[str, str] = Field(default_factory=dict)


def _hash(path: str, _tick: Tick) -> str:
    return sha256_of(path)


def _by_field(scattered: Iterable[Scattered]) -> dict[str, dict[str, int]]:
    counts = Counter[tuple[str, str]]()
    for one in scattered:
        for field, reasons in one.fields.items():
            counts.update({(field, reason): count for reason, count in reasons.items()})
    return _nested(counts)


def _nested(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    nested: dict[str, dict[str, int]] = {}
    for (field, reason), count in sorted(counts.items()):
        nested.setdefault(field, {})[reason] = count
    return nested


def _load(kind: type[Any], folder: str, name: str) -> Any:  # noqa: ANN401 - what `kind` makes
    if name not in sizes(folder):
        return None
    try:
        return kind.model_validate_json(read_bytes(join(folder, name)))
    except ValidationError:
        return None  # of another format: made again
