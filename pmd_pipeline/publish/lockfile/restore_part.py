"""One shard restored from a lock file: its images fetched, and accepted by their SHA-256."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from pmd_pipeline.base.parallel import ReportProgress
from pmd_pipeline.base.storage import load_model, sizes
from pmd_pipeline.base.tables import read_table
from pmd_pipeline.codes.reports import codes_dependency, done_codes
from pmd_pipeline.codes.tensors import Tensors, code_tensors
from pmd_pipeline.codes.weights import tensor_bytes
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, open_read, sha256_of, write_whole
from pmd_pipeline.contract.models import FORMAT, CodesReport, FileDigest, Report, ShardEntry
from pmd_pipeline.contract.paths import ShardPaths, part_name
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LedgerRow, ledger_rows
from pmd_pipeline.index.build import load_index
from pmd_pipeline.index.records import part_of, read_part
from pmd_pipeline.publish.lockfile.format import (
    LockedPart,
    LockedRow,
    caption_sha256,
    locked_file,
    locked_rows,
)
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.shards.image_locations import ImageLocation
from pmd_pipeline.shards.optout import load_list
from pmd_pipeline.shards.report import done_report
from pmd_pipeline.shards.shard import ShardBuild, fetch_into_shard

_MEND = "delete the .json beside it, and rebuild again"


@dataclass(frozen=True)
class RestoreTask:
    """One shard to restore.

    Args:
        lockfile: folder of the lock file.
        entry: the shard in the manifest of the lock file.
        index: folder of an index with the captions, if the lock file has their hashes.
        scratch: folder for the list of missing images.
        shards: folder of the source's shards.
        locations: where images are looked for, in order.
        optout: address beside which the list of images to leave out lies.
        workers: tasks that run at a time and send requests to the same hosts.
    """

    lockfile: str
    part: LockedPart
    entry: ShardEntry
    recipe: Recipe
    index: str | None
    scratch: str
    shards: str
    locations: tuple[ImageLocation, ...]
    optout: str
    workers: int = 1

    def __str__(self) -> str:
        return f"part {part_name(self.part.part)} of {self.part.source}"

    @property
    def missing(self) -> str:
        """Address of the list of images that could not be fetched."""
        return join(self.scratch, missing_name(self.part.part))


@dataclass
class RestoredShard:
    """Result of restoring one shard.

    Args:
        entry: of the shard as it is now; its path is its address.
        codes: of its images, if they could be reused.
        missing: images of the lock file that the shard does not have, by reason.
        stored_differently: images made of the same fetched bytes, but with other stored bytes.
    """

    report: Report
    entry: ShardEntry
    codes: CodesReport | None = None
    missing: Counter[str] = field(default_factory=Counter)
    stored_differently: int = 0


def missing_name(part: int) -> str:
    """Name of the list of a part's missing images, one line of JSON each."""
    return f"{part_name(part)}.missing.jsonl"


def earlier_report(
    shards: str, part: LockedPart, entry: ShardEntry, file_sizes: dict[str, int]
) -> Report | None:
    """The report of the part that lies in the folder `shards`, if there is one.

    It is of the shard that was locked, or of one that a rebuild of this lock file wrote.

    Args:
        file_sizes: of the files in the folder, by name.

    Raises:
        PmdError: it is of another dataset, whose images may exist nowhere else.
    """
    paths, names = ShardPaths.in_folder(shards, part.part), ShardPaths.in_folder("", part.part)
    if names.report not in file_sizes:
        return None
    report = load_model(Report, shards, names.report)
    if report and _is_restored(report, part):
        return report
    codes = done_codes(paths.tar, entry, file_sizes)
    has_same_codes = not (codes and part.codes) or codes.file.sha256 == part.codes.file.sha256
    if report and _is_of_locked_shard(report, entry) and has_same_codes:
        return report
    raise PmdError(f"{paths.tar} is of another dataset: give another --out")


