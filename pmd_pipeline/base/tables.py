"""Parquet read in the thread that asks for it, and in no other.

A thread of Arrow's that lets go of a Python file while the interpreter ends, ends the process with
SIGABRT, after everything was done and well (seen in one run of `pmd verify` in three).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pmd_pipeline.contract.errors import PmdError

MEND_SHARD = "delete the .json beside it, and build again"
"""What to do about a damaged ledger, or shard of texts."""

MEND_INDEX = "delete index.json beside it, and build again"


def read_table(
    source: IO[bytes],
    columns: Sequence[str] | None = None,
    *,
    address: str | None = None,
    mend: str = MEND_SHARD,
) -> pa.Table:
    """All rows of `columns`, or of all columns.

    Args:
        address: of the file, for callers that leave it to this function to tell of damage.
        mend: what to do about it.

    Raises:
        PmdError: it is no whole Parquet file, or lacks a column.
        pa.ArrowException: the same, without `address`; also an OSError, for some damage.
    """
    with _damage_told(address, mend), pq.ParquetFile(source, pre_buffer=False) as file:
        _check(file, columns)
        return file.read(columns, use_threads=False)


def read_batches(
    source: IO[bytes],
    columns: Sequence[str] | None = None,
    rows: int = 65_536,
    *,
    address: str | None = None,
    mend: str = MEND_SHARD,
) -> Iterator[pa.RecordBatch]:
    """The same, at most `rows` at a time."""
    with _damage_told(address, mend), pq.ParquetFile(source, pre_buffer=False) as file:
        _check(file, columns)
        yield from file.iter_batches(rows, columns=columns, use_threads=False)


@contextmanager
def _damage_told(address: str | None, mend: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # the system's own errors have a number, and are not Arrow's word on the bytes
        if address is None or (isinstance(error, OSError) and error.errno):
            raise
        raise PmdError(f"{address} is no whole Parquet file: {mend}") from error


def _check(file: pq.ParquetFile, columns: Sequence[str] | None) -> None:
    """Refuse what Arrow would leave out without a word."""
    for name in columns or ():
        if name not in file.schema_arrow.names:
            raise pa.ArrowKeyError(f"there is no column {name}")
