"""What a build will cost, before anything is spent: from a probe, or from recorded figures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.base.record import Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join
from pmd_pipeline.dataset.probe import GROUPS, Range, Trial, bare_record, calibrated, tried
from pmd_pipeline.index.build import load_index
from pmd_pipeline.index.choose import Chooser
from pmd_pipeline.index.records import IndexRecord, read_part
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.sources import find_annotations
from pmd_pipeline.sources.upstream.files import Span

_MOST_SPANS = 16
_RECORD_BYTES = 2048
"""Bytes of a record in tar and ledger besides its image, about."""


@dataclass(frozen=True)
class BuildEstimate:
    """What building one source, or several, will take.

    Args:
        basis: where the figures come from, in a sentence.
        records: images to ask for.
        alive: share of them that give an image.
        pairs: that come out, if pairs are lost as often as images.
        bytes_down: of the web.
        bytes_stored: of the shards.
        shards: parts.
        cpu_hours: of one core.
        hours: on the wall; from what the processors need to the pace of the probe.
        lost: share of the probe by reason, most frequent first.
    """

    source: str
    basis: str
    records: int
    alive: Range
    images: Range
    pairs: Range
    bytes_down: Range
    bytes_stored: Range
    shards: int
    cpu_hours: Range
    hours: Range
    lost: Mapping[str, float]


def recorded(recipe: Recipe, data: str, workers: int) -> BuildEstimate:
    """The plan of a source from what its recipe records of others' runs, without network.

    Args:
        data: address under which its index lies, if it is made; then records and pairs are counted.
        workers: tasks at a time, with a core each.

    Raises:
        PmdError: the recipe records nothing, or nothing of the source is fetched.
    """
    expected = recipe.expected
    _check(recipe)
    if expected is None:
        raise PmdError(
            f"the recipe of {recipe.source} has no section [expected]: give --probe N to measure"
        )
    live = calibrated(recipe.images.model_dump_json(), expected.pixels, expected.image_bytes)
    trial = Trial(
        alive=Range(expected.alive),
        bytes_down=Range(expected.image_bytes * expected.alive),
        bytes_stored=Range((expected.stored_bytes + _RECORD_BYTES) * expected.alive),
        cpu_seconds=live * expected.alive,
    )
    return _plan(recipe, data, trial, f"recorded: {expected.seen}", workers)


def probed(
    recipe: Recipe, raw: str, data: str, num: int, workers: int, reporter: Reporter
) -> BuildEstimate:
    """The plan of a source from `num` of its records, fetched now as the build would fetch them.

    The records are the first of its index, which are a random sample; where there is no index yet,
    rows from all over its annotation files.

    Raises:
        PmdError: there is neither an index nor an annotation file, too few records, or nothing of
            the source is fetched.
    """
    _check(recipe)
    index = list(_of_index(join(data, "index", recipe.source), num))
    records = index or _of_rows(recipe, raw, num)
    if len(records) < GROUPS:
        raise PmdError(f"{len(records)} records of {recipe.source} tell nothing: probe {GROUPS}")
    with reporter.stage(f"{recipe.source} probe", "records", len(records)) as stage:
        trial = tried(
            recipe,
            records,
            lambda report: stage.advance(
                f"group {report.part}", {"records": report.records, "images": report.images}
            ),
            workers,
        )
    where = "its index" if index else "its annotation files"
    today = datetime.now(tz=UTC).date().isoformat()
    basis = f"probe of {len(records)} records of {where}, {today}"
    return _plan(recipe, data, trial, basis, workers)


def total(plans: Sequence[BuildEstimate]) -> BuildEstimate:
    """The sum of plans that are carried out one after another."""
    records = sum(plan.records for plan in plans)
    images = _sum([plan.images for plan in plans])
    return BuildEstimate(
        source="all",
        basis="",
        records=records,
        alive=images * (1 / records),
        images=images,
        pairs=_sum([plan.pairs for plan in plans]),
        bytes_down=_sum([plan.bytes_down for plan in plans]),
        bytes_stored=_sum([plan.bytes_stored for plan in plans]),
        shards=sum(plan.shards for plan in plans),
        cpu_hours=_sum([plan.cpu_hours for plan in plans]),
        hours=_sum([plan.hours for plan in plans]),
        lost={},
    )


def _check(recipe: Recipe) -> None:
    if recipe.kind != "pairs":
        raise PmdError(f"{recipe.source} is read from files you have: there is nothing to plan")


def _plan(recipe: Recipe, data: str, trial: Trial, basis: str, workers: int) -> BuildEstimate:
    records, pairs = _population(recipe, data)
    cpu_hours = trial.cpu_seconds * (records / 3600)
    least = cpu_hours.value / workers
    hours = Range(least, least)
    if trial.seconds:
        slowest = max(least, trial.seconds.value * records / 3600 / workers)
        hours = Range(slowest, least, slowest)
    return BuildEstimate(
        source=recipe.source,
        basis=basis,
        records=records,
        alive=trial.alive,
        images=trial.alive * records,
        pairs=trial.alive * pairs,
        bytes_down=trial.bytes_down * records,
        bytes_stored=trial.bytes_stored * records,
        shards=math.ceil(records / recipe.part_records),
        cpu_hours=cpu_hours,
        hours=hours,
        lost=trial.lost or {},
    )


def _population(recipe: Recipe, data: str) -> tuple[int, int]:
    """Records and pairs of the whole source: counted by its index, or else recorded."""
    index = load_index(join(data, "index", recipe.source))
    if index:
        return sum(part.records for part in index.parts), index.counts.kept
    if recipe.expected:
        return recipe.expected.records, recipe.expected.pairs
    info = recipe.load_source().info
    rows = info.upstream_rows or (info.paper.pairs if info.paper else 0)
    return rows, rows


def _of_index(folder: str, num: int) -> Iterator[IndexRecord]:
    index = load_index(folder)
    left = num
    for part in index.parts if index else ():
        if left <= 0:
            return
        yield from read_part(folder, part, left)
        left -= part.records


def _of_rows(recipe: Recipe, raw: str, num: int) -> list[IndexRecord]:
    """Records of rows from the beginnings of spans all over the annotation files."""
    spans = find_annotations(recipe.load_source(), raw, recipe.form).spans
    chosen = spans[:: math.ceil(len(spans) / _MOST_SPANS)]
    chooser = Chooser(recipe.captions)
    each = math.ceil(num / len(chosen))
    found = {
        record.key: record
        for span in chosen
        for record in islice(_of_span(recipe, span, chooser), each)
    }
    return list(found.values())[:num]


def _of_span(recipe: Recipe, span: Span, chooser: Chooser) -> Iterator[IndexRecord]:
    """Records of rows that have an address and a pair."""
    for row in recipe.load_source().read(span, **recipe.options):
        if isinstance(row, Row) and row.url and any(p.reason is None for p in chooser.pairs(row)):
            yield bare_record(recipe.source, row)


def _sum(ranges: Sequence[Range]) -> Range:
    """Sum of independent estimates; an end that one of them lacks, the sum lacks."""
    value = sum(one.value for one in ranges)
    lows = [one.value - one.low for one in ranges if one.low is not None]
    highs = [one.high - one.value for one in ranges if one.high is not None]
    return Range(
        value,
        value - math.hypot(*lows) if len(lows) == len(ranges) else None,
        value + math.hypot(*highs) if len(highs) == len(ranges) else None,
    )
