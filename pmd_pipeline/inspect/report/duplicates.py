"""Images that are there more than once, within a source and in several, in bounded memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import polars as pl

from pmd_pipeline.base.parallel import OnProgress
from pmd_pipeline.contract.manifest import located
from pmd_pipeline.contract.models import Manifest
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.inspect.report.ledgers import read_columns

MOST_HASHES = 1_000_000
"""Images that are held at once; a few hundred MB while they are summed."""

_HEX_DIGITS = 15
_HASHES = 1 << 4 * _HEX_DIGITS
"""Values that as many digits have; they fit into a signed integer."""


@dataclass(frozen=True)
class Copies:
    """What several records have in common: the bytes of their image as fetched.

    Args:
        share: of all different images, those looked at: the ones with the smallest sha256. Counts
            are of these.
        distinct: different images.
        repeated: of them, those with more than one copy.
        shared: different images that two sources both have, by their names; zeros left out.
        most: the image with most copies, as the first digits of its sha256 and their number.
    """

    share: float
    distinct: int
    repeated: int
    shared: dict[tuple[str, str], int]
    most: tuple[str, int] | None


def find_copies(path: str, manifest: Manifest, on_progress: OnProgress) -> Copies:
    """Look through all ledgers of the manifest at `path`, column by column.

    Raises:
        PmdError: a ledger is not there.
    """
    names = sorted(manifest.sources)
    found = counted(_ledgers(path, manifest, names, on_progress))
    return _summed(found, names)


def counted(ledgers: Iterable[tuple[int, pl.Series]]) -> tuple[pl.DataFrame, int]:
    """Copies by `hash` and `source`, of hashes below the limit that is also given."""
    limit = _HASHES
    held = pl.DataFrame(schema={"hash": pl.Int64, "source": pl.UInt8, "copies": pl.UInt32})
    waiting = [held]
    for source, hashes in ledgers:
        below = hashes.filter(hashes < limit)
        waiting.append(
            below.alias("hash")
            .to_frame()
            .with_columns(source=pl.lit(source, dtype=pl.UInt8), copies=pl.lit(1, dtype=pl.UInt32))
        )
        if sum(map(len, waiting)) > MOST_HASHES:
            held = _together(waiting)
            while len(held) > MOST_HASHES // 2:
                limit //= 2
                held = held.filter(pl.col("hash") < limit)
            waiting = [held]
    return _together(waiting), limit


def _ledgers(
    path: str, manifest: Manifest, names: list[str], on_progress: OnProgress
) -> Iterator[tuple[int, pl.Series]]:
    """The number of the source and the hashes of every shard with images."""
    number = {name: at for at, name in enumerate(names)}
    for done, shard in enumerate(manifest.shards, 1):
        if shard.images:
            yield number[shard.source], _hashes(located(path, shard.ledger_path))
        on_progress("copies", {"ledgers": done})


def _hashes(address: str) -> pl.Series:
    rows = read_columns(address, ["sha256", "status"]).filter(pl.col("status") == Status.SUCCESS)
    digits = rows["sha256"].cast(pl.String).str.slice(0, _HEX_DIGITS)
    return digits.str.to_integer(base=16, dtype=pl.Int64, strict=False).drop_nulls()


def _together(waiting: list[pl.DataFrame]) -> pl.DataFrame:
    summed = pl.concat(waiting).group_by("hash", "source").agg(pl.col("copies").sum())
    return summed.sort("hash", "source")


def _summed(found: tuple[pl.DataFrame, int], names: list[str]) -> Copies:
    held, limit = found
    images = held.group_by("hash").agg(
        pl.col("copies").sum(),
        pl.lit(2, pl.UInt64).pow(pl.col("source")).sum().alias("sources"),  # a bit for each
    )
    repeated = images.filter(pl.col("copies") > 1)
    repeated = repeated.sort(["copies", "hash"], descending=[True, False])
    shared: dict[tuple[str, str], int] = {}
    for sources, count in repeated["sources"].value_counts().iter_rows():
        there = [name for at, name in enumerate(names) if sources >> at & 1]
        for pair in combinations(there, 2):
            shared[pair] = shared.get(pair, 0) + count
    return Copies(
        share=limit / _HASHES,
        distinct=len(images),
        repeated=len(repeated),
        shared=dict(sorted(shared.items(), key=lambda item: (-item[1], item[0]))),
        most=(f"{repeated['hash'][0]:0{_HEX_DIGITS}x}", repeated["copies"][0])
        if len(repeated)
        else None,
    )
