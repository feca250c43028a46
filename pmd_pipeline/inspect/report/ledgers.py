"""Rows of ledgers and of the index, from a bounded sample of a source's parts.

Keys are hashes, so every part is a random sample of its source.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl
import pyarrow as pa

from pmd_pipeline.base.tables import MEND_INDEX, read_batches, read_table
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, open_read, sha256_of
from pmd_pipeline.contract.manifest import located
from pmd_pipeline.contract.models import Manifest, ShardEntry, SourceEntry
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LedgerColumn
from pmd_pipeline.index.build import Index, load_index
from pmd_pipeline.index.records import DroppedPair

MAX_RECORDS = 100_000
"""Records of a source that are read; the counts of the manifest are of all."""

MAX_DROPPED = 50_000
"""Dropped pairs of a source that are read for examples."""

COLUMNS: tuple[LedgerColumn, ...] = (
    "key", "url", "caption", "num_pairs", "status", "reason", "error_message", "original_width",
    "original_height", "sha256", "image_offset", "image_size", "json_offset", "json_size",
)  # fmt: skip


@dataclass(frozen=True)
class LedgerSample:
    """Ledger rows of some shards of one source, in order of key.

    Args:
        rows: `COLUMNS`, and `shard`: the address of the row's tar.
        parts: numbers of the parts that are read.
        records: records of the source, in all its parts.
    """

    rows: pl.DataFrame
    parts: tuple[int, ...]
    records: int

    @property
    def is_whole(self) -> bool:
        """Whether the sample has every record of the source."""
        return len(self.rows) == self.records

    @property
    def kept(self) -> pl.DataFrame:
        """The rows whose records are in the shards."""
        return self.rows.filter(pl.col("status") == Status.SUCCESS)


def sample_ledgers(path: str, manifest: Manifest, source: str) -> LedgerSample:
    """About `MAX_RECORDS` ledger rows of `source` at most, from parts at equal distances.

    Args:
        path: address of the manifest.

    Raises:
        PmdError: a ledger is missing, or is not the one that the manifest names.
    """
    shards = [shard for shard in manifest.shards if shard.source == source]
    chosen = _choose_shards(shards)
    frames = [_ledger_frame(path, shard) for shard in chosen]
    empty = pl.DataFrame(schema={**_TYPES, "shard": pl.String})
    return LedgerSample(
        rows=pl.concat(frames) if frames else empty,
        parts=tuple(shard.part for shard in chosen),
        records=sum(shard.records for shard in shards),
    )


def read_columns(address: str, columns: Sequence[str]) -> pl.DataFrame:
    """The columns of a Parquet file; those that it does not have are null.

    Raises:
        PmdError: it is missing, or is no Parquet.
    """
    try:
        with open_read(address) as file:
            table = read_table(file)
            present = [name for name in columns if name in table.schema.names]
            frame = pl.DataFrame(table.select(present))
    except pa.ArrowException as error:
        raise PmdError(f"{address} is no readable Parquet file: build its part again") from error
    missing = [pl.lit(None).alias(name) for name in columns if name not in present]
    return frame.with_columns(missing).select(columns)


def matching_index(data: str, source: str, entry: SourceEntry) -> Index | None:
    """The index under `data` from which `source` was built; None if it is missing or another."""
    index = load_index(join(data, "index", source))
    rules = {name: value for name, value in entry.rules.items() if name != "images"}
    if index and index.upstream == entry.upstream and index.rules == rules:
        return index
    return None


def data_folder(path: str, manifest: Manifest) -> str | None:
    """The folder in which `pmd build` put index and shards; None without shards."""
    if not manifest.shards:
        return None
    data, separator, _ = located(path, manifest.shards[0].path).rpartition("/shards/")
    return data if separator else None


def dropped_pairs(data: str, index: Index, parts: Sequence[int]) -> Iterator[DroppedPair]:
    """About `MAX_DROPPED` pairs at most that the index dropped from `parts`, in order of key."""
    remaining = MAX_DROPPED
    for part in parts:
        address = join(data, "index", index.source, index.parts[part].dropped.name)
        with open_read(address) as file:
            for batch in read_batches(file, rows=1000, address=address, mend=MEND_INDEX):
                yield from (DroppedPair(**row) for row in batch.to_pylist())
                remaining -= len(batch)
                if remaining <= 0:
                    return


def licences(data: str, index: Index, sample: LedgerSample) -> pl.DataFrame:
    """Kept images of the sample by `licence`, the most frequent first."""
    frames = [
        read_columns(join(data, "index", index.source, index.parts[part].kept.name), _LICENCE)
        for part in sample.parts
    ]
    if not frames:
        return pl.DataFrame(schema={"licence": pl.String, "count": pl.UInt32})
    known = pl.concat(frames).join(sample.kept.select("key"), on="key", how="semi")
    counted = known.drop_nulls("licence")["licence"].value_counts()
    return counted.sort(["count", "licence"], descending=[True, False])


_LICENCE = ("key", "licence")


def _choose_shards(shards: Sequence[ShardEntry]) -> list[ShardEntry]:
    """Shards at equal distances, with about `MAX_RECORDS` records together."""
    records = sum(shard.records for shard in shards)
    if records <= MAX_RECORDS:
        return list(shards)
    count = max(1, len(shards) * MAX_RECORDS // records)
    return [shards[number * len(shards) // count] for number in range(count)]


def _ledger_frame(path: str, shard: ShardEntry) -> pl.DataFrame:
    address = located(path, shard.ledger_path)
    if sha256_of(address) != shard.ledger_sha256:
        raise PmdError(
            f"{address} is not the ledger that {path} names: build its part again, or use the "
            "manifest that was written with it"
        )
    if shard.path == shard.ledger_path:
        return _text_frame(address, shard)
    rows = read_columns(address, COLUMNS).cast(pl.Schema(_TYPES))
    return rows.with_columns(shard=pl.lit(located(path, shard.path)))


def _text_frame(address: str, shard: ShardEntry) -> pl.DataFrame:
    """The rows of a shard of texts, which is its own ledger, with the columns of a ledger."""
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
