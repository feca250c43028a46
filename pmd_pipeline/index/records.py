"""The second half of the external sort: lines of a key range become records and index files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pmd_pipeline.base.storage import sizes
from pmd_pipeline.base.tables import MEND_INDEX, read_batches
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, open_read, write_whole
from pmd_pipeline.contract.models import Counts, FileDigest, StoredModel
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.contract.schemas import DROPPED_SCHEMA, INDEX_IMAGE, KEPT_SCHEMA
from pmd_pipeline.index.boxes import clip_boxes
from pmd_pipeline.index.external_sort import KEYS


class IndexPart(StoredModel):
    """One part of an index: its records, its pairs, and the files that hold them.

    Args:
        bare: images without any text upstream; each counts as one dropped pair.
        kept: file of the records.
        dropped: file of the dropped pairs.
    """

    part: int
    records: int
    bare: int
    counts: Counts
    kept: FileDigest
    dropped: FileDigest


@dataclass(frozen=True)
class IndexRecord:
    """One record of the index, the input of the build; see `KEPT_SCHEMA`."""

    key: str
    id: str
    url: str | None
    file: str | None
    licence: str | None
    width: int | None
    height: int | None
    sha256: str | None
    meta: str | None
    captions: list[str]
    fields: list[str]
    boxes: list[list[float]] | None
    spans: list[int]
    rows: list[int]


@dataclass(frozen=True)
class DroppedPair:
    """One pair that the index dropped; see `DROPPED_SCHEMA`."""

    key: str
    id: str
    url: str | None
    field: str | None
    text: str | None
    reason: str
    span: int
    row: int


def part_bounds(num_parts: int) -> list[int]:
    """The first key of each part, and one more than the last key."""
    return [(KEYS * part + num_parts - 1) // num_parts for part in range(num_parts + 1)]


def part_of(key: str, num_parts: int) -> int:
    """The part of the record `key`.

    >>> part_of("8000000000000000", 2)
    1
    """
    return int(key, 16) * num_parts >> 64


def write_parts(
    table: pa.Table, folder: str, parts: range, num_parts: int, *, drop_repeats: bool
) -> list[IndexPart]:
    """Write the index files of `parts` from all lines of their key range, in order of key.

    Raises:
        PmdError: two images share a key.
    """
    lines = pl.DataFrame(table)
    records = _merge_images(lines)
    pairs = _final_pairs(lines, records, drop_repeats=drop_repeats)
    kept = _kept(pairs.filter(pl.col("reason").is_null()), records)
    dropped = pairs.filter(pl.col("reason").is_not_null())
    bounds = part_bounds(num_parts)
    return [
        _write_part(folder, part, _between(kept, low, high), _between(dropped, low, high))
        for part, (low, high) in zip(
            parts, pairwise(bounds[parts.start : parts.stop + 1]), strict=True
        )
    ]


def read_part(folder: str, part: IndexPart, limit: int | None = None) -> Iterator[IndexRecord]:
    """The records of a part in order of key, at most `limit`."""
    taken = 0
    address = join(folder, part.kept.name)
    with open_read(address) as file:
        for batch in read_batches(file, rows=1000, address=address, mend=MEND_INDEX):
            for row in batch.to_pylist():
                if taken == limit:
                    return
                taken += 1
                yield IndexRecord(**row)


def is_whole(folder: str, parts: Sequence[IndexPart]) -> bool:
    """Whether every index file exists in its full size."""
    file_sizes = sizes(folder)
    return all(
        file_sizes.get(file.name) == file.num_bytes
        for part in parts
        for file in (part.kept, part.dropped)
    )


def _merge_images(lines: pl.DataFrame) -> pl.DataFrame:
    """One row per key; of each column, the first value in upstream order."""
    first_values = [pl.col(name).drop_nulls().first() for name in INDEX_IMAGE]
    records = lines.group_by("key", maintain_order=True).agg(
        *first_values,
        pl.col("heldout").any(),
        pl.col("id").n_unique().alias("ids"),
        pl.col("pair").any().alias("has_pair"),
        pl.col("span").first(),
        pl.col("row").first(),
    )
    collisions = records.filter(pl.col("ids") > 1)
    if len(collisions):
        key = collisions["key"][0]
        ids = lines.filter(pl.col("key") == key)["id"].unique(maintain_order=True).to_list()
        raise PmdError(f"the images {ids[0]!r} and {ids[1]!r} have one key, {key:016x}: drop one")
    return records


def _final_pairs(lines: pl.DataFrame, records: pl.DataFrame, *, drop_repeats: bool) -> pl.DataFrame:
    """Every pair with its final reason, in order; a record without any pair counts as one."""
    bare = records.filter(~pl.col("has_pair"))
    bare = bare.with_columns(reason=pl.lit("no_caption"), bare=pl.lit(value=True))
    pairs = pl.concat(
        [
            lines.filter(pl.col("pair")).drop(*INDEX_IMAGE, "heldout", "pair"),
            bare.select("key", "span", "row", "reason", "bare"),
        ],
        how="diagonal",
    ).sort("key", "span", "row", maintain_order=True)
    pairs = pairs.join(
        records.drop("span", "row", "has_pair", "ids"), on="key", how="left", maintain_order="left"
    )
    pairs = clip_boxes(pairs)
    pairs = pairs.with_columns(
        reason=pl.when(pl.col("heldout"))
        .then(pl.lit("heldout"))
        .when(pl.col("reason").is_not_null())
        .then(pl.col("reason"))
        .when(pl.col("url").is_null() & pl.col("file").is_null())
        .then(pl.lit("no_image"))
        .when(~pl.col("is_box_valid"))
        .then(pl.lit("bad_box"))
    )
    if not drop_repeats:
        return pairs
    is_repeat = ~pl.struct("key", "text", "reason", "box").is_first_distinct()
    return pairs.with_columns(
        reason=pl.when(is_repeat & pl.col("reason").is_null())
        .then(pl.lit("repeat"))
        .otherwise(pl.col("reason"))
    )


def _kept(pairs: pl.DataFrame, records: pl.DataFrame) -> pl.DataFrame:
    grouped = pairs.group_by("key", maintain_order=True).agg(
        captions=pl.col("text"),
        fields=pl.col("field"),
        boxes=pl.col("box"),
        has_boxes=pl.col("has_box").any(),
        spans=pl.col("span"),
        rows=pl.col("row"),
    )
    return grouped.with_columns(boxes=pl.when("has_boxes").then(pl.col("boxes"))).join(
        records.select("key", *INDEX_IMAGE), on="key", how="left", maintain_order="left"
    )


def _between(frame: pl.DataFrame, low: int, high: int) -> pl.DataFrame:
    keys = frame["key"].to_numpy()
    start = int(np.searchsorted(keys, np.uint64(low)))
    stop = int(np.searchsorted(keys, np.uint64(high - 1), side="right"))
    return frame.slice(start, stop - start)


def _write_part(folder: str, part: int, kept: pl.DataFrame, dropped: pl.DataFrame) -> IndexPart:
    pairs_kept = int(kept["captions"].list.len().sum())
    reasons = dict(sorted(dropped["reason"].value_counts().iter_rows()))
    return IndexPart(
        part=part,
        records=len(kept),
        bare=int(dropped["bare"].sum()),
        counts=Counts(pairs_in=pairs_kept + len(dropped), kept=pairs_kept, dropped=reasons),
        kept=_write_table(folder, f"kept-{part_name(part)}.parquet", kept, KEPT_SCHEMA),
        dropped=_write_table(folder, f"dropped-{part_name(part)}.parquet", dropped, DROPPED_SCHEMA),
    )


def _write_table(folder: str, name: str, frame: pl.DataFrame, schema: pa.Schema) -> FileDigest:
    named = frame.with_columns(
        key=pl.Series([f"{key:016x}" for key in frame["key"].to_list()], dtype=pl.String)
    )
    table = named.select(schema.names).to_arrow().cast(schema)
    out = BytesIO()
    pq.write_table(table, out, compression="zstd")
    content = out.getvalue()
    write_whole(join(folder, name), content)
    return FileDigest.of(name, content)
