"""External sort of upstream's rows by key, through sorted runs on disk.

Rows of one image may be far apart upstream. They are first written to runs (Arrow files, sorted by
key, one batch per bucket of keys) and then merged, one range of keys after another. A run is as
large as a worker's buffer, so memory does not grow with the size of upstream.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pmd_pipeline.base.record import Box, Row
from pmd_pipeline.contract.digests import canonical_json
from pmd_pipeline.contract.files import open_read, whole_file
from pmd_pipeline.contract.schemas import INDEX_IMAGE
from pmd_pipeline.index.choose import Pair

KEYS = 1 << 64
"""Keys are numbers below this."""

SCHEMA = pa.schema(
    [
        ("key", pa.uint64()),
        ("span", pa.uint32()),
        ("row", pa.uint32()),
        *INDEX_IMAGE.items(),
        ("heldout", pa.bool_()),
        ("pair", pa.bool_()),
        ("text", pa.string()),
        ("field", pa.string()),
        ("reason", pa.string()),
        ("x0", pa.float64()),
        ("y0", pa.float64()),
        ("x1", pa.float64()),
        ("y1", pa.float64()),
    ]
)
"""Columns of a run: one line per pair, and one with `pair` false for a row without any pair."""

_FLUSH_LINES = 200_000
_FLUSH_CHARS = 48 << 20
_NO_BOX = (None, None, None, None)


@dataclass(frozen=True)
class Run:
    """A run on disk.

    Args:
        buckets: the bucket of each of its batches, ascending.
        num_bytes: of its lines in memory.
    """

    address: str
    buckets: tuple[int, ...]
    num_bytes: int


class BatchRange(NamedTuple):
    """Batches `first` to `stop` (excluded) of the run at `address`."""

    address: str
    first: int
    stop: int


class RunWriter:
    """Buffers lines and writes a run whenever the buffer is full; `close` writes the last run.

    Args:
        prefix: of the runs' addresses.
        bucket_bits: leading bits of a key that number its bucket.
    """

    def __init__(self, prefix: str, bucket_bits: int) -> None:
        self.runs: list[Run] = []
        self._prefix = prefix
        self._bucket_bits = bucket_bits
        self._lines: list[tuple[Any, ...]] = []
        self._chars = 0

    def add(
        self, key: int, position: tuple[int, int], row: Row, pairs: Sequence[Pair], *, heldout: bool
    ) -> None:
        """Add one upstream row; `position` is the number of its span, and of the row within it.

        `meta` is stored with a row that keeps a pair or describes only the image, not with a row
        whose pairs are all dropped.
        """
        has_meta = not pairs or any(pair.reason is None for pair in pairs)
        meta = canonical_json(row.meta) if has_meta and row.meta else None
        size = (_pixels(row.width), _pixels(row.height))
        image = (row.id, row.url, row.file, row.licence, *size, row.sha256)
        head = (key, *position, *image, meta, heldout)
        for pair in pairs or (None,):
            if pair is None:
                self._lines.append((*head, False, None, None, None, *_NO_BOX))
            else:
                box = _finite(pair.box) if pair.box else _NO_BOX
                self._lines.append((*head, True, pair.text, pair.field, pair.reason, *box))
                self._chars += len(pair.text or "")
        self._chars += len(row.url or "") + len(meta or "") + len(row.id)
        if len(self._lines) >= _FLUSH_LINES or self._chars >= _FLUSH_CHARS:
            self._flush()

    def close(self) -> list[Run]:
        """Write the rest of the buffer; returns all runs."""
        if self._lines:
            self._flush()
        return self.runs

    def _flush(self) -> None:
        columns = zip(*self._lines, strict=True)
        table = pa.table(
            [
                _arrow_array(values, field.type)
                for values, field in zip(columns, SCHEMA, strict=True)
            ],
            schema=SCHEMA,
        )
        self._lines, self._chars = [], 0
        self.runs.append(
            _write_run(f"{self._prefix}-{len(self.runs):04d}.arrow", table, self._bucket_bits)
        )


def bucket_of(key: int, bucket_bits: int) -> int:
    """The bucket of `key`."""
    return key >> (64 - bucket_bits)


def batch_ranges(
    runs: Iterable[Run], low: int, high: int, bucket_bits: int
) -> tuple[BatchRange, ...]:
    """The batches of all runs that may hold lines with `low <= key < high`."""
    first, last = bucket_of(low, bucket_bits), bucket_of(high - 1, bucket_bits)
    ranges = (
        BatchRange(run.address, bisect_left(run.buckets, first), bisect_right(run.buckets, last))
        for run in runs
    )
    return tuple(one for one in ranges if one.first < one.stop)


def read_range(ranges: Iterable[BatchRange], low: int, high: int) -> pa.Table:
    """The lines of all batches with `low <= key < high`, in order of key, span, row and line."""
    batches = [batch for one in ranges for batch in _read_batches(one)]
    table = pa.Table.from_batches(batches, schema=SCHEMA)
    in_range = pc.and_(
        pc.greater_equal(table["key"], pa.scalar(low, pa.uint64())),
        pc.less_equal(table["key"], pa.scalar(high - 1, pa.uint64())),
    )
    table = table.filter(in_range).combine_chunks()
    order = np.lexsort((table["row"].to_numpy(), table["span"].to_numpy(), table["key"].to_numpy()))
    return table.take(pa.array(order))


def _arrow_array(values: tuple[Any, ...], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        return pa.array([v and v.encode(errors="replace").decode() for v in values], kind)


def _pixels(side: int | None) -> int | None:
    return side if side is not None and 0 < side < 1 << 31 else None


def _finite(box: Box) -> tuple[float, ...]:
    """The box, or NaNs where a side is no finite number; such a pair is dropped as `bad_box`."""
    try:
        sides = tuple(float(side) for side in box)
    except (OverflowError, TypeError, ValueError):
        return (math.nan,) * 4
    return sides if all(map(math.isfinite, sides)) else (math.nan,) * 4


def _write_run(address: str, table: pa.Table, bucket_bits: int) -> Run:
    keys = table["key"].to_numpy()
    order = np.argsort(keys, kind="stable")
    table, keys = table.take(pa.array(order)).combine_chunks(), keys[order]
    buckets, starts = np.unique(keys >> np.uint64(64 - bucket_bits), return_index=True)
    stops = [*starts[1:].tolist(), len(keys)]
    with (
        whole_file(address) as file,
        pa.ipc.new_file(file, SCHEMA, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer,
    ):
        for start, stop in zip(starts.tolist(), stops, strict=True):
            writer.write_table(table.slice(start, stop - start))
    return Run(address, tuple(buckets.tolist()), table.nbytes)


def _read_batches(batches: BatchRange) -> Iterator[pa.RecordBatch]:
    with open_read(batches.address) as file, pa.ipc.open_file(file) as reader:
        for number in range(batches.first, batches.stop):
            yield reader.get_batch(number)
