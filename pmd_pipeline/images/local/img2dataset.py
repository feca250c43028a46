"""Shards made by img2dataset as a place of images, checked against the index.

Their samples are in no order of ours, so the members of each tar are catalogued once: one Parquet
file per tar, which a part's records are looked up in. img2dataset stores smaller pictures than it
fetched; the sha256 it states is that of the bytes as fetched, and is passed on as such.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pmd_pipeline.base.parallel import Pool, ReportProgress, WorkerDied, ignore_progress
from pmd_pipeline.base.record import one_line, url_id
from pmd_pipeline.base.storage import remove, sizes
from pmd_pipeline.contract.errors import PmdError, RecordError
from pmd_pipeline.contract.files import join, whole_file
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.images.fetch.client import Fetched
from pmd_pipeline.images.local.archives import Extent, ImageLookup, tar_body, tar_extents
from pmd_pipeline.index.records import IndexRecord

_CATALOG = pa.schema(
    [
        ("address", pa.uint64()),
        ("status", pa.string()),
        ("sha256", pa.string()),
        ("tar", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
    ]
)
_COLUMNS = ["url", "key", "status", "sha256"]
_IMAGES = ("jpg", "png", "webp")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class CatalogTask:
    """One tar, with its Parquet file beside it, to be catalogued at `address`."""

    tar: str
    address: str


def is_img2dataset(place: str) -> bool:
    """Say whether a folder holds shards as img2dataset writes them."""
    path = Path(place)
    return path.is_dir() and any(
        tar.with_name(f"{tar.stem}_stats.json").is_file() for tar in path.glob("*.tar")
    )


def catalogue(place: str, folder: str, pool: Pool) -> None:
    """Catalogue all shards of `place` in `folder`, in place of what was there.

    Raises:
        PmdError: a shard has no Parquet file, or either is broken, or it was made without sha256.
    """
    remove(folder)
    tasks = [
        CatalogTask(str(tar), join(folder, f"{part_name(number)}.parquet"))
        for number, tar in enumerate(sorted(Path(place).resolve().glob("*.tar")))
    ]
    for _, result in pool.run(write_catalogue, tasks, ignore_progress):
        if isinstance(result, WorkerDied):
            raise result


def write_catalogue(task: CatalogTask, _tick: ReportProgress) -> None:
    """Write where each row of one shard lies in its tar."""
    members = tar_extents(Path(task.tar))
    lines = [line for row in _rows(task.tar) if (line := _line(task.tar, row, members))]
    lines.sort(key=lambda line: int(line["address"]))
    with whole_file(task.address) as file:
        pq.write_table(pa.Table.from_pylist(lines, schema=_CATALOG), file)


def open_img2dataset(folder: str, records: Iterable[IndexRecord]) -> ImageLookup:
    """The shelf of the catalogue in `folder`, for just these records."""
    wanted = [_address(record.url) for record in records if record.url]
    files = [join(folder, name) for name in sorted(sizes(folder)) if name.endswith(".parquet")]
    found = (
        pl.scan_parquet(files, glob=False)  # brackets in the folder's name are no pattern
        .filter(pl.col("address").is_in(pl.Series(wanted, dtype=pl.UInt64).implode()))
        .collect()
    )
    by_address: dict[int, dict[str, Any]] = {}
    for row in found.iter_rows(named=True):
        if by_address.get(row["address"], {}).get("status") != Status.SUCCESS:
            by_address[row["address"]] = row

    def find(record: IndexRecord) -> Fetched | None:
        row = by_address.get(_address(record.url)) if record.url else None
        return _checked(record, row) if row else None

    return find


def _address(url: str) -> int:
    digest = hashlib.blake2b(_bare(url).encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _bare(url: str) -> str:
    """The address without its scheme: SBU's http addresses are asked for by https here."""
    return url_id(url).split("://", 1)[-1]


def _rows(tar: str) -> list[dict[str, Any]]:
    table = Path(tar).with_suffix(".parquet")
    try:
        with pq.ParquetFile(table) as file:
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            rows: list[dict[str, Any]] = [] if missing else file.read(_COLUMNS).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise PmdError(f"{table} cannot be read ({error}): is the shard of {tar} whole?") from error
    if missing:
        raise PmdError(
            f"{table} has no column {missing[0]!r}: run img2dataset with its default columns and "
            "compute_hash='sha256'"
        )
    return rows


def _line(tar: str, row: Mapping[str, Any], members: Mapping[str, Extent]) -> dict[str, Any] | None:
    url, key = row["url"], row["key"]
    if not isinstance(url, str):
        return None
    image = next((members[n] for e in _IMAGES if (n := f"{key}.{e}") in members), None)
    described = members.get(f"{key}.json")
    status = row["status"]
    if status == Status.SUCCESS and not (image and described):
        status = "not in its tar"
    return {
        "address": _address(url),
        "status": status,
        "sha256": row["sha256"],
        "tar": tar,
        **dict(zip(("image_offset", "image_size"), image or (None, None), strict=True)),
        **dict(zip(("json_offset", "json_size"), described or (None, None), strict=True)),
    }


def _checked(record: IndexRecord, row: Mapping[str, Any]) -> Fetched:
    """The image of a catalogued row, if the shard says of it what the index says."""
    if row["status"] != Status.SUCCESS:
        raise RecordError("not_in_archive", f"img2dataset: {row['status']}")
    tar = Path(row["tar"])
    sample = _sample(tar_body(tar, (row["json_offset"], row["json_size"])))
    if _bare(str(sample.get("url"))) != _bare(record.url or ""):
        raise RecordError("caption_mismatch", "the shard's json is about another address")
    caption = sample.get("caption")
    if caption is not None and one_line(str(caption)) not in record.captions:
        raise RecordError("caption_mismatch", "the shard has another caption")
    sha256 = row["sha256"]
    if sample.get("sha256") != sha256:
        raise RecordError("changed", "the shard's json and parquet state different sha256")
    if not _SHA256.fullmatch(str(sha256)):
        raise RecordError("changed", "the shard states no sha256")
    if record.sha256 and record.sha256 != sha256:
        raise RecordError("changed", "not the bytes whose sha256 upstream states")
    body = tar_body(tar, (row["image_offset"], row["image_size"]))
    return Fetched(body, sha256=sha256, original_size=_original_size(sample))


def _sample(described: bytes) -> dict[str, Any]:
    try:
        sample = json.loads(described)
    except (ValueError, RecursionError) as error:
        raise RecordError("truncated", "the shard's json is damaged") from error
    if not isinstance(sample, dict):
        raise RecordError("truncated", "the shard's json is damaged")
    return sample


def _original_size(sample: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = sample.get("original_width"), sample.get("original_height")
    if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0:
        return width, height
    return None
