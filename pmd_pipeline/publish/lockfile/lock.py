"""The lock file of a dataset, written from its shards."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pmd_pipeline.base.overwrite import refuse_overwrite
from pmd_pipeline.base.parallel import Pool, ReportProgress, in_order
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.base.storage import sizes
from pmd_pipeline.base.tables import MEND_INDEX, read_batches, read_table
from pmd_pipeline.contract.digests import canonical_json, digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, open_read, read_bytes, write_whole
from pmd_pipeline.contract.image_format import EXTENSIONS
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.contract.models import (
    FORMAT,
    CodesReport,
    FileDigest,
    Manifest,
    ShardEntry,
    Timing,
)
from pmd_pipeline.contract.paths import ShardPaths, part_name
from pmd_pipeline.contract.schemas import LedgerRow, ledger_rows
from pmd_pipeline.index.build import load_index
from pmd_pipeline.publish.lockfile.format import (
    DEPENDENCY,
    LOCKFILE_NAME,
    LockedPart,
    LockedRow,
    LockFile,
    caption_sha256,
    checked_bytes,
    rows_bytes,
)
from pmd_pipeline.shards.report import counts_of
from pmd_pipeline.shards.tar_reader import TarReader


@dataclass(frozen=True)
class LockTask:
    """One shard to lock.

    Args:
        address: of the tar.
        index: Parquet file of the index with the same records, if there is one.
        folder: of the lock file.
        hashed: write SHA-256 in place of captions.
    """

    entry: ShardEntry
    address: str
    index: str | None
    folder: str
    hashed: bool

    def __str__(self) -> str:
        return f"part {part_name(self.entry.part)} of {self.entry.source}"

    @property
    def shard(self) -> ShardPaths:
        """Addresses of the files of the shard."""
        return ShardPaths.of(self.address)

    @property
    def locked(self) -> ShardPaths:
        """Addresses of the files of the part in the lock file."""
        return ShardPaths.in_folder(join(self.folder, self.entry.source), self.entry.part)

    @property
    def names(self) -> ShardPaths:
        """Names of the same files within their folder."""
        return ShardPaths.in_folder("", self.entry.part)


def lock(
    path: str, folder: str, pool: Pool, reporter: Reporter, *, hashed: bool = False
) -> LockFile:
    """Write the lock file of the dataset with the manifest at `path` into `folder`.

    It has the same bytes each time, by one version of pyarrow. Names of images in upstream's
    archives come from the index, where `pmd build` wrote it; without an index, images without an
    address cannot be found again.

    Args:
        hashed: write SHA-256 in place of captions. Such a lock file proves which captions a
            dataset has, and does not publish them.

    Raises:
        PmdError: the shards are not those of the manifest, hold texts, or lie in `folder`.
    """
    manifest = load_manifest(path)
    if manifest.kind == "text":
        raise PmdError(
            f"{path} holds texts; a lock file is for datasets of images: copy the shards"
        )
    indexes = {name: _index_files(path, manifest, name) for name in manifest.sources}
    tasks = [
        LockTask(
            entry=shard,
            address=located(path, shard.path),
            index=indexes[shard.source].get(shard.part),
            folder=folder,
            hashed=hashed,
        )
        for shard in manifest.shards
    ]
    refuse_overwrite(
        folder,
        [task.address for task in tasks],
        [address for task in tasks for address in (task.locked.ledger, task.locked.codes)],
    )
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    with reporter.stage("lock", "bytes", num_bytes) as stage:
        parts = in_order(pool, lock_part, tasks, stage.update)
        stage.set_total({"bytes": num_bytes})
    shards = [
        shard.model_copy(
            update={"path": ShardPaths.in_folder(f"shards/{shard.source}", shard.part).tar}
        )
        for shard in manifest.shards
    ]
    lockfile = LockFile(
        captions="sha256" if hashed else "text",
        manifest=manifest.model_copy(update={"shards": shards}),
        parts=parts,
    )
    lockfile = lockfile.model_copy(update={"digest": lockfile.computed_digest()})
    write_whole(join(folder, LOCKFILE_NAME), (lockfile.model_dump_json(indent=1) + "\n").encode())
    return lockfile


def lock_part(task: LockTask, report_progress: ReportProgress) -> LockedPart:
    """Write the locked files of one shard; current files are kept.

    Raises:
        PmdError: the shard is not the one of the manifest.
    """
    archive_names = _archive_names(task.index) if task.index else {}
    content = _current_rows(task, archive_names) or _write_rows(
        task, archive_names, report_progress
    )
    return LockedPart(
        source=task.entry.source,
        part=task.entry.part,
        counts=counts_of(LockedRow(**row) for row in read_table(BytesIO(content)).to_pylist()),
        rows=FileDigest.of(task.names.ledger, content),
        codes=_copy_codes(task),
    )


def _current_rows(task: LockTask, archive_names: Mapping[str, str]) -> bytes | None:
    """The content of the part's rows, if they were made of this shard."""
    if task.names.ledger not in sizes(task.locked.folder):
        return None
    content = read_bytes(task.locked.ledger)
    try:
        metadata = pq.read_schema(BytesIO(content)).metadata or {}
    except pa.ArrowException:
        return None  # not written by `pmd lock`
    is_current = metadata.get(DEPENDENCY) == _dependency(task, archive_names).encode()
    return content if is_current else None


