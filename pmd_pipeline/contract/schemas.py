"""Arrow schemas of the Parquet files of a dataset, and the ledger's row as a typed class."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

LedgerColumn: TypeAlias = Literal[
    "key",
    "id",
    "url",
    "caption",
    "num_pairs",
    "status",
    "reason",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
    "sha256",
    "final_url",
    "image_offset",
    "image_size",
    "json_offset",
    "json_size",
]
"""Names of the columns of a ledger, for readers of some of them; a test compares `LedgerRow`."""

_LONG = {"image_offset", "image_size", "json_offset", "json_size"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """One record of a part, kept or not. img2dataset's names where it has them.

    Args:
        key: of the record, 16 hex digits.
        id: upstream's image id.
        url: where the image was asked for.
        caption: the first of the record's captions.
        num_pairs: pairs of the record.
        status: a `Status`.
        reason: why the record is not in the tar; None where it is.
        error_message: details, for people.
        width: of the stored image, in pixels.
        height: of the stored image, in pixels.
        original_width: of the image as fetched, EXIF orientation applied.
        original_height: of the image as fetched, EXIF orientation applied.
        sha256: SHA-256 of the fetched bytes, before any re-encoding.
        final_url: where redirects led to.
        image_offset: of the image's first byte in the tar.
        image_size: bytes of the image.
        json_offset: of the JSON's first byte in the tar.
        json_size: bytes of the JSON.
    """

    key: str
    id: str
    url: str | None = None
    caption: str | None = None
    num_pairs: int
    status: str
    reason: str | None = None
    error_message: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    sha256: str | None = None
    final_url: str | None = None
    image_offset: int | None = None
    image_size: int | None = None
    json_offset: int | None = None
    json_size: int | None = None


def _arrow_type(name: str, hint: object) -> pa.DataType:
    if int not in (hint, *get_args(hint)):
        return pa.string()
    return pa.int64() if name in _LONG else pa.int32()


LEDGER_SCHEMA = pa.schema(
    [
        (field.name, _arrow_type(field.name, get_type_hints(LedgerRow)[field.name]))
        for field in fields(LedgerRow)
    ]
)
"""One row per record of the part, kept or not."""

INDEX_IMAGE = {
    "id": pa.string(),
    "url": pa.string(),
    "file": pa.string(),
    "licence": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "sha256": pa.string(),
    "meta": pa.string(),
}
"""What upstream states about an image: `width`, `height` and `sha256` are unchecked, `meta` is
JSON."""

KEPT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        *INDEX_IMAGE.items(),
        ("captions", pa.list_(pa.string())),
        ("fields", pa.list_(pa.string())),
        ("boxes", pa.list_(pa.list_(pa.float32()))),
        ("spans", pa.list_(pa.uint32())),
        ("rows", pa.list_(pa.uint32())),
    ]
)
"""Index, one row per record. `boxes` holds one box per caption as fractions of the image, or is
null; `spans` and `rows` say where each pair stands upstream."""

DROPPED_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("id", pa.string()),
        ("url", pa.string()),
        ("field", pa.string()),
        ("text", pa.string()),
        ("reason", pa.string()),
        ("span", pa.uint32()),
        ("row", pa.uint32()),
    ]
)
"""Index, one row per dropped pair; the text of a bad row says what is wrong with it."""

TEXT_SCHEMA = pa.schema(
    [("text", pa.string()), ("tokens", pa.int32()), ("keys", pa.list_(pa.string()))]
)
"""A shard of texts, one row per sequence: its text, its tokens with [CLS] and [SEP]s, the keys of
its documents."""

CODES_DTYPES = {"boxes": "float32", "codes": "uint16", "first": "int64"}
"""Tensors of a file of image codes: `boxes` [V, 4], `codes` [V, g, g], `first` [records + 1]."""


def ledger_bytes(rows: Sequence[LedgerRow]) -> bytes:
    """The ledger of one part, as Parquet."""
    out = BytesIO()
    columns = {name: [getattr(row, name) for row in rows] for name in LEDGER_SCHEMA.names}
    pq.write_table(pa.table(columns, schema=LEDGER_SCHEMA), out, compression="zstd")
    return out.getvalue()


def ledger_rows(table: pa.Table) -> Iterable[LedgerRow]:
    """The rows of a whole ledger."""
    return (LedgerRow(**row) for row in table.to_pylist())


def column(table: pa.Table | pa.RecordBatch, name: LedgerColumn) -> Any:  # noqa: ANN401 - Arrow
    """A column of a ledger; a name that the ledger does not have is an error of mypy."""
    return table[name]
