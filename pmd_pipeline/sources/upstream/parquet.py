"""Columns of texts out of Parquet files, in stretches of row groups."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pmd_pipeline.base.record import BadRow
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources.upstream.files import Span, UpstreamFile

_BATCH = 256


def by_row_groups(file: UpstreamFile, num_bytes: int) -> Sequence[tuple[int, int | None]]:
    """Stretches of row groups of about `num_bytes`."""
    metadata = _opened(file).metadata
    starts, weight = [0], 0
    for group in range(metadata.num_row_groups):
        if weight >= num_bytes:
            starts.append(group)
            weight = 0
        weight += metadata.row_group(group).total_byte_size
    return list(zip(starts, [*starts[1:], metadata.num_row_groups], strict=True))


def cells(span: Span, column: str) -> Iterator[bytes | BadRow]:
    """The cells of a column of texts in one span, as the bytes they are, or what is wrong."""
    table = _opened(span.file)
    groups = range(span.start, table.metadata.num_row_groups if span.stop is None else span.stop)
    names = table.schema_arrow.names
    kind = table.schema_arrow.field(column).type if column in names else None
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        wrong = f"there is no column {column!r} of texts, only {', '.join(names)}"
        for group in groups:
            yield from [BadRow(wrong)] * table.metadata.row_group(group).num_rows
        return
    try:
        for batch in table.iter_batches(_BATCH, row_groups=list(groups), columns=[column]):
            for cell in pc.cast(batch.column(0), pa.large_binary()).to_pylist():
                yield BadRow(f"{column} is null") if cell is None else cell
    except (pa.ArrowException, OSError) as error:
        raise _damaged(span.file, error) from error


def _opened(file: UpstreamFile) -> pq.ParquetFile:
    if file.member or file.path.endswith((".gz", ".bz2")):
        raise PmdError(f"{file} is packed: unpack it, Parquet is read in pieces")
    try:
        return pq.ParquetFile(file.path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: UpstreamFile, error: Exception) -> PmdError:
    said = str(error).partition("\n")[0]
    return PmdError(f"{file} is no whole Parquet file ({said}): download it again")
