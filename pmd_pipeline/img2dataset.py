"""Shards made by img2dataset as a place of images, checked against the index.

Their samples are in no order of ours, so the members of each tar are catalogued once: one Parquet
file per tar, which a part's records are looked up in. img2dataset stores smaller pictures than it
fetched; the sha256 it states is that of the bytes as fetched, and is passed on as such.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pmd_pipeline.errors import PmdError, RecordError
from pmd_pipeline.fetch import Fetched
from pmd_pipeline.format import part_name
from pmd_pipeline.parallel import Pool, Tick, WorkerDied, no_watch
from pmd_pipeline.record import one_line, url_id
from pmd_pipeline.records import IndexRecord
from pmd_pipeline.shelves import Shelf
from pmd_pipeline.storage import join, whole_file

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
_IMAGES = ("jpg", "png", "webp")


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
    """Catalogue all shards of `place` in `folder`.

    Raises:
        PmdError: a shard has no Parquet file, or either is broken.
    """
    tasks = [
        CatalogTask(str(tar), join(folder, f"{part_name(number)}.parquet"))
        for number, tar in enumerate(sorted(Path(place).glob("*.tar")))
    ]
    for _, result in pool.run(write_catalogue, tasks, no_watch):
        if isinstance(result, WorkerDied):
            raise result


def write_catalogue(task: CatalogTask, _tick: Tick) -> None:
    """Write where each row of one shard lies in its tar."""
    table = Path(task.tar).with_suffix(".parquet")
    try:
        rows = pq.read_table(table).to_pylist()
        with tarfile.open(task.tar, "r:") as tar:
            members = {member.name: (member.offset_data, member.size) for member in tar}
    except (OSError, pa.ArrowInvalid, tarfile.TarError) as error:
        raise PmdError(
            f"{table} or its tar cannot be read ({error}): is the shard whole?"
        ) from error
    lines = [line for row in rows if (line := _line(task.tar, row, members))]
    lines.sort(key=lambda line: int(line["address"]))
    with whole_file(task.address) as file:
        pq.write_table(pa.Table.from_pylist(lines, schema=_CATALOG), file)


def open_img2dataset(folder: str, records: Iterable[IndexRecord]) -> Shelf:
    """The shelf of the catalogue in `folder`, for just these records."""
    wanted = [_address(record.url) for record in records if record.url]
    found = (
        pl.scan_parquet(join(folder, "*.parquet"))
        .filter(pl.col("address").is_in(pl.Series(wanted, dtype=pl.UInt64).implode()))
        .collect()
    )
    by_address: dict[int, dict[str, Any]] = {}
    for row in found.iter_rows(named=True):
        if by_address.get(row["address"], {}).get("status") != "success":
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


def _line(
    tar: str, row: dict[str, Any], members: dict[str, tuple[int, int]]
) -> dict[str, Any] | None:
    url, key = row.get("url"), row.get("key")
    if not isinstance(url, str):
        return None
    image = next((members[n] for e in _IMAGES if (n := f"{key}.{e}") in members), None)
    described = members.get(f"{key}.json")
    status = row.get("status") or "failed"
    if status == "success" and not (image and described):
        status = "not in its tar"
    return {
        "address": _address(url),
        "status": status,
        "sha256": row.get("sha256"),
        "tar": tar,
        **dict(zip(("image_offset", "image_size"), image or (None, None), strict=True)),
        **dict(zip(("json_offset", "json_size"), described or (None, None), strict=True)),
    }


def _checked(record: IndexRecord, row: dict[str, Any]) -> Fetched:
    if row["status"] != "success":
        raise RecordError("not_in_archive", f"img2dataset: {row['status']}")
    with Path(row["tar"]).open("rb") as file:
        file.seek(row["json_offset"])
        described = file.read(row["json_size"])
        file.seek(row["image_offset"])
        body = file.read(row["image_size"])
    try:
        sample = json.loads(described)
    except ValueError as error:
        raise RecordError("truncated", "the shard's json is damaged") from error
    if not isinstance(sample, dict) or _bare(str(sample.get("url"))) != _bare(record.url or ""):
        raise RecordError("caption_mismatch", "the shard's json is about another address")
    caption = sample.get("caption")
    if caption is not None and one_line(str(caption)) not in record.captions:
        raise RecordError("caption_mismatch", "the shard has another caption")
    if sample.get("sha256") != row["sha256"]:
        raise RecordError("changed", "the shard's json and parquet state different sha256")
    width, height = sample.get("original_width"), sample.get("original_height")
    size = (width, height) if isinstance(width, int) and isinstance(height, int) else None
    return Fetched(body, sha256=row["sha256"], original_size=size)
