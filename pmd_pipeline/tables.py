"""Parquet read in the thread that asks for it, and in no other.

A thread of Arrow's that lets go of a Python file while the interpreter ends, ends the process with
SIGABRT, after everything was done and well (seen in one run of `pmd verify` in three).
"""

from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq


def read_table(source: IO[bytes], columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of `columns`, or of all columns.

    Raises:
        pa.ArrowException: it is no whole Parquet file, or lacks a column.
    """
    with pq.ParquetFile(source, pre_buffer=False) as file:
        _check(file, columns)
        return file.read(columns, use_threads=False)


def read_batches(
    source: IO[bytes], columns: Sequence[str] | None = None, rows: int = 65_536
) -> Iterator[pa.RecordBatch]:
    """The same, at most `rows` at a time.

    Raises:
        pa.ArrowException: it is no whole Parquet file, or lacks a column.
    """
    with pq.ParquetFile(source, pre_buffer=False) as file:
        _check(file, columns)
        yield from file.iter_batches(rows, columns=columns, use_threads=False)


def _check(file: pq.ParquetFile, columns: Sequence[str] | None) -> None:
    """Refuse what Arrow would leave out without a word."""
    for name in columns or ():
        if name not in file.schema_arrow.names:
            raise pa.ArrowKeyError(f"there is no column {name}")
