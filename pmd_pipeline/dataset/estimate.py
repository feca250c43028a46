"""Estimate the cost of a build: from a probe, or from figures that the recipe records."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.base.record import Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join
from pmd_pipeline.dataset.probe import (
    NUM_GROUPS,
    Interval,
    ProbeResult,
    bare_record,
    calibrate,
    probe_records,
)
from pmd_pipeline.index.build import load_index
from pmd_pipeline.index.choose import Chooser
from pmd_pipeline.index.records import IndexRecord, read_part
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.sources import find_annotations
from pmd_pipeline.sources.upstream.files import Span

_MAX_SPANS = 16
"""Spans that a probe without an index reads rows from."""

_RECORD_BYTES = 2048
"""Bytes of a record in tar and ledger without its image, about."""


@dataclass(frozen=True)
class BuildEstimate:
    """The estimated cost of building one source, or several.

    Args:
        basis: origin of the figures, in a sentence.
        records: images to fetch.
        alive: success rate, the share of records with an image.
        pairs: in the shards, if pairs are lost as often as images.
        bytes_down: fetched from the web.
        bytes_stored: of the shards.
        shards: parts.
        cpu_hours: of one core.
        hours: elapsed; at least the CPU time, at most the request rate of the probe.
        lost: share of the probe's records by failure or drop reason, most frequent first.
    """

    source: str
    basis: str
    records: int
    alive: Interval
    images: Interval
    pairs: Interval
    bytes_down: Interval
    bytes_stored: Interval
    shards: int
    cpu_hours: Interval
    hours: Interval
    lost: Mapping[str, float]


def estimate_from_recorded(recipe: Recipe, data: str, workers: int) -> BuildEstimate:
    """The estimate from the figures in the recipe's `[expected]`, without network.

    Args:
        data: address of the dataset; if it has an index, records and pairs are counted there.
        workers: tasks at a time, with a core each.

    Raises:
        PmdError: the recipe has no `[expected]`, or the source's images are not fetched.
    """
    expected = recipe.expected
    _refuse_local(recipe)
    if expected is None:
        raise PmdError(
            f"the recipe of {recipe.source} has no section [expected]: give --probe N to measure"
        )
    cpu_seconds = calibrate(recipe.images.model_dump_json(), expected.pixels, expected.image_bytes)
    result = ProbeResult(
        alive=Interval(expected.alive),
        bytes_down=Interval(expected.image_bytes * expected.alive),
        bytes_stored=Interval((expected.stored_bytes + _RECORD_BYTES) * expected.alive),
        cpu_seconds=cpu_seconds * expected.alive,
    )
    return _estimate(recipe, data, result, f"recorded: {expected.seen}", workers)


def estimate_from_probe(
    recipe: Recipe, raw: str, data: str, num: int, workers: int, reporter: Reporter
) -> BuildEstimate:
    """The estimate from `num` records of the source, built now by the recipe.

    The records are the first of the index, which are a random sample. Without an index, they are
    rows from all over the annotation files.

    Raises:
        PmdError: there is neither an index nor an annotation file, there are too few records, or
            the source's images are not fetched.
    """
    _refuse_local(recipe)
    index = list(_index_records(join(data, "index", recipe.source), num))
    records = index or _row_records(recipe, raw, num)
    if len(records) < NUM_GROUPS:
        raise PmdError(
            f"{len(records)} records of {recipe.source} tell nothing: probe {NUM_GROUPS}"
        )
    with reporter.stage(f"{recipe.source} probe", "records", len(records)) as stage:
        result = probe_records(
            recipe,
            records,
            lambda report: stage.advance(
                f"group {report.part}", {"records": report.records, "images": report.images}
            ),
            workers,
        )
    origin = "its index" if index else "its annotation files"
    today = datetime.now(tz=UTC).date().isoformat()
    basis = f"probe of {len(records)} records of {origin}, {today}"
    return _estimate(recipe, data, result, basis, workers)


def total_estimate(estimates: Sequence[BuildEstimate]) -> BuildEstimate:
    """The sum of estimates of builds that run one after another."""
    records = sum(one.records for one in estimates)
    images = _sum_of([one.images for one in estimates])
    return BuildEstimate(
        source="all",
        basis="",
        records=records,
        alive=images * (1 / records),
        images=images,
        pairs=_sum_of([one.pairs for one in estimates]),
        bytes_down=_sum_of([one.bytes_down for one in estimates]),
        bytes_stored=_sum_of([one.bytes_stored for one in estimates]),
        shards=sum(one.shards for one in estimates),
        cpu_hours=_sum_of([one.cpu_hours for one in estimates]),
        hours=_sum_of([one.hours for one in estimates]),
        lost={},
    )


def _refuse_local(recipe: Recipe) -> None:
    if recipe.kind != "pairs":
        raise PmdError(f"{recipe.source} is read from files you have: there is nothing to plan")


def _estimate(
    recipe: Recipe, data: str, probe: ProbeResult, basis: str, workers: int
) -> BuildEstimate:
    records, pairs = _population(recipe, data)
    cpu_hours = probe.cpu_seconds * (records / 3600)
    least = cpu_hours.value / workers
    hours = Interval(least, least)
    if probe.seconds:
        slowest = max(least, probe.seconds.value * records / 3600 / workers)
        hours = Interval(slowest, least, slowest)
    return BuildEstimate(
        source=recipe.source,
        basis=basis,
        records=records,
        alive=probe.alive,
        images=probe.alive * records,
        pairs=probe.alive * pairs,
        bytes_down=probe.bytes_down * records,
        bytes_stored=probe.bytes_stored * records,
        shards=math.ceil(records / recipe.part_records),
        cpu_hours=cpu_hours,
        hours=hours,
        lost=probe.lost or {},
    )


def _population(recipe: Recipe, data: str) -> tuple[int, int]:
    """Records and pairs of the whole source: from its index, its recipe or upstream's count.

    Raises:
        PmdError: none of them states it.
    """
    index = load_index(join(data, "index", recipe.source))
    if index:
        return sum(part.records for part in index.parts), index.counts.kept
    if recipe.expected:
        return recipe.expected.records, recipe.expected.pairs
    info = recipe.load_source().info
    rows = info.upstream_rows or (info.paper.pairs if info.paper else None)
    if rows is None:
        raise PmdError(
            f"{recipe.source}: its number of records is unknown; build its index first (pmd build "
            "--limit 1), or state [expected] in the recipe"
        )
    return rows, rows


def _index_records(folder: str, num: int) -> Iterator[IndexRecord]:
    index = load_index(folder)
    left = num
    for part in index.parts if index else ():
        if left <= 0:
            return
        yield from read_part(folder, part, left)
        left -= part.records


def _row_records(recipe: Recipe, raw: str, num: int) -> list[IndexRecord]:
    """Records from the first rows of evenly spaced spans of the annotation files."""
    spans = find_annotations(recipe.load_source(), raw, recipe.form).spans
    sampled = spans[:: math.ceil(len(spans) / _MAX_SPANS)]
    chooser = Chooser(recipe.captions)
    each = math.ceil(num / len(sampled))
    by_key = {
        record.key: record
        for span in sampled
        for record in islice(_span_records(recipe, span, chooser), each)
    }
    return list(by_key.values())[:num]


def _span_records(recipe: Recipe, span: Span, chooser: Chooser) -> Iterator[IndexRecord]:
    """Records of the rows that have an address and a pair."""
    for row in recipe.load_source().read(span, **recipe.options):
        if isinstance(row, Row) and row.url and any(p.reason is None for p in chooser.pairs(row)):
            yield bare_record(recipe.source, row)


def _sum_of(ranges: Sequence[Interval]) -> Interval:
    """Sum of independent estimates; its ends are unknown if an end of one of them is."""
    value = sum(one.value for one in ranges)
    lows = [one.value - one.low for one in ranges if one.low is not None]
    highs = [one.high - one.value for one in ranges if one.high is not None]
    return Interval(
        value,
        value - math.hypot(*lows) if len(lows) == len(ranges) else None,
        value + math.hypot(*highs) if len(highs) == len(ranges) else None,
    )
