"""A dataset becomes a kit: everything but its images."""

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
from pmd_pipeline.build.tar_reader import TarReader
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
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.index.build import load_index
from pmd_pipeline.publish.lockfile.format import (
    DEPENDENCY,
    KIT,
    UNKNOWABLE,
    Kit,
    KitPart,
    caption_sha256,
    checked,
    counts_of,
    rows_bytes,
)


@dataclass(frozen=True)
class LockTask:
    """One shard to take the images out of.

    Args:
        address: of the tar.
        index: Parquet file of the index that has the same records, if there is one.
        folder: of the kit.
        hashed: leave captions out, too.
    """

    entry: ShardEntry
    address: str
    index: str | None
    folder: str
    hashed: bool

    def __str__(self) -> str:
        return f"part {self.entry.part} of {self.entry.source}"


def lock(path: str, folder: str, pool: Pool, reporter: Reporter, *, hashed: bool = False) -> Kit:
    """Write the kit of the dataset of the manifest at `path` into `folder`.

    Of one dataset the kit is always the same, byte by byte, by one version of pyarrow. The names
    that images have in upstream's archives come from the index, where `pmd build` has left it;
    without it, images without an address cannot be found again.

    Args:
        hashed: write sha256 in place of captions. Such a kit proves what captions somebody has.

    Raises:
        PmdError: the shards are not those of the manifest, hold texts, or lie where the kit is to.
    """
    manifest = load_manifest(path)
    if manifest.kind == "text":
        raise PmdError(f"{path} holds texts, and a kit is what is left of images: copy the shards")
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
        [
            join(folder, task.entry.source, part_name(task.entry.part) + ending)
            for task in tasks
            for ending in (".parquet", ".codes.safetensors")
        ],
    )
    with reporter.stage(
        "lock", "bytes", sum(shard.num_bytes for shard in manifest.shards)
    ) as stage:
        parts = in_order(pool, lock_part, tasks, stage.update)
        stage.set_total({"bytes": sum(shard.num_bytes for shard in manifest.shards)})
    shards = [
        shard.model_copy(update={"path": f"shards/{shard.source}/{part_name(shard.part)}.tar"})
        for shard in manifest.shards
    ]
    kit = Kit(
        captions="sha256" if hashed else "text",
        manifest=manifest.model_copy(update={"shards": shards}),
        parts=parts,
    )
    kit = kit.model_copy(update={"digest": kit.computed_digest()})
    write_whole(join(folder, KIT), (kit.model_dump_json(indent=1) + "\n").encode())
    return kit


def lock_part(task: LockTask, report_progress: ReportProgress) -> KitPart:
    """Write the files of one shard into the kit; what is there already stays.

    Raises:
        PmdError: the shard is not the one of the manifest.
    """
    files = _files(task.index) if task.index else {}
    content = _done(task, files) or _written(task, files, report_progress)
    name = part_name(task.entry.part)
    return KitPart(
        source=task.entry.source,
        part=task.entry.part,
        counts=counts_of(read_table(BytesIO(content)).to_pylist()),
        rows=FileDigest.of(f"{name}.parquet", content),
        codes=_copied_codes(task),
    )


def _done(task: LockTask, files: Mapping[str, str]) -> bytes | None:
    """The content of the part's rows, if they are there and of this very shard."""
    name = f"{part_name(task.entry.part)}.parquet"
    folder = join(task.folder, task.entry.source)
    if name not in sizes(folder):
        return None
    content = read_bytes(join(folder, name))
    try:
        metadata = pq.read_schema(BytesIO(content)).metadata or {}
    except pa.ArrowException:
        return None  # no file of ours
    return content if metadata.get(DEPENDENCY) == _dependency(task, files).encode() else None


def _dependency(task: LockTask, files: Mapping[str, str]) -> str:
    """Digest of what the part's rows depend on."""
    shard = [task.entry.sha256, task.entry.ledger_sha256]
    return digest({"format": FORMAT, "shard": shard, "hashed": task.hashed, "files": files})


def _written(task: LockTask, files: Mapping[str, str], report_progress: ReportProgress) -> bytes:
    """The content of the part's rows, made from the shard."""
    base = task.address.removesuffix(".tar")
    ledger = checked(f"{base}.parquet", task.entry.ledger_sha256)
    samples = _samples(task.address, task.entry.sha256, report_progress)
    rows = [
        _row(row, samples, files, hashed=task.hashed)
        for row in read_table(BytesIO(ledger)).to_pylist()
    ]
    content = rows_bytes(rows, _dependency(task, files))
    name = f"{part_name(task.entry.part)}.parquet"
    write_whole(join(task.folder, task.entry.source, name), content)
    return content


def _copied_codes(task: LockTask) -> CodesReport | None:
    """Copy the image codes, if there are any; their report without times."""
    if task.entry.codes_sha256 is None:
        return None
    base = task.address.removesuffix(".tar")
    report = CodesReport.model_validate_json(read_bytes(f"{base}.codes.json"))
    write_whole(
        join(task.folder, task.entry.source, report.file.name),
        checked(f"{base}.codes.safetensors", task.entry.codes_sha256),
    )
    return report.model_copy(update={"timing": Timing()})


def _index_files(path: str, manifest: Manifest, source: str) -> dict[int, str]:
    """Where `pmd build` leaves the index beside the shards: its Parquet files by part."""
    shard = next((one for one in manifest.shards if one.source == source), None)
    if shard is None:
        return {}
    data = located(path, shard.path).rsplit("/", 3)[0]
    folder = join(data, "index", source)
    index = load_index(folder)
    return {part.part: join(folder, part.kept.name) for part in index.parts} if index else {}


def _files(index: str) -> dict[str, str]:
    """The name that each record's image has in upstream's archives, by key."""
    with open_read(index) as file:
        batches = read_batches(file, ["key", "file"], address=index, mend=MEND_INDEX)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        return {row["key"]: row["file"] for row in rows if row["file"]}


def _samples(
    address: str, sha256: str, report_progress: ReportProgress
) -> dict[str, dict[str, Any]]:
    """The JSON of each sample of a tar by key, with the sha256 of its picture."""
    pictures: dict[str, str] = {}
    described: dict[str, bytes] = {}
    with open_read(address) as tar:
        members = TarReader(tar)
        for member, content in members:
            key, _, extension = member.name.partition(".")
            if extension in EXTENSIONS:
                pictures[key] = hashlib.sha256(content).hexdigest()
            elif extension == "json":
                described[key] = content
            report_progress({"bytes": members.num_bytes})
        if members.sha256 != sha256:
            raise PmdError(f"{address} is not the shard of the manifest; pmd verify says more")
    return {
        key: {**json.loads(content), "stored_sha256": pictures[key]}
        for key, content in described.items()
    }


def _row(
    row: Mapping[str, Any],
    samples: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, str],
    *,
    hashed: bool,
) -> dict[str, Any]:
    """A row of the ledger with what it takes to make its sample again."""
    sample = samples.get(row["key"], {})
    captions, caption = sample.get("captions"), row["caption"]
    if hashed:
        captions = None if captions is None else [caption_sha256(one) for one in captions]
        caption = None if caption is None else caption_sha256(caption)
    meta = sample.get("meta")
    return {
        **{name: row[name] for name in row if name not in UNKNOWABLE},
        "caption": caption,
        "file": files.get(row["key"]),
        "licence": sample.get("licence"),
        "meta": None if meta is None else canonical_json(meta),
        "captions": captions,
        "fields": sample.get("fields"),
        "boxes": sample.get("boxes"),
        "stored_sha256": sample.get("stored_sha256"),
    }
