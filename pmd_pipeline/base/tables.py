"""Read Parquet files in the calling thread only.

If a thread of Arrow releases a Python file while the interpreter exits, the process ends with
SIGABRT although all work is done (observed in one of three runs of `pmd verify`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pmd_pipeline.contract.errors import PmdError

MEND_SHARD = "delete the .json beside it, and build again"
"""Advice for a damaged ledger or a damaged shard of texts."""

MEND_INDEX = "delete index.json beside it, and build again"
"""Advice for a damaged index file."""


DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What pyarrow raises on damaged Parquet: it decodes the names of columns by itself."""


def read_table(
    source: IO[bytes],
    columns: Sequence[str] | None = None,
    *,
    address: str | None = None,
    mend: str = MEND_SHARD,
) -> pa.Table:
    """All rows of `columns`, or of all columns.

    Args:
        address: of the file; with it, damage is reported as PmdError.
        mend: advice for the user, in that error.

    Raises:
        PmdError: it is no whole Parquet file, or lacks a column.
        pa.ArrowException: the same, without `address`; also an OSError, for some damage.
    """
    with _reporting_damage(address, mend), pq.ParquetFile(source, pre_buffer=False) as file:
        _check_columns(file, columns)
        return file.read(columns, use_threads=False)


def read_batches(
    source: IO[bytes],
    columns: Sequence[str] | None = None,
    rows: int = 65_536,
    *,
    address: str | None = None,
    mend: str = MEND_SHARD,
) -> Iterator[pa.RecordBatch]:
    """As `read_table`, at most `rows` at a time."""
    with _reporting_damage(address, mend), pq.ParquetFile(source, pre_buffer=False) as file:
        _check_columns(file, columns)
        yield from file.iter_batches(rows, columns=columns, use_threads=False)


@contextmanager
def _reporting_damage(address: str | None, mend: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        if address is None:
            raise pa.ArrowInvalid(f"the name of a column is not UTF-8: {error}") from error
        raise PmdError(f"{address} is no whole Parquet file: {mend}") from error
    except (pa.ArrowException, OSError) as error:
        # an OSError with a number comes from the system, not from Arrow's parser
        if address is None or (isinstance(error, OSError) and error.errno):
            raise
        raise PmdError(f"{address} is no whole Parquet file: {mend}") from error


def _check_columns(file: pq.ParquetFile, columns: Sequence[str] | None) -> None:
    """Raise for a missing column, which Arrow leaves out silently."""
    for name in columns or ():
        if name not in file.schema_arrow.names:
            raise pa.ArrowKeyError(f"there is no column {name}")
