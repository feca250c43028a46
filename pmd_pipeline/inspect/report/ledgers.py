"""Rows of ledgers and of the index, from a bounded sample of a source's parts.

Keys are hashes, so each part is a random sample of its source, and some parts are one too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from pmd_pipeline.base.tables import MEND_INDEX, read_batches, read_table
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, open_read, sha256_of
from pmd_pipeline.contract.manifest import located
from pmd_pipeline.contract.models import Manifest, ShardEntry, SourceEntry
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.index.build import Index, load_index

MOST_RECORDS = 100_000
"""Records of a source that are looked at one by one; all of them count in the manifest."""

MOST_DROPPED = 50_000
"""Dropped pairs of a source among which examples are looked for."""

COLUMNS = (
    "key", "url", "caption", "num_pairs", "status", "reason", "error_message", "original_width",
    "original_height", "sha256", "image_offset", "image_size", "json_offset", "json_size",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Ledger rows of some shards of one source, in order of key.

    Args:
        rows: `COLUMNS`, and `shard`: the address of the row's tar.
        parts: numbers of the parts that the rows are of.
        records: records of the source; `rows` has some or all of them.
    """

    rows: pl.DataFrame
    parts: tuple[int, ...]
    records: int

    @property
    def is_whole(self) -> bool:
        """Say whether every record of the source is among the rows."""
        return len(self.rows) == self.records

    @property
    def kept(self) -> pl.DataFrame:
        """The rows that are in the shards."""
        return self.rows.filter(pl.col("status") == Status.SUCCESS)


def sample(path: str, manifest: Manifest, source: str) -> Sample:
    """Up to about `MOST_RECORDS` ledger rows of `source`, from parts spread over all of its keys.

    Args:
        path: where the manifest lies.

    Raises:
        PmdError: a ledger is not there, or not the one that the manifest names.
    """
    shards = [shard for shard in manifest.shards if shard.source == source]
    taken = _spread(shards)
    frames = [_rows(path, shard) for shard in taken]
    empty = pl.DataFrame(schema={**_TYPES, "shard": pl.String})
    return Sample(
        rows=pl.concat(frames) if frames else empty,
        parts=tuple(shard.part for shard in taken),
        records=sum(shard.records for shard in shards),
    )


def read_columns(address: str, columns: Sequence[str]) -> pl.DataFrame:
    """These columns of a Parquet file, those it lacks as nulls.

    Raises:
        PmdError: it is not there, or no Parquet.
    """
    try:
        with open_read(address) as file:
            table = read_table(file)
            there = [name for name in columns if name in table.schema.names]
            frame = pl.DataFrame(table.select(there))
    except pa.ArrowException as error:
        raise PmdError(f"{address} is no Parquet that can be read: build its part again") from error
    missing = [pl.lit(None).alias(name) for name in columns if name not in there]
    return frame.with_columns(missing).select(columns)


def matching_index(data: str, source: str, entry: SourceEntry) -> Index | None:
    """The index under `data` that `source` was built from; None where there is none, or another."""
    index = load_index(join(data, "index", source))
    rules = {name: value for name, value in entry.rules.items() if name != "images"}
    if index and index.upstream == entry.upstream and index.rules == rules:
        return index
    return None


def data_folder(path: str, manifest: Manifest) -> str | None:
    """Where `pmd build` put the index of these shards: beside the folder `shards`."""
    if not manifest.shards:
        return None
    data, found, _ = located(path, manifest.shards[0].path).rpartition("/shards/")
    return data if found else None


def dropped_pairs(data: str, index: Index, parts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Up to `MOST_DROPPED` pairs that the index dropped from `parts`, in order of key."""
    left = MOST_DROPPED
    for part in parts:
        address = join(data, "index", index.source, index.parts[part].dropped.name)
        with open_read(address) as file:
            for batch in read_batches(file, rows=1000, address=address, mend=MEND_INDEX):
                yield from batch.to_pylist()
                left -= len(batch)
                if left <= 0:
                    return


def licences(data: str, index: Index, sampled: Sample) -> pl.DataFrame:
    """How many of the sampled images that are kept come under each `licence`, most first."""
    frames = [
        read_columns(join(data, "index", index.source, index.parts[part].kept.name), _LICENCE)
        for part in sampled.parts
    ]
    if not frames:
        return pl.DataFrame(schema={"licence": pl.String, "count": pl.UInt32})
    known = pl.concat(frames).join(sampled.kept.select("key"), on="key", how="semi")
    counted = known.drop_nulls("licence")["licence"].value_counts()
    return counted.sort(["count", "licence"], descending=[True, False])


_LICENCE = ("key", "licence")


def _spread(shards: Sequence[ShardEntry]) -> list[ShardEntry]:
    """Some of `shards`, at equal distances, with about `MOST_RECORDS` records together."""
    records = sum(shard.records for shard in shards)
    if records <= MOST_RECORDS:
        return list(shards)
    count = max(1, len(shards) * MOST_RECORDS // records)
    return [shards[number * len(shards) // count] for number in range(count)]


def _rows(path: str, shard: ShardEntry) -> pl.DataFrame:
    address = located(path, shard.ledger_path)
    if sha256_of(address) != shard.ledger_sha256:
        raise PmdError(
            f"{address} is not the ledger that {path} names: build its part again, or take the "
            "manifest that was written with it"
        )
    if shard.path.endswith(".parquet"):
        return _texts(address, shard)
    rows = read_columns(address, COLUMNS).cast(pl.Schema(_TYPES))
    return rows.with_columns(shard=pl.lit(located(path, shard.path)))


def _texts(address: str, shard: ShardEntry) -> pl.DataFrame:
    """The rows of a shard of texts, which is its own ledger, as if they were a ledger's."""
    texts = read_columns(address, ["text"]).with_row_index("row")
    return texts.select(
        pl.format("{}, row {}", pl.lit(shard.path), "row").alias("key"),
        pl.col("text").alias("caption"),
        pl.lit(1).alias("num_pairs"),
        pl.lit(Status.SUCCESS).alias("status"),
        *(pl.lit(None).alias(name) for name in COLUMNS if name not in _TEXT_COLUMNS),
        pl.lit(address).alias("shard"),
    ).select(*(pl.col(name).cast(_TYPES[name]) for name in COLUMNS), "shard")


_NUMBERS = {"num_pairs", "original_width", "original_height"}
_PLACES = {"image_offset", "image_size", "json_offset", "json_size"}
_TEXT_COLUMNS = {"key", "caption", "num_pairs", "status"}
_TYPES: dict[str, type[pl.DataType]] = {
    name: pl.Int32 if name in _NUMBERS else pl.Int64 if name in _PLACES else pl.String
    for name in COLUMNS
}
