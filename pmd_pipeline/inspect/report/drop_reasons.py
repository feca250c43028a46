"""What became of a source's pairs: the funnel, the reasons, the hosts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from pmd_pipeline.contract.models import Counts, SourceEntry
from pmd_pipeline.contract.reasons import DROP_REASONS, FAILURE_REASONS
from pmd_pipeline.filters import caption as caption_filters
from pmd_pipeline.filters import image as image_filters
from pmd_pipeline.filters import pixels as pixel_filters
from pmd_pipeline.index.build import Index
from pmd_pipeline.inspect.report.ledgers import Sample

MOST_HOSTS = 8

_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#:]+)"


@dataclass(frozen=True)
class Step:
    """One step of the funnel: what is counted, and how many of the step before are `lost` here."""

    name: str
    count: int
    kind: str
    lost: int = 0
    lost_kind: str = ""


@dataclass(frozen=True)
class Reason:
    """Why pairs are not there; `kind` is `dropped` or `failed`, `share` is of all that came in."""

    name: str
    kind: str
    meaning: str
    pairs: int
    share: float


@dataclass(frozen=True)
class Host:
    """What a host gave of the records that were asked of it.

    Args:
        failure: the commonest reason among those it did not give.
        is_rest: this is all the other hosts together.
    """

    name: str
    records: int
    share: float
    failure: str | None
    is_rest: bool = False


def funnel(entry: SourceEntry, index: Index | None) -> list[Step]:
    """From upstream's rows to the pairs in the shards; each step is what is left of the one before.

    Without the index, the number of upstream rows is not known.
    """
    counts = entry.counts
    decided = counts.pairs_in - sum(counts.dropped.values())
    rows = [Step("rows upstream", index.rows, "upstream")] if index else []
    return [
        *rows,
        Step("pairs in them", counts.pairs_in, "upstream"),
        Step("left by the recipe", decided, "upstream", counts.pairs_in - decided, "dropped"),
        Step("kept", counts.kept, "kept", decided - counts.kept, "failed"),
    ]


def reasons(entry: SourceEntry) -> list[Reason]:
    """Every reason with its meaning: decisions of the recipe, then faults, commonest first."""
    return [*_reasons(entry, "dropped"), *_reasons(entry, "failed")]


def meaning(reason: str, rules: Mapping[str, Any]) -> str:
    """The meaning of a reason; of a filter, its arguments and the summary of its docstring.

    Code outside the package is never imported for it: the manifest may be a stranger's.
    """
    known = DROP_REASONS.get(reason) or FAILURE_REASONS.get(reason)
    if known:
        return known
    for section, key, module in (
        ("captions", "filters", caption_filters),
        ("images", "filters", image_filters),
        ("images", "pixel_filters", pixel_filters),
    ):
        keywords = rules.get(section, {}).get(key, {}).get(reason)
        if keywords is None:
            continue
        arguments = "".join(f", {name} = {value}" for name, value in keywords.items())
        function = getattr(module, reason, None)
        if function is None:
            return f"a filter of the recipe, from outside the package{arguments}"
        summary = (function.__doc__ or "").partition("\n")[0].replace("`", "")
        return f"a filter of the recipe{arguments}: {summary}"
    return "the source's own reason"


def hosts(sampled: Sample) -> list[Host]:
    """The hosts with most records, and the others together; a share is of pictures that came."""
    rows = sampled.rows.select(
        pl.col("url").str.extract(_HOST).str.to_lowercase().alias("host"),
        pl.col("status").is_in(["success", "dropped"]).alias("came"),
        "reason",
    ).drop_nulls("host")
    by_host = rows.group_by("host").agg(pl.len().alias("records"), pl.col("came").sum())
    ordered = by_host.sort(["records", "host"], descending=[True, False])
    names = ordered["host"].head(MOST_HOSTS).to_list()
    found = [_host(name, rows.filter(pl.col("host") == name)) for name in names]
    others = rows.filter(~pl.col("host").is_in(names))
    if len(others):
        found.append(_host(f"{len(ordered) - len(names):,} other hosts", others, is_rest=True))
    return found


def _reasons(entry: SourceEntry, kind: str) -> list[Reason]:
    counts = _counts(entry.counts, kind)
    return [
        Reason(name, kind, meaning(name, entry.rules), pairs, pairs / entry.counts.pairs_in)
        for name, pairs in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if pairs
    ]


def _counts(counts: Counts, kind: str) -> dict[str, int]:
    return counts.dropped if kind == "dropped" else counts.failed


def _host(name: str, rows: pl.DataFrame, *, is_rest: bool = False) -> Host:
    missed = rows.filter(~pl.col("came"))["reason"].drop_nulls().value_counts()
    first = missed.sort(["count", "reason"], descending=[True, False])["reason"].head(1).to_list()
    share = float(rows["came"].sum()) / len(rows)
    return Host(name, len(rows), share, first[0] if first else None, is_rest)