def _dependency(task: LockTask, archive_names: Mapping[str, str]) -> str:
    """Digest of everything that the part's rows depend on."""
    shard = [task.entry.sha256, task.entry.ledger_sha256]
    return digest({"format": FORMAT, "shard": shard, "hashed": task.hashed, "files": archive_names})


def _write_rows(
    task: LockTask, archive_names: Mapping[str, str], report_progress: ReportProgress
) -> bytes:
    """Write the part's rows, made from the shard; their content."""
    ledger = checked_bytes(task.shard.ledger, task.entry.ledger_sha256)
    samples = _read_samples(task.address, task.entry.sha256, report_progress)
    rows = [
        _locked_row(row, samples.get(row.key, {}), archive_names.get(row.key), hashed=task.hashed)
        for row in ledger_rows(read_table(BytesIO(ledger)))
    ]
    content = rows_bytes(rows, _dependency(task, archive_names))
    write_whole(task.locked.ledger, content)
    return content


def _copy_codes(task: LockTask) -> CodesReport | None:
    """Copy the image codes, if there are any; their report without times."""
    if task.entry.codes_sha256 is None:
        return None
    report = CodesReport.model_validate_json(read_bytes(task.shard.codes_report))
    write_whole(
        join(task.locked.folder, report.file.name),
        checked_bytes(task.shard.codes, task.entry.codes_sha256),
    )
    return report.model_copy(update={"timing": Timing()})


def _index_files(path: str, manifest: Manifest, source: str) -> dict[int, str]:
    """Parquet files of the index that `pmd build` wrote beside the shards, by part."""
    shard = next((one for one in manifest.shards if one.source == source), None)
    if shard is None:
        return {}
    data = located(path, shard.path).rsplit("/", 3)[0]
    folder = join(data, "index", source)
    index = load_index(folder)
    return {part.part: join(folder, part.kept.name) for part in index.parts} if index else {}


def _archive_names(index: str) -> dict[str, str]:
    """Name of each record's image in upstream's archives, by key."""
    with open_read(index) as file:
        batches = read_batches(file, ["key", "file"], address=index, mend=MEND_INDEX)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        return {row["key"]: row["file"] for row in rows if row["file"]}


def _read_samples(
    address: str, sha256: str, report_progress: ReportProgress
) -> dict[str, dict[str, Any]]:
    """The JSON of each sample of a tar by key, with the `stored_sha256` of its image."""
    image_sha256: dict[str, str] = {}
    described: dict[str, bytes] = {}
    with open_read(address) as tar:
        members = TarReader(tar)
        for member, content in members:
            key, _, extension = member.name.partition(".")
            if extension in EXTENSIONS:
                image_sha256[key] = hashlib.sha256(content).hexdigest()
            elif extension == "json":
                described[key] = content
            report_progress({"bytes": members.num_bytes})
        if members.sha256 != sha256:
            raise PmdError(
                f"{address} is not the shard of the manifest; pmd verify reports details"
            )
    return {
        key: {**json.loads(content), "stored_sha256": image_sha256[key]}
        for key, content in described.items()
    }


def _locked_row(
    row: LedgerRow, sample: Mapping[str, Any], archive_name: str | None, *, hashed: bool
) -> LockedRow:
    """A row of the ledger with the JSON of its sample, which is empty where there is none."""
    captions, caption, meta = sample.get("captions"), row.caption, sample.get("meta")
    if hashed:
        captions = None if captions is None else [caption_sha256(one) for one in captions]
        caption = None if caption is None else caption_sha256(caption)
    return LockedRow(
        key=row.key,
        id=row.id,
        url=row.url,
        caption=caption,
        num_pairs=row.num_pairs,
        status=row.status,
        reason=row.reason,
        error_message=row.error_message,
        width=row.width,
        height=row.height,
        original_width=row.original_width,
        original_height=row.original_height,
        sha256=row.sha256,
        final_url=row.final_url,
        file=archive_name,
        licence=sample.get("licence"),
        meta=None if meta is None else canonical_json(meta),
        captions=captions,
        fields=sample.get("fields"),
        boxes=sample.get("boxes"),
        stored_sha256=sample.get("stored_sha256"),
    )
