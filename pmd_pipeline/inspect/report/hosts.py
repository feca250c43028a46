"""Success rates of hosts, from a sample of ledger rows."""

from dataclasses import dataclass

import polars as pl

from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.inspect.report.ledgers import LedgerSample

MAX_HOSTS = 8

_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#:]+)"

_FETCHED = [Status.SUCCESS.value, Status.DROPPED.value]


@dataclass(frozen=True)
class HostStats:
    """Requests to a host and their success rate.

    Args:
        records: records whose image is on the host.
        share: of them, those whose image was fetched.
        failure: the most frequent reason among the others.
        is_rest: all hosts that are not listed, together.
    """

    name: str
    records: int
    share: float
    failure: str | None
    is_rest: bool = False


def host_stats(sample: LedgerSample) -> list[HostStats]:
    """The hosts with most records, then all others together."""
    rows = sample.rows.select(
        pl.col("url").str.extract(_HOST).str.to_lowercase().alias("host"),
        pl.col("status").is_in(_FETCHED).alias("is_fetched"),
        "reason",
    ).drop_nulls("host")
    by_host = rows.group_by("host").agg(pl.len().alias("records"))
    ordered = by_host.sort(["records", "host"], descending=[True, False])
    names = ordered["host"].head(MAX_HOSTS).to_list()
    stats = [_one_host(name, rows.filter(pl.col("host") == name)) for name in names]
    others = rows.filter(~pl.col("host").is_in(names))
    if len(others):
        rest = f"{len(ordered) - len(names):,} other hosts"
        stats.append(_one_host(rest, others, is_rest=True))
    return stats


def _one_host(name: str, rows: pl.DataFrame, *, is_rest: bool = False) -> HostStats:
    failures = rows.filter(~pl.col("is_fetched"))["reason"].drop_nulls().value_counts()
    ordered = failures.sort(["count", "reason"], descending=[True, False])
    first = ordered["reason"].head(1).to_list()
    share = float(rows["is_fetched"].sum()) / len(rows)
    return HostStats(name, len(rows), share, first[0] if first else None, is_rest)