def restore_part(task: RestoreTask, report_progress: ReportProgress) -> RestoredShard:
    """The shard of one part of a lock file, with its ledger, report and codes.

    A shard with the same bytes is left as it is, whichever command wrote it.

    Raises:
        PmdError: a file of the lock file was changed, the index has other captions, a shard of
            another dataset is in the folder, or nothing can be written.
    """
    rows = locked_rows(task.lockfile, task.part)
    if task.index:
        rows = _with_captions(task.index, rows)
    left_out = _left_out(task, rows)
    dependency = _dependency(task, left_out)
    file_sizes = sizes(task.shards)
    report = (
        done_report(task.shards, task.part.part, dependency, file_sizes)
        or _locked_report(task, rows, left_out, file_sizes)
        or _fetch(task, rows, dependency, report_progress)
    )
    ledger = join(task.shards, report.ledger.name)
    with open_read(ledger) as file:
        restored = list(ledger_rows(read_table(file, address=ledger, mend=_MEND)))
    entry = task.entry.model_copy(
        update={
            "path": join(task.shards, report.tar.name),
            "sha256": report.tar.sha256,
            "num_bytes": report.tar.num_bytes,
            "ledger_sha256": report.ledger.sha256,
            "records": report.records,
            "images": report.images,
            "pairs": report.counts.kept,
        }
    )
    same = _keys_stored_alike(task, entry, rows, restored)
    result = RestoredShard(report, entry, stored_differently=entry.images - len(same))
    result.missing = _list_missing(task, rows, restored)
    if not result.stored_differently:
        result.codes = _restore_codes(task, entry, rows, same)
    return result


def _with_captions(index_folder: str, rows: Sequence[LockedRow]) -> list[LockedRow]:
    """Rows with the captions of an index in place of their hashes."""
    index = load_index(index_folder)
    assert index is not None
    parts = sorted({part_of(row.key, len(index.parts)) for row in rows})
    captions = {
        record.key: [caption for caption in record.captions if caption]
        for part in parts
        for record in read_part(index_folder, index.parts[part])
    }
    return [_unhashed(row, captions.get(row.key, []), index_folder) for row in rows]


def _unhashed(row: LockedRow, captions: list[str], index_folder: str) -> LockedRow:
    hashes = [caption_sha256(caption) for caption in captions]
    first = hashes[0] if hashes else None
    if row.caption != first or row.captions not in (None, hashes):
        raise PmdError(
            f"the captions of {row.id} in {index_folder} are not those that were locked: was the "
            "index made with another language model or another version?"
        )
    return replace(
        row,
        caption=captions[0] if captions else None,
        captions=None if row.captions is None else captions,
    )


def _left_out(task: RestoreTask, rows: Sequence[LockedRow]) -> list[str]:
    """Keys of the rows that the list of images to leave out names."""
    optout = load_list(task.optout)
    return [
        row.key
        for row in rows
        if optout.has_record(row.key, row.url) or optout.has_bytes(row.sha256, row.final_url)
    ]


def _dependency(task: RestoreTask, left_out: Sequence[str]) -> str:
    """Digests of what the shard depends on: of the locked rows, for `_is_restored`; of the rest."""
    rest = digest(
        {
            "format": FORMAT,
            "rules": task.recipe.shard_rules(),
            "places": [location.stamp for location in task.locations],
            "left_out": left_out,
        }
    )
    return f"{task.part.rows.sha256} {rest}"


def _is_restored(report: Report, part: LockedPart) -> bool:
    """Whether a rebuild of this part wrote the shard, from whatever locations."""
    return report.dependency.split(" ")[0] == part.rows.sha256


def _is_of_locked_shard(report: Report, entry: ShardEntry) -> bool:
    """Whether a report is of the shard that was locked."""
    stated = (report.source, report.part, report.tar.sha256, report.ledger.sha256)
    return stated == (entry.source, entry.part, entry.sha256, entry.ledger_sha256)


def _locked_report(
    task: RestoreTask,
    rows: Sequence[LockedRow],
    left_out: Sequence[str],
    file_sizes: dict[str, int],
) -> Report | None:
    """The report of the shard that was locked, if the folder has all of it.

    None: the shard is to be fetched, and files in the folder may be replaced.
    """
    report = earlier_report(task.shards, task.part, task.entry, file_sizes)
    if report is None:
        return None
    if (
        _is_of_locked_shard(report, task.entry)
        and {row.key for row in rows if row.has_image}.isdisjoint(left_out)
        and all(
            file.name in file_sizes and sha256_of(join(task.shards, file.name)) == file.sha256
            for file in (report.tar, report.ledger)
        )
    ):
        return report
    if not _is_restored(report, task.part):
        raise PmdError(
            f"{join(task.shards, report.tar.name)} was made by pmd build and is damaged, or has "
            "images that are to be left out: run pmd build, or give another --out"
        )
    return None


def _fetch(
    task: RestoreTask, rows: Sequence[LockedRow], dependency: str, report_progress: ReportProgress
) -> Report:
    """Fetch the images of the locked shard into a shard whose ledger has all rows."""
    build = ShardBuild(
        recipe=task.recipe,
        part=task.part.part,
        shards=task.shards,
        locations=task.locations,
        dependency=dependency,
        optout=task.optout,
        workers=task.workers,
    )
    records = [row.index_record() for row in rows if row.has_image]
    return fetch_into_shard(build, records, report_progress, complete=partial(_complete, rows))


