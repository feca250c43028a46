"""Images with several copies, within a source and across sources, counted in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import polars as pl

from pmd_pipeline.base.parallel import OnProgress
from pmd_pipeline.contract.manifest import located
from pmd_pipeline.contract.models import Manifest
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.inspect.report.ledgers import read_columns

MAX_HASHES = 1_000_000
"""Images in memory at once; a few hundred MB while they are summed."""

_HEX_DIGITS = 15
_NUM_HASHES = 1 << 4 * _HEX_DIGITS
"""Different values of so many digits; they fit into a signed integer."""


@dataclass(frozen=True)
class DuplicateStats:
    """Records whose fetched images have the same bytes.

    Args:
        share: share of all different images that are counted here: those with the smallest
            SHA-256.
        distinct: different images.
        repeated: of them, those with more than one copy.
        shared: different images that two sources both have, by the sources' names, without zeros.
        most: the image with most copies, as the first digits of its SHA-256 and their number.
    """

    share: float
    distinct: int
    repeated: int
    shared: dict[tuple[str, str], int]
    most: tuple[str, int] | None


def find_duplicates(path: str, manifest: Manifest, on_progress: OnProgress) -> DuplicateStats:
    """Duplicates in all ledgers of the manifest at `path`.

    Raises:
        PmdError: a ledger is missing.
    """
    names = sorted(manifest.sources)
    copies, limit = count_copies(_shard_hashes(path, manifest, names, on_progress))
    return _duplicate_stats(copies, limit, names)


def count_copies(ledgers: Iterable[tuple[int, pl.Series]]) -> tuple[pl.DataFrame, int]:
    """Copies by `hash` and `source`, and the limit below which all hashes are counted.

    Args:
        ledgers: number of the source and hashes of the images, shard by shard.
    """
    limit = _NUM_HASHES
    totals = pl.DataFrame(schema={"hash": pl.Int64, "source": pl.UInt8, "copies": pl.UInt32})
    pending = [totals]
    for source, hashes in ledgers:
        below = hashes.filter(hashes < limit)
        pending.append(
            below.alias("hash")
            .to_frame()
            .with_columns(source=pl.lit(source, dtype=pl.UInt8), copies=pl.lit(1, dtype=pl.UInt32))
        )
        if sum(map(len, pending)) > MAX_HASHES:
            totals = _add_up(pending)
            while len(totals) > MAX_HASHES // 2:
                limit //= 2
                totals = totals.filter(pl.col("hash") < limit)
            pending = [totals]
    return _add_up(pending), limit


def _shard_hashes(
    path: str, manifest: Manifest, names: list[str], on_progress: OnProgress
) -> Iterator[tuple[int, pl.Series]]:
    """The number of the source and the hashes of the images, for every shard with images."""
    number = {name: at for at, name in enumerate(names)}
    for done, shard in enumerate(manifest.shards, 1):
        if shard.images:
            yield number[shard.source], _hash_prefixes(located(path, shard.ledger_path))
        on_progress("copies", {"ledgers": done})


def _hash_prefixes(address: str) -> pl.Series:
    rows = read_columns(address, ["sha256", "status"]).filter(pl.col("status") == Status.SUCCESS)
    digits = rows["sha256"].cast(pl.String).str.slice(0, _HEX_DIGITS)
    return digits.str.to_integer(base=16, dtype=pl.Int64, strict=False).drop_nulls()


def _add_up(frames: list[pl.DataFrame]) -> pl.DataFrame:
    summed = pl.concat(frames).group_by("hash", "source").agg(pl.col("copies").sum())
    return summed.sort("hash", "source")


def _duplicate_stats(copies: pl.DataFrame, limit: int, names: list[str]) -> DuplicateStats:
    images = copies.group_by("hash").agg(
        pl.col("copies").sum(),
        pl.lit(2, pl.UInt64).pow(pl.col("source")).sum().alias("sources"),  # one bit per source
    )
    repeated = images.filter(pl.col("copies") > 1)
    repeated = repeated.sort(["copies", "hash"], descending=[True, False])
    shared: dict[tuple[str, str], int] = {}
    for sources, count in repeated["sources"].value_counts().iter_rows():
        holders = [name for at, name in enumerate(names) if sources >> at & 1]
        for pair in combinations(holders, 2):
            shared[pair] = shared.get(pair, 0) + count
    return DuplicateStats(
        share=limit / _NUM_HASHES,
        distinct=len(images),
        repeated=len(repeated),
        shared=dict(sorted(shared.items(), key=lambda item: (-item[1], item[0]))),
        most=(f"{repeated['hash'][0]:0{_HEX_DIGITS}x}", repeated["copies"][0])
        if len(repeated)
        else None,
    )
