"""The image-free kit of a dataset: what it takes to fetch it again, and to prove it the same.

A folder with `kit.json`, written last, and for each shard a Parquet file (`ROWS`) and, where there
are any, its image codes.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import zip_longest
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from pmd_pipeline.base.record import key_of
from pmd_pipeline.base.tables import read_table
from pmd_pipeline.contract.boxes import are_boxes
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, read_bytes
from pmd_pipeline.contract.models import FORMAT, CodesReport, Counts, FileDigest, Manifest
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LEDGER_SCHEMA

KIT = "kit.json"

DEPENDENCY = b"pmd.dependency"
"""Name in the metadata of a part's rows."""

_NAME = re.compile("[a-z0-9_]+")
_SHA256 = re.compile("[0-9a-f]{64}")

UNKNOWABLE = ("image_offset", "image_size", "json_offset", "json_size")
"""Columns of the ledger that follow from the rest once the images are there."""

ROWS = pa.schema(
    [
        *(field for field in LEDGER_SCHEMA if field.name not in UNKNOWABLE),
        ("file", pa.string()),
        ("licence", pa.string()),
        ("meta", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("fields", pa.list_(pa.string())),
        ("boxes", pa.list_(pa.list_(pa.float32()))),
        ("stored_sha256", pa.string()),
    ]
)
"""One row per row of the ledger, in its order. `sha256` is of the bytes as fetched, `stored_sha256`
of the JPEG that was made of them. What belongs to an image that is not in the shard is null. In a
kit of hashes, `caption` and `captions` hold the sha256 of each caption as hex."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KitPart(_Stored):
    """One shard, without its images.

    Args:
        counts: pairs of the shard.
        rows: the Parquet file.
        codes: the report of its image codes, without times; the file has the name that it says.
    """

    source: str
    part: int
    counts: Counts
    rows: FileDigest
    codes: CodesReport | None = None


class Kit(_Stored):
    """What `kit.json` holds. `digest` covers all of it, and through it every file of the kit.

    Args:
        captions: whether the kit holds captions, or only their sha256.
        manifest: of the dataset, with the paths that its shards have by default.
        parts: in the order of the manifest's shards.
    """

    format: int = FORMAT
    captions: Literal["text", "sha256"]
    manifest: Manifest
    parts: list[KitPart]
    digest: str = ""

    def computed_digest(self) -> str:
        """sha256 of the canonical JSON of all but `digest`."""
        return digest(self.model_dump(mode="json", exclude={"digest"}))


def load_kit(folder: str) -> Kit:
    """The kit in `folder`, its own digest checked; its files are checked as they are read.

    Raises:
        PmdError: there is no kit of this version, or somebody has changed it.
    """
    address = join(folder, KIT)
    try:
        kit = Kit.model_validate_json(read_bytes(address))
    except ValidationError as error:
        said = error.errors()[0]["msg"].lower()
        raise PmdError(f"{address} is no kit of this version: {said}") from error
    if kit.digest != kit.computed_digest():
        raise PmdError(
            f"{address} was changed: its digest is not that of its content; get it again"
        )
    if kit.manifest.digest != kit.manifest.computed_digest():
        raise PmdError(f"{address} has a manifest whose digest is not that of its content")
    for part, shard in zip_longest(kit.parts, kit.manifest.shards):
        if not (part and shard) or (part.source, part.part) != (shard.source, shard.part):
            raise PmdError(f"{address} has other parts than its manifest has shards")
        name = part_name(part.part)
        names = [part.rows.name, *([part.codes.file.name] if part.codes else [])]
        if not _NAME.fullmatch(part.source) or set(names) - {
            f"{name}.parquet",
            f"{name}.codes.safetensors",
        }:
            raise PmdError(f"{address} names files that no kit has: {part.source}, {names}")
    return kit


def kit_rows(folder: str, part: KitPart) -> list[dict[str, Any]]:
    """The rows of one shard, as `pmd lock` writes them.

    Raises:
        PmdError: the file is not the one that the kit was made with, or somebody made it up.
    """
    content = kit_file(folder, part, part.rows)
    address = join(folder, part.source, part.rows.name)
    try:
        table = read_table(BytesIO(content))
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise PmdError(f"{address} is no whole Parquet file: get the kit again") from error
    if not table.schema.equals(ROWS):
        raise PmdError(f"{address} has other columns than a kit has: get the kit again")
    rows: list[dict[str, Any]] = table.to_pylist()
    keys = [row["key"] for row in rows]
    wrong = next((row for row in rows if not _is_sound(part.source, row)), None)
    if wrong or keys != sorted(set(keys)) or counts_of(rows) != part.counts:
        what = f"the row of {wrong['key']}" if wrong else "order or counts"
        raise PmdError(f"{address}: {what} is not what pmd lock writes, so nobody can rebuild it")
    return rows


def _is_sound(source: str, row: Mapping[str, Any]) -> bool:
    """Say whether a row, which may come from a stranger, can be one of a kit.

    Keys become names in a tar, and the JSON of samples is made of the rest.
    """
    if row["id"] is None or row["key"] != key_of(source, row["id"]) or (row["num_pairs"] or 0) < 1:
        return False
    if row["status"] != Status.SUCCESS:
        return isinstance(row["status"], str) and isinstance(row["reason"], str)
    hashes = (row["sha256"] or "", row["stored_sha256"] or "")
    captions, boxes, fields = row["captions"], row["boxes"], row["fields"]
    if captions is None or fields is None or None in captions or None in fields:
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


def kit_file(folder: str, part: KitPart, file: FileDigest) -> bytes:
    """The content of one of the files of a part.

    Raises:
        PmdError: it is not the one that the kit was made with.
    """
    return checked(join(folder, part.source, file.name), file.sha256)


def rows_bytes(rows: Sequence[Mapping[str, Any]], dependency: str) -> bytes:
    """The rows as Parquet, which says what they depend on."""
    out = BytesIO()
    schema = ROWS.with_metadata({DEPENDENCY: dependency})
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), out, compression="zstd")
    return out.getvalue()


def counts_of(rows: Sequence[Mapping[str, Any]]) -> Counts:
    """Pairs of the rows of a ledger, by what became of them."""
    each = []
    for row in rows:
        pairs, lost = row["num_pairs"], {row["reason"]: row["num_pairs"]}
        if row["status"] == Status.SUCCESS:
            each.append(Counts(pairs_in=pairs, kept=pairs))
        elif row["status"] == "dropped":
            each.append(Counts(pairs_in=pairs, dropped=lost))
        else:
            each.append(Counts(pairs_in=pairs, failed=lost))
    return Counts.total(each)


def caption_sha256(caption: str) -> str:
    """What a kit of hashes has in place of a caption."""
    return hashlib.sha256(caption.encode()).hexdigest()


def checked(address: str, sha256: str) -> bytes:
    """The content of the file at `address`.

    Raises:
        PmdError: its sha256 is another.
    """
    content = read_bytes(address)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise PmdError(f"{address} has other bytes than it should; pmd verify says more")
    return content