def _complete(rows: Sequence[LockedRow], fetched: Sequence[LedgerRow]) -> list[LedgerRow]:
    """The whole ledger: rows without an image as they were, the others as they were fetched.

    `final_url` stays as it was: a redirect to another address does not make another image.
    """
    row_of = {row.key: row for row in fetched}
    ledger = []
    for row in rows:
        now = row_of.get(row.key, row.ledger_row())
        is_stored = now.status == Status.SUCCESS
        ledger.append(replace(now, final_url=row.final_url) if is_stored else now)
    return ledger


def _keys_stored_alike(
    task: RestoreTask,
    entry: ShardEntry,
    rows: Sequence[LockedRow],
    restored: Sequence[LedgerRow],
) -> set[str]:
    """Keys of the images that are stored with the bytes that were locked."""
    if entry.sha256 == task.entry.sha256:
        return {row.key for row in restored if row.status == Status.SUCCESS}
    stored_sha256 = {row.key: row.stored_sha256 for row in rows}
    same: set[str] = set()
    with open_read(entry.path) as tar:
        for row in restored:
            if row.status == Status.SUCCESS:
                assert row.image_offset is not None
                assert row.image_size is not None
                tar.seek(row.image_offset)
                content = tar.read(row.image_size)
                if hashlib.sha256(content).hexdigest() == stored_sha256[row.key]:
                    same.add(row.key)
    return same


def _list_missing(
    task: RestoreTask, rows: Sequence[LockedRow], restored: Sequence[LedgerRow]
) -> Counter[str]:
    """Count the images that are missing by reason, and write a line of JSON for each."""
    lines: list[str] = []
    reasons = Counter[str]()
    for before, now in zip(rows, restored, strict=True):
        if before.has_image and now.status != Status.SUCCESS:
            reasons[str(now.reason)] += 1
            line = {
                "source": task.part.source,
                "sha256": before.sha256,
                "key": now.key,
                "id": now.id,
                "url": now.url,
                "reason": now.reason,
                "error_message": now.error_message,
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_whole(task.missing, "".join(lines).encode())
    return reasons


def _restore_codes(
    task: RestoreTask, entry: ShardEntry, rows: Sequence[LockedRow], same: set[str]
) -> CodesReport | None:
    """Write the locked codes of the restored images, which all have the locked bytes."""
    report = task.part.codes
    if report is None:
        return None
    content = locked_file(task.lockfile, task.part, report.file)
    if (entry.sha256, entry.ledger_sha256) != (task.entry.sha256, task.entry.ledger_sha256):
        keys = [row.key for row in rows if row.has_image]
        chosen = [number for number, key in enumerate(keys) if key in same]
        content, num_crops = _codes_of(task, report, content, chosen, entry.sha256)
        report = report.model_copy(
            update={
                "dependency": codes_dependency(entry, report.rules),
                "images": len(chosen),
                "views": num_crops,
                "file": FileDigest.of(report.file.name, content),
            }
        )
    earlier = done_codes(entry.path, entry, sizes(task.shards))
    if earlier and earlier.file == report.file:
        return report
    paths = ShardPaths.of(entry.path)
    write_whole(paths.codes, content)
    write_whole(paths.codes_report, report.model_dump_json(indent=1).encode())
    return report


def _codes_of(
    task: RestoreTask, report: CodesReport, content: bytes, chosen: Sequence[int], tar_sha256: str
) -> tuple[bytes, int]:
    """A file of the codes of some of the images, and the number of crops in it."""
    address = join(task.lockfile, task.part.source, report.file.name)
    tensors = code_tensors(content)
    if isinstance(tensors, str):
        raise PmdError(f"{address} {tensors}")
    if not _has_codes_of(tensors, task.entry.images):
        raise PmdError(
            f"{address} has codes of other images than the lock file: get the lock file again"
        )
    first = tensors["first"]
    ranges = [np.arange(first[number], first[number + 1]) for number in chosen]
    crops = np.concatenate([np.empty(0, np.int64), *ranges])
    of_chosen = {
        "boxes": tensors["boxes"][crops],
        "codes": tensors["codes"][crops],
        "first": np.cumsum([0, *map(len, ranges)], dtype=np.int64),
    }
    facts = {"rules": report.rules.model_dump(mode="json"), "tar": tar_sha256}
    return tensor_bytes(of_chosen, facts), len(crops)


def _has_codes_of(tensors: Tensors, num_images: int) -> bool:
    """Whether the tensors have codes of so many images."""
    first = tensors["first"]
    if len(first) != num_images + 1 or first[0] != 0 or (np.diff(first) < 0).any():
        return False
    return len(tensors["boxes"]) == len(tensors["codes"]) == int(first[-1])
