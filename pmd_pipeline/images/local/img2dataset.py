"""Images in shards that img2dataset made, checked against the index.

The samples of these shards have no useful order, so the members of each tar are catalogued once:
one Parquet file per tar, in which the records of a part are looked up. img2dataset stores smaller
images than it fetched. The sha256 in its Parquet files is that of the fetched bytes, and goes into
our shards as such.
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
from pmd_pipeline.base.tables import DAMAGE
from pmd_pipeline.contract.errors import PmdError, RecordError
from pmd_pipeline.contract.files import join, whole_file
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.images.fetch.client import FetchedImage
from pmd_pipeline.images.local.archives import Extent, ImageLookup, read_tar_member, tar_extents
from pmd_pipeline.index.records import IndexRecord


@dataclass(frozen=True)
class _CatalogueRow:
    """Where one row of a shard lies in its tar.

    Args:
        address: hash of the URL.
        status: img2dataset's, or `_NOT_IN_TAR`.
        sha256: of the fetched bytes, as stated by the shard.
    """

    address: int
    status: str | None
    sha256: str | None
    tar: str
    image_offset: int | None
    image_size: int | None
    json_offset: int | None
    json_size: int | None


_CATALOGUE_SCHEMA = pa.schema(
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
_EXTENSIONS = ("jpg", "png", "webp")
_NOT_IN_TAR = "not in its tar"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class CatalogueTask:
    """One tar, with its Parquet file beside it, whose catalogue goes to `address`."""

    tar: str
    address: str


def is_img2dataset(path: str) -> bool:
    """True for a folder of shards as img2dataset writes them."""
    folder = Path(path)
    return folder.is_dir() and any(
        tar.with_name(f"{tar.stem}_stats.json").is_file() for tar in folder.glob("*.tar")
    )


def build_catalogue(path: str, folder: str, pool: Pool) -> None:
    """Catalogue all shards of the folder `path` in `folder`, and replace what was there.

    Raises:
        PmdError: a shard has no Parquet file, one of them is damaged, or it has no sha256.
    """
    remove(folder)
    tasks = [
        CatalogueTask(str(tar), join(folder, f"{part_name(number)}.parquet"))
        for number, tar in enumerate(sorted(Path(path).resolve().glob("*.tar")))
    ]
    for _, result in pool.run(catalogue_shard, tasks, ignore_progress):
        if isinstance(result, WorkerDied):
            raise result


def catalogue_shard(task: CatalogueTask, _report_progress: ReportProgress) -> None:
    """Write where each row of one shard lies in its tar."""
    extents = tar_extents(Path(task.tar))
    rows = [
        row
        for values in _read_parquet_of(task.tar)
        if (row := _catalogue_row(task.tar, values, extents))
    ]
    rows.sort(key=lambda row: row.address)
    with whole_file(task.address) as file:
        table = pa.Table.from_pylist([vars(row) for row in rows], schema=_CATALOGUE_SCHEMA)
        pq.write_table(table, file)


def open_img2dataset(folder: str, records: Iterable[IndexRecord]) -> ImageLookup:
    """The lookup in the catalogue of `folder`, for these records only."""
    hashes = [_url_hash(record.url) for record in records if record.url]
    files = [join(folder, name) for name in sorted(sizes(folder)) if name.endswith(".parquet")]
    table = (
        pl.scan_parquet(files, glob=False)  # brackets in the folder's name are no pattern
        .filter(pl.col("address").is_in(pl.Series(hashes, dtype=pl.UInt64).implode()))
        .collect()
    )
    by_hash: dict[int, _CatalogueRow] = {}
    for values in table.iter_rows(named=True):
        row = _CatalogueRow(**values)
        earlier = by_hash.get(row.address)
        if earlier is None or earlier.status != Status.SUCCESS:
            by_hash[row.address] = row

    def look_up(record: IndexRecord) -> FetchedImage | None:
        row = by_hash.get(_url_hash(record.url)) if record.url else None
        return _read_checked(record, row) if row else None

    return look_up


def _url_hash(url: str) -> int:
    digest = hashlib.blake2b(_without_scheme(url).encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _without_scheme(url: str) -> str:
    """The URL without its scheme: the recipe of SBU changes http to https."""
    return url_id(url).split("://", 1)[-1]


def _read_parquet_of(tar: str) -> list[dict[str, Any]]:
    path = Path(tar).with_suffix(".parquet")
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
            rows: list[dict[str, Any]] = [] if missing else file.read(_COLUMNS).to_pylist()
    except DAMAGE as error:
        raise PmdError(f"{path} cannot be read ({error}): is the shard of {tar} whole?") from error
    if missing:
        raise PmdError(
            f"{path} has no column {missing[0]!r}: run img2dataset with its default columns and "
            "compute_hash='sha256'"
        )
    return rows


def _catalogue_row(
    tar: str, values: Mapping[str, Any], extents: Mapping[str, Extent]
) -> _CatalogueRow | None:
    url, key = values["url"], values["key"]
    if not isinstance(url, str):
        return None
    image = next((extents[n] for e in _EXTENSIONS if (n := f"{key}.{e}") in extents), None)
    json_extent = extents.get(f"{key}.json")
    status = values["status"]
    if status == Status.SUCCESS and not (image and json_extent):
        status = _NOT_IN_TAR
    image_offset, image_size = image or (None, None)
    json_offset, json_size = json_extent or (None, None)
    return _CatalogueRow(
        address=_url_hash(url),
        status=status,
        sha256=values["sha256"],
        tar=tar,
        image_offset=image_offset,
        image_size=image_size,
        json_offset=json_offset,
        json_size=json_size,
    )


def _read_checked(record: IndexRecord, row: _CatalogueRow) -> FetchedImage:
    """The image of a catalogued row.

    Raises:
        RecordError: the row has none, or the shard and the index differ on it.
    """
    if row.status != Status.SUCCESS:
        raise RecordError("not_in_archive", f"img2dataset: {row.status}")
    tar = Path(row.tar)
    sample = _parse_sample(_read_extent(tar, row.json_offset, row.json_size))
    if _without_scheme(str(sample.get("url"))) != _without_scheme(record.url or ""):
        raise RecordError("caption_mismatch", "the shard's json is about another address")
    caption = sample.get("caption")
    if caption is not None and one_line(str(caption)) not in record.captions:
        raise RecordError("caption_mismatch", "the shard has another caption")
    if sample.get("sha256") != row.sha256:
        raise RecordError("changed", "the shard's json and parquet state different sha256")
    if not _SHA256.fullmatch(str(row.sha256)):
        raise RecordError("changed", "the shard states no sha256")
    if record.sha256 and record.sha256 != row.sha256:
        raise RecordError("changed", "not the bytes whose sha256 upstream states")
    body = _read_extent(tar, row.image_offset, row.image_size)
    return FetchedImage(body, sha256=row.sha256, original_size=_original_size(sample))


def _read_extent(tar: Path, offset: int | None, size: int | None) -> bytes:
    assert offset is not None
    assert size is not None
    return read_tar_member(tar, (offset, size))


def _parse_sample(content: bytes) -> dict[str, Any]:
    try:
        sample = json.loads(content)
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
