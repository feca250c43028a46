"""The lock file of a dataset: everything to fetch its images again and to prove them the same.

A folder with `kit.json`, written last, and for each shard a Parquet file (`LOCKED_SCHEMA`) and,
where the dataset has them, its image codes. It contains no image.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import zip_longest
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pmd_pipeline.base.record import key_of
from pmd_pipeline.base.tables import read_table
from pmd_pipeline.contract.boxes import are_boxes
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, read_bytes
from pmd_pipeline.contract.models import (
    FORMAT,
    CodesReport,
    Counts,
    FileDigest,
    Manifest,
    StoredModel,
)
from pmd_pipeline.contract.names import FileName
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LEDGER_SCHEMA, LedgerRow
from pmd_pipeline.index.records import IndexRecord
from pmd_pipeline.shards.report import counts_of

LOCKFILE_NAME = "kit.json"

DEPENDENCY = b"pmd.dependency"
"""Name in the metadata of a part's rows: digest of everything that they depend on."""

_SOURCE = re.compile("[a-z0-9_]+")
_SHA256 = re.compile("[0-9a-f]{64}")

_BYTE_RANGES = frozenset({"image_offset", "image_size", "json_offset", "json_size"})
"""Columns of the ledger that follow from the rest once the images are fetched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockedRow:
    """One row of a ledger without byte ranges, with what else it takes to make its sample again.

    Other columns are those of `LedgerRow`. Columns that describe a stored image are None where the
    shard has none.

    Args:
        caption: the first caption; where captions are hashed, its SHA-256 as hex.
        sha256: SHA-256 of the fetched bytes.
        file: name of the image in upstream's archives.
        licence: that upstream states for the image.
        meta: JSON object of the sample.
        captions: of the record; where captions are hashed, the SHA-256 of each as hex.
        fields: upstream field of each caption.
        boxes: box of each caption; None where captions have none.
        stored_sha256: SHA-256 of the image in the tar.
    """

    key: str
    id: str
    url: str | None
    caption: str | None
    num_pairs: int
    status: str
    reason: str | None
    error_message: str | None
    width: int | None
    height: int | None
    original_width: int | None
    original_height: int | None
    sha256: str | None
    final_url: str | None
    file: str | None
    licence: str | None
    meta: str | None
    captions: list[str] | None
    fields: list[str] | None
    boxes: list[list[float]] | None
    stored_sha256: str | None

    @property
    def has_image(self) -> bool:
        """Whether the shard has the image."""
        return self.status == Status.SUCCESS

    def ledger_row(self) -> LedgerRow:
        """The row of the ledger, without byte ranges."""
        names = (name for name in LEDGER_SCHEMA.names if name not in _BYTE_RANGES)
        return LedgerRow(**{name: getattr(self, name) for name in names})

    def index_record(self) -> IndexRecord:
        """The record to fetch, whose `sha256` the fetched bytes must have.

        An image without captions has one empty caption, as in an index.
        """
        return IndexRecord(
            key=self.key,
            id=self.id,
            url=self.url,
            file=self.file,
            licence=self.licence,
            width=None,
            height=None,
            sha256=self.sha256,
            meta=self.meta,
            captions=self.captions or [""],
            fields=(self.fields or []) if self.captions else [""],
            boxes=self.boxes,
            spans=[],
            rows=[],
        )


LOCKED_SCHEMA = pa.schema(
    [
        *(field for field in LEDGER_SCHEMA if field.name not in _BYTE_RANGES),
        ("file", pa.string()),
        ("licence", pa.string()),
        ("meta", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("fields", pa.list_(pa.string())),
        ("boxes", pa.list_(pa.list_(pa.float32()))),
        ("stored_sha256", pa.string()),
    ]
)
"""One `LockedRow` per row of the ledger, in its order."""


class LockedPart(StoredModel):
    """One shard, without its images.

    Args:
        counts: pairs of the shard.
        rows: the Parquet file.
        codes: the report of its image codes, without times. It names the file of codes.
    """

    source: FileName
    part: int
    counts: Counts
    rows: FileDigest
    codes: CodesReport | None = None


class LockFile(StoredModel):
    """Content of `kit.json`. `digest` covers all of it, and through it every other file.

    Args:
        captions: whether rows have captions, or the SHA-256 of captions.
        manifest: of the dataset, with the default paths of its shards.
        parts: in the order of the manifest's shards.
    """

    format: int = FORMAT
    captions: Literal["text", "sha256"]
    manifest: Manifest
    parts: list[LockedPart]
    digest: str = ""

    def computed_digest(self) -> str:
        """SHA-256 of the canonical JSON of everything but `digest`."""
        return digest(self.model_dump(mode="json", exclude={"digest"}))


def load_lockfile(folder: str) -> LockFile:
    """The lock file in `folder`, its digest checked; other files are checked when they are read.

    Raises:
        PmdError: there is no lock file of this version, or it was changed.
    """
    address = join(folder, LOCKFILE_NAME)
    try:
        lockfile = LockFile.model_validate_json(read_bytes(address))
    except ValidationError as error:
        reason = error.errors()[0]["msg"].lower()
        raise PmdError(f"{address} is not a lock file of this version: {reason}") from error
    if lockfile.digest != lockfile.computed_digest():
        raise PmdError(
            f"{address} was changed: its digest is not that of its content; get it again"
        )
    if lockfile.manifest.digest != lockfile.manifest.computed_digest():
        raise PmdError(f"{address} has a manifest whose digest is not that of its content")
    for part, shard in zip_longest(lockfile.parts, lockfile.manifest.shards):
        if not (part and shard) or (part.source, part.part) != (shard.source, shard.part):
            raise PmdError(f"{address} has other parts than its manifest has shards")
        paths = ShardPaths.in_folder("", part.part)
        names = [part.rows.name, *([part.codes.file.name] if part.codes else [])]
        if not _SOURCE.fullmatch(part.source) or set(names) - {paths.ledger, paths.codes}:
            raise PmdError(f"{address} names files that no lock file has: {part.source}, {names}")
    return lockfile


def locked_rows(folder: str, part: LockedPart) -> list[LockedRow]:
    """The rows of one shard, each of them checked.

    Raises:
        PmdError: the file is not the one in the lock file, or `pmd lock` cannot have written it.
    """
    content = locked_file(folder, part, part.rows)
    address = join(folder, part.source, part.rows.name)
    try:
        table = read_table(BytesIO(content))
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise PmdError(
            f"{address} is not a complete Parquet file: get the lock file again"
        ) from error
    if not table.schema.equals(LOCKED_SCHEMA):
        raise PmdError(f"{address} has other columns than a lock file: get the lock file again")
    values = table.to_pylist()
    invalid = next((row for row in values if not _is_valid(part.source, row)), None)
    if invalid:
        raise _not_written_by_lock(address, f"the row of {invalid['key']}")
    rows = [LockedRow(**row) for row in values]
    keys = [row.key for row in rows]
    if keys != sorted(set(keys)) or counts_of(rows) != part.counts:
        raise _not_written_by_lock(address, "order or counts")
    return rows


def _not_written_by_lock(address: str, subject: str) -> PmdError:
    return PmdError(
        f"{address}: {subject} is not what pmd lock writes, so the dataset cannot be rebuilt"
    )


def _is_valid(source: str, row: Mapping[str, Any]) -> bool:
    """Whether a row of a stranger's file can be a `LockedRow`.

    Keys become names in a tar, and the JSON of samples is made of the rest.
    """
    if row["id"] is None or row["key"] != key_of(source, row["id"]) or (row["num_pairs"] or 0) < 1:
        return False
    if row["status"] != Status.SUCCESS:
        return isinstance(row["status"], str) and isinstance(row["reason"], str)
    hashes = (row["sha256"] or "", row["stored_sha256"] or "")
    captions, boxes, fields = row["captions"], row["boxes"], row["fields"]
    if captions is None or fields is None or None in [*captions, *fields]:
        return False
    try:
        meta = json.loads(row["meta"] or "")
    except (ValueError, RecursionError):
        return False
    return (
        all(_SHA256.fullmatch(one) for one in hashes)
        and len(captions) in {row["num_pairs"], 0}
        and (boxes is None or are_boxes(boxes, len(captions)))
        and isinstance(meta, dict)
    )


def locked_file(folder: str, part: LockedPart, file: FileDigest) -> bytes:
    """The content of a file of a part.

    Raises:
        PmdError: its SHA-256 is not the one in the lock file.
    """
    return checked_bytes(join(folder, part.source, file.name), file.sha256)


def rows_bytes(rows: Sequence[LockedRow], dependency: str) -> bytes:
    """The rows as Parquet, with the digest of what they depend on in the metadata."""
    out = BytesIO()
    schema = LOCKED_SCHEMA.with_metadata({DEPENDENCY: dependency})
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    pq.write_table(pa.table(columns, schema=schema), out, compression="zstd")
    return out.getvalue()


def caption_sha256(caption: str) -> str:
    """What a lock file of hashed captions has in place of a caption."""
    return hashlib.sha256(caption.encode()).hexdigest()


def checked_bytes(address: str, sha256: str) -> bytes:
    """The content of the file at `address`.

    Raises:
        PmdError: its SHA-256 is another.
    """
    content = read_bytes(address)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise PmdError(f"{address} has other bytes than it should; pmd verify reports details")
    return content
