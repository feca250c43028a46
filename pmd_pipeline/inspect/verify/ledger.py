"""Checks of a ledger: its bytes, its columns, the order of its rows, and each row by itself."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pmd_pipeline.base.record import key_of
from pmd_pipeline.base.tables import read_table
from pmd_pipeline.contract.files import read_bytes
from pmd_pipeline.contract.models import Kind, ShardEntry
from pmd_pipeline.contract.reasons import FAILURE_REASONS, Status
from pmd_pipeline.contract.schemas import LEDGER_SCHEMA, LedgerRow, ledger_rows
from pmd_pipeline.inspect.verify.findings import Content, ShardFindings, check_content

_FAILURES = {Status.FAILED_TO_DOWNLOAD, Status.FAILED_TO_RESIZE}


def check_ledger(
    entry: ShardEntry, kind: Kind, path: str, findings: ShardFindings
) -> list[LedgerRow] | None:
    """The rows of the ledger at `path`; None if they cannot be read."""
    content = b""
    with findings.catch_errors(path):
        content = read_bytes(path)
        size = findings.report.ledger.num_bytes if findings.report else len(content)
        expected = Content(entry.ledger_sha256, size)
        check_content(path, Content.of(content), expected, findings)
    table = read_parquet(content, path, LEDGER_SCHEMA, findings) if content else None
    if table is None:
        return None
    rows = list(ledger_rows(table))
    keys = [str(row.key) for row in rows]
    for before, after in pairwise(keys):
        if not before < after:
            findings.add(
                path, f"has rows in another order than that of keys: {after} is after {before}"
            )
    for row in rows:
        for fault in _row_faults(entry.source, kind, row):
            findings.add(path, f"row {row.key} {fault}")
    if keys:
        findings.keys = keys[0], keys[-1]
    findings.image_hashes = _image_hashes(rows)
    return rows


def read_parquet(
    content: bytes, path: str, schema: pa.Schema, findings: ShardFindings
) -> pa.Table | None:
    """The table in a Parquet file; None, with a fault, if it is damaged or has another schema."""
    try:
        table = read_table(BytesIO(content))
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        findings.add(path, f"is no whole Parquet file ({str(error).partition(chr(10))[0]})")
        return None
    if not table.schema.equals(schema):
        other = set(table.schema.names) ^ set(schema.names)
        what = f"has other columns: {', '.join(sorted(other))}" if other else "has other types"
        findings.add(path, what)
        return None
    return table


def _row_faults(source: str, kind: Kind, row: LedgerRow) -> Iterator[str]:
    """Faults that one row shows, whatever the tar holds. Any column may be null."""
    if row.id is None or row.key != key_of(source, row.id):
        yield f"does not have the key of the image {row.id!r}"
    if (row.num_pairs or 0) < 1:
        yield f"counts {row.num_pairs} pairs"
    if (row.caption is None) == (kind == "pairs"):
        yield "has no caption" if kind == "pairs" else "has a caption"
    places = {
        "image_offset": row.image_offset,
        "image_size": row.image_size,
        "json_offset": row.json_offset,
        "json_size": row.json_size,
    }
    if row.status == Status.SUCCESS:
        required = places | {
            "width": row.width,
            "height": row.height,
            "original_width": row.original_width,
            "original_height": row.original_height,
            "sha256": row.sha256,
        }
        absent = [name for name, value in required.items() if value is None]
        if absent:
            yield f"is a success, but has no {absent[0]}"
        elif row.reason is not None:
            yield f"is a success, but has the reason {row.reason}"
        return
    if row.status not in set(Status):
        yield f"has the unknown status {row.status!r}"
    elif row.reason is None or (row.reason in FAILURE_REASONS) != (row.status in _FAILURES):
        yield f"is {row.status} for the reason {row.reason!r}"
    if any(value is not None for value in places.values()):
        yield f"is {row.status}, but has a place in the tar"


def _image_hashes(rows: Sequence[LedgerRow]) -> bytes:
    digits = [str(row.sha256)[:16] for row in rows if row.status == Status.SUCCESS]
    whole = [
        int(one, 16) for one in digits if len(one) == 16 and set(one) <= set("0123456789abcdef")
    ]
    return np.array(whole, dtype=np.uint64).tobytes()
