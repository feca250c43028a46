"""A text column of Parquet files, read by ranges of row groups."""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pmd_pipeline.base.record import BadRow
from pmd_pipeline.base.tables import DAMAGE
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources.upstream.files import Span, UpstreamFile

_BATCH = 256


def row_group_ranges(file: UpstreamFile, num_bytes: int) -> Sequence[tuple[int, int | None]]:
    """Ranges of row groups of about `num_bytes`."""
    metadata = _open_parquet(file).metadata
    starts, size = [0], 0
    for group in range(metadata.num_row_groups):
        if size >= num_bytes:
            starts.append(group)
            size = 0
        size += metadata.row_group(group).total_byte_size
    return list(zip(starts, [*starts[1:], metadata.num_row_groups], strict=True))


def cells(span: Span, column: str) -> Iterator[bytes | BadRow]:
    """The cells of a text column in one span, as undecoded bytes, or bad rows."""
    table = _open_parquet(span.file)
    groups = range(span.start, table.metadata.num_row_groups if span.stop is None else span.stop)
    names = table.schema_arrow.names
    dtype = table.schema_arrow.field(column).type if column in names else None
    if dtype is None or not (pa.types.is_string(dtype) or pa.types.is_large_string(dtype)):
        detail = f"there is no column {column!r} of texts, only {', '.join(names)}"
        for group in groups:
            yield from [BadRow(detail)] * table.metadata.row_group(group).num_rows
        return
    try:
        for batch in table.iter_batches(_BATCH, row_groups=list(groups), columns=[column]):
            for cell in pc.cast(batch.column(0), pa.large_binary()).to_pylist():
                yield BadRow(f"{column} is null") if cell is None else cell
    except DAMAGE as error:
        raise _damage_error(span.file, error) from error


def _open_parquet(file: UpstreamFile) -> pq.ParquetFile:
    if file.member or file.path.endswith((".gz", ".bz2")):
        raise PmdError(f"{file} is packed: unpack it, because Parquet is read by row groups")
    try:
        return pq.ParquetFile(file.path)
    except DAMAGE as error:
        raise _damage_error(file, error) from error


def _damage_error(file: UpstreamFile, error: Exception) -> PmdError:
    message = str(error).partition("\n")[0]
    return PmdError(f"{file} is not a whole Parquet file ({message}): download it again")
