"""First stage: upstream's rows become an index of records, ordered by key and cut into parts.

This is an external sort. `scatter` reads rows and writes them to sorted runs; `gather_parts` merges
one range of keys from all runs into the index files of its parts. `build_index` plans the tasks and
runs them in a pool.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pmd_pipeline.base.parallel import OnProgress, Pool, ReportProgress, in_order
from pmd_pipeline.base.storage import load_model, remove
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.files import join, write_whole
from pmd_pipeline.contract.models import FORMAT, Counts, FileDigest, StoredModel
from pmd_pipeline.filters.caption import lid_model
from pmd_pipeline.index.external_sort import BatchRange, batch_ranges, read_range
from pmd_pipeline.index.records import IndexPart, is_whole, part_bounds, write_parts
from pmd_pipeline.index.scatter import Scattered, ScatterTask, by_field, estimated_records, scatter
from pmd_pipeline.index.upstream_digests import upstream_digests
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.sources import Annotations
from pmd_pipeline.sources.upstream.files import SPAN_BYTES, Span, UpstreamFile
from pmd_pipeline.sources.upstream.held_out import HeldOutImages

GATHER_BYTES = 48 << 20
"""Bytes of runs that one gather task holds in memory."""

_INDEX_FILE = "index.json"
_RUNS_FOLDER = "runs"


class SpanEntry(StoredModel):
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


class Index(StoredModel):
    """The content of `index.json`: counts of all upstream rows of a source, and its parts.

    Args:
        dependency: digest of the upstream files and of the rules.
        rules: the part of the recipe that the index depends on.
        rows: upstream rows read.
        counts: pairs; those kept are the input of the shards.
        fields: the outcome of each candidate caption that was checked, by field and reason.
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
class GatherTask:
    """Parts `first` to `stop` (excluded) of `num_parts`, gathered from batches of runs."""

    folder: str
    ranges: tuple[BatchRange, ...]
    num_parts: int
    first: int
    stop: int
    drop_repeats: bool

    def __str__(self) -> str:
        return f"gathering index parts {self.first} to {self.stop - 1} of {self.folder}"


def build_index(
    recipe: Recipe,
    annotations: Annotations,
    folder: str,
    pool: Pool,
    on_progress: OnProgress,
) -> Index:
    """The index of `recipe` in `folder`, from the annotation files.

    An index, or a run, whose dependency has not changed is reused.

    Raises:
        PmdError: files are broken, or not what the source reads.
    """
    spans, heldout = annotations.spans, annotations.held_out
    upstream, split = upstream_digests(annotations, folder, pool, on_progress)
    leakage = split or ("not checked" if recipe.load_source().info.shares_coco else "none")
    dependency = _index_dependency(recipe, upstream, leakage)
    old = load_index(folder)
    if old and old.dependency == dependency and is_whole(folder, old.parts):
        return old
    remove(join(folder, _INDEX_FILE))
    bits = _bucket_bits(spans)
    scattered = _scatter_all(recipe, spans, heldout, folder, (dependency, bits), pool, on_progress)
    parts = _gather_all(recipe, scattered, folder, bits, pool, on_progress)
    index = Index(
        source=recipe.source,
        dependency=dependency,
        rules=recipe.index_rules(),
        rows=sum(one.rows for one in scattered),
        counts=Counts.total(part.counts for part in parts),
        fields=_by_field(scattered),
        upstream=upstream,
        spans=[SpanEntry.of(span) for span in spans],
        leakage=leakage,
        parts=parts,
    )
    assert index.counts.unaccounted() == 0
    bare = sum(part.bare for part in parts)
    assert index.counts.pairs_in - bare == sum(one.pairs for one in scattered)
    write_whole(join(folder, _INDEX_FILE), index.model_dump_json(indent=1).encode())
    remove(join(folder, _RUNS_FOLDER))
    return index


def load_index(folder: str) -> Index | None:
    """The index in `folder`; None where there is none of this format."""
    return load_model(Index, folder, _INDEX_FILE)


def gather_parts(task: GatherTask, _report_progress: ReportProgress) -> list[IndexPart]:
    """Write the index files of the task's parts."""
    bounds = part_bounds(task.num_parts)
    low, high = bounds[task.first], bounds[task.stop]
    return write_parts(
        read_range(task.ranges, low, high),
        task.folder,
        range(task.first, task.stop),
        task.num_parts,
        drop_repeats=task.drop_repeats,
    )


def _index_dependency(recipe: Recipe, upstream: Sequence[FileDigest], leakage: str) -> str:
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
    heldout: HeldOutImages | None,
    folder: str,
    dependency: tuple[str, int],
    pool: Pool,
    on_progress: OnProgress,
) -> list[Scattered]:
    tasks = [
        ScatterTask(
            recipe=recipe,
            spans=tuple(group),
            heldout=heldout,
            prefix=join(folder, _RUNS_FOLDER, f"{number:06d}"),
            bucket_bits=dependency[1],
            dependency=digest([*dependency, [(n, str(s.file), s.start, s.stop) for n, s in group]]),
        )
        for number, group in enumerate(_grouped(spans))
    ]
    return in_order(pool, scatter, tasks, on_progress)


def _gather_all(
    recipe: Recipe,
    scattered: Sequence[Scattered],
    folder: str,
    bucket_bits: int,
    pool: Pool,
    on_progress: OnProgress,
) -> list[IndexPart]:
    records = estimated_records(one.smallest for one in scattered)
    num_parts = max(1, round(records / recipe.part_records))
    runs = [run for one in scattered for run in one.runs]
    num_bytes = sum(run.num_bytes for run in runs)
    step = max(1, num_parts * GATHER_BYTES // max(num_bytes, 1))
    bounds = part_bounds(num_parts)
    starts = range(0, num_parts, step)
    tasks = [
        GatherTask(
            folder=folder,
            ranges=batch_ranges(runs, bounds[first], bounds[stop], bucket_bits),
            num_parts=num_parts,
            first=first,
            stop=stop,
            drop_repeats=recipe.captions.drop_repeats,
        )
        for first, stop in zip(starts, [*starts[1:], num_parts], strict=True)
    ]
    return list(chain.from_iterable(in_order(pool, gather_parts, tasks, on_progress)))


def _grouped(spans: Sequence[Span]) -> Iterator[list[tuple[int, Span]]]:
    """Numbered spans in groups of about `SPAN_BYTES`, so that small files share a task."""
    num_spans = Counter(span.file for span in spans)
    group: list[tuple[int, Span]] = []
    weight = 0
    for number, span in enumerate(spans):
        group.append((number, span))
        weight += Path(span.file.path).stat().st_size // num_spans[span.file]
        if len(group) >= 64 or (span.file.member is None and weight >= SPAN_BYTES // 2):
            yield group
            group, weight = [], 0
    if group:
        yield group


def _bucket_bits(spans: Sequence[Span]) -> int:
    """So many bits that one gather task reads few lines of other key ranges."""
    paths = {span.file.path for span in spans}
    num_bytes = sum(Path(path).stat().st_size for path in paths)
    return min(12, max(1, (num_bytes // (GATHER_BYTES // 4)).bit_length()))


def _by_field(scattered: Iterable[Scattered]) -> dict[str, dict[str, int]]:
    counts = Counter[tuple[str, str]]()
    for one in scattered:
        for field, reasons in one.fields.items():
            counts.update({(field, reason): count for reason, count in reasons.items()})
    return by_field(counts)
