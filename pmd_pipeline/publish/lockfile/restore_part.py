"""One shard made again from a kit: fetched, accepted by its sha256, put where it was."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pmd_pipeline.base.parallel import ReportProgress
from pmd_pipeline.base.storage import load_model, remove, sizes
from pmd_pipeline.base.tables import read_table
from pmd_pipeline.build.image_locations import ImageLocation
from pmd_pipeline.build.optout import load_list
from pmd_pipeline.build.part import PartTask, build_part
from pmd_pipeline.build.report import counts_of, done_report
from pmd_pipeline.build.shard import ShardBuild
from pmd_pipeline.codes.reports import codes_dependency, done_codes
from pmd_pipeline.codes.tensors import code_tensors
from pmd_pipeline.codes.weights import tensor_bytes
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, open_read, read_bytes, sha256_of, write_whole
from pmd_pipeline.contract.models import FORMAT, CodesReport, Counts, FileDigest, Report, ShardEntry
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import KEPT_SCHEMA, LEDGER_SCHEMA, LedgerRow, ledger_bytes
from pmd_pipeline.index.build import load_index
from pmd_pipeline.index.records import IndexPart, part_of, read_part
from pmd_pipeline.publish.lockfile.format import (
    KitPart,
    caption_sha256,
    kit_file,
    kit_rows,
)
from pmd_pipeline.recipe import Recipe

_NO_FILE = FileDigest(name="none", sha256="0" * 64, num_bytes=0)
_MEND = "delete the .json beside it, and rebuild again"


@dataclass(frozen=True)
class RestoreTask:
    """One shard of a kit.

    Args:
        kit: folder of the kit.
        entry: what the kit's manifest says of the shard.
        index: folder of an index that has the captions of a kit of hashes; None for other kits.
        scratch: folder for what lies between kit and shard: the part's index, the list of what is
            missing.
        shards: folder of the source's shards.
        locations: where images are looked for, in order.
        optout: address beside which the list of images to leave out lies.
        workers: how many tasks run at a time and ask the same hosts.
    """

    kit: str
    part: KitPart
    entry: ShardEntry
    recipe: Recipe
    index: str | None
    scratch: str
    shards: str
    locations: tuple[ImageLocation, ...]
    optout: str
    workers: int = 1

    def __str__(self) -> str:
        return f"part {self.name} of {self.part.source}"

    @property
    def name(self) -> str:
        """What the files of the part share."""
        return part_name(self.part.part)

    @property
    def missing(self) -> str:
        """Where the images that could not be had are listed."""
        return join(self.scratch, missing_name(self.part.part))


@dataclass
class Restored:
    """What became of one shard of a kit.

    Args:
        entry: of the shard as it is now; its path is its address.
        codes: of its images, if they could be taken over.
        missing: images that the kit has and the shard has not, by reason.
        otherwise: images made of the same bytes, but stored as another JPEG.
    """

    report: Report
    entry: ShardEntry
    codes: CodesReport | None = None
    missing: Counter[str] = field(default_factory=Counter)
    otherwise: int = 0


def missing_name(part: int) -> str:
    """The name of the list of a part's missing images: a line of JSON each."""
    return f"{part_name(part)}.missing.jsonl"


def earlier_report(
    shards: str, part: KitPart, entry: ShardEntry, there: dict[str, int]
) -> Report | None:
    """The report of the part that lies in the folder `shards`, if there is any.

    It is of the very shard that the kit was made of, or of one that a rebuild of the kit wrote.

    Args:
        there: sizes of the files in the folder, by name.

    Raises:
        PmdError: it is of another dataset, whose images may be nowhere else by now.
    """
    name = part_name(part.part)
    if f"{name}.json" not in there:
        return None
    report = load_model(Report, shards, f"{name}.json")
    if report and _is_rebuilt(report, part):
        return report
    codes = done_codes(join(shards, f"{name}.tar"), entry, there)
    is_coded_alike = not (codes and part.codes) or codes.file.sha256 == part.codes.file.sha256
    if report and _is_the_kits(report, entry) and is_coded_alike:
        return report
    raise PmdError(f"{join(shards, f'{name}.tar')} is of another dataset: give another --out")


def restore_part(task: RestoreTask, report_progress: ReportProgress) -> Restored:
    """The shard of one part of a kit, with its ledger, report and codes; built only once.

    A shard that is there already, byte by byte, is left as it is, whoever has made it.

    Raises:
        PmdError: a file of the kit is not the one it was made with, the index has other captions,
            a shard of another dataset is in the way, or nothing can be written.
    """
    wanted = kit_rows(task.kit, task.part)
    if task.index:
        wanted = _with_captions(task.index, wanted)
    left_out = _left_out(task, wanted)
    dependency = _dependency(task, left_out)
    there = sizes(task.shards)
    report = (
        done_report(task.shards, task.part.part, dependency, there)
        or _as_it_is(task, wanted, left_out, there)
        or _built(task, wanted, dependency, report_progress)
    )
    ledger = join(task.shards, report.ledger.name)
    with open_read(ledger) as file:
        rows = read_table(file, address=ledger, mend=_MEND).to_pylist()
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
    found = Restored(report, entry)
    same = _same_pictures(task, entry, wanted, rows)
    found.otherwise = entry.images - len(same)
    _list_missing(task, wanted, rows, found)
    if not found.otherwise:
        found.codes = _codes(task, entry, wanted, same)
    return found


def _with_captions(folder: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a kit of hashes with the captions themselves, which an index has."""
    index = load_index(folder)
    assert index is not None
    parts = sorted({part_of(row["key"], len(index.parts)) for row in rows})
    captions = {
        record.key: [caption for caption in record.captions if caption]
        for part in parts
        for record in read_part(folder, index.parts[part])
    }
    return [_with_own(row, captions.get(row["key"], []), folder) for row in rows]


def _with_own(row: dict[str, Any], own: list[str], folder: str) -> dict[str, Any]:
    """A row with its own captions in place of their hashes."""
    hashes = [caption_sha256(caption) for caption in own]
    first = hashes[0] if hashes else None
    if row["caption"] != first or row["captions"] not in (None, hashes):
        raise PmdError(
            f"the captions of {row['id']} in {folder} are not those that the kit was made of: was "
            "the index made with another language model or another version?"
        )
    captions = None if row["captions"] is None else own
    return {**row, "caption": own[0] if own else None, "captions": captions}


def _left_out(task: RestoreTask, wanted: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of the rows that the list of images to leave out hits."""
    listed = load_list(task.optout)
    return [
        row["key"]
        for row in wanted
        if listed.has_record(row["key"], row["url"])
        or listed.has_bytes(row["sha256"], row["final_url"])
    ]


def _dependency(task: RestoreTask, left_out: Sequence[str]) -> str:
    """What the shard depends on: the kit's rows, by which `_is_rebuilt` knows it, and the rest."""
    rest = digest(
        {
            "format": FORMAT,
            "rules": task.recipe.shard_rules(),
            "places": [location.stamp for location in task.locations],
            "left_out": left_out,
        }
    )
    return f"{task.part.rows.sha256} {rest}"


def _is_rebuilt(report: Report, part: KitPart) -> bool:
    """Say whether a rebuild of this part wrote the shard, from whatever places."""
    return report.dependency.split(" ")[0] == part.rows.sha256


def _is_the_kits(report: Report, entry: ShardEntry) -> bool:
    """Say whether a report is of the shard that the kit was made of."""
    made = (report.source, report.part, report.tar.sha256, report.ledger.sha256)
    return made == (entry.source, entry.part, entry.sha256, entry.ledger_sha256)


def _as_it_is(
    task: RestoreTask,
    wanted: Sequence[Mapping[str, Any]],
    left_out: Sequence[str],
    there: dict[str, int],
) -> Report | None:
    """The report of the very shard that the kit was made of, if it is there; else None.

    None means that the shard is to be built, and that a rebuild may do so.
    """
    report = earlier_report(task.shards, task.part, task.entry, there)
    if report is None:
        return None
    images = {row["key"] for row in wanted if row["status"] == Status.SUCCESS}
    if (
        _is_the_kits(report, task.entry)
        and images.isdisjoint(left_out)
        and all(
            file.name in there and sha256_of(join(task.shards, file.name)) == file.sha256
            for file in (report.tar, report.ledger)
        )
    ):
        return report
    if not _is_rebuilt(report, task.part):
        raise PmdError(
            f"{join(task.shards, report.tar.name)} was made by pmd build and is damaged, or has "
            "images that are to be left out: run pmd build, or give another --out"
        )
    return None


def _built(
    task: RestoreTask,
    wanted: Sequence[Mapping[str, Any]],
    dependency: str,
    report_progress: ReportProgress,
) -> Report:
    """Build the part from the records that have an image, then put the others into the ledger."""
    index = _index_bytes([row for row in wanted if row["status"] == Status.SUCCESS])
    kept = FileDigest.of(f"kept-{task.name}.parquet", index)
    write_whole(join(task.scratch, kept.name), index)
    report = build_part(_part_task(task, kept, f"{dependency} unfinished"), report_progress)
    remove(join(task.shards, f"{task.name}.json"))  # the ledger that it vouches for is replaced
    content = read_bytes(join(task.shards, report.ledger.name))
    made = {row["key"]: row for row in read_table(BytesIO(content)).to_pylist()}
    rows = [LedgerRow(**_ledger_row(row, made.get(row["key"]))) for row in wanted]
    ledger = ledger_bytes(rows)
    write_whole(join(task.shards, report.ledger.name), ledger)
    report = report.model_copy(
        update={
            "dependency": dependency,
            "counts": counts_of(rows),
            "records": len(rows),
            "ledger": FileDigest.of(report.ledger.name, ledger),
        }
    )
    write_whole(join(task.shards, f"{task.name}.json"), report.model_dump_json(indent=1).encode())
    return report


def _part_task(task: RestoreTask, kept: FileDigest, dependency: str) -> PartTask:
    """The part as the build takes it, its records in the index file `kept`."""
    part = IndexPart(
        part=task.part.part,
        records=task.entry.images,
        bare=0,
        counts=Counts(),
        kept=kept,
        dropped=_NO_FILE,
    )
    shard = ShardBuild(
        recipe=task.recipe,
        part=part.part,
        shards=task.shards,
        locations=task.locations,
        dependency=dependency,
        optout=task.optout,
        workers=task.workers,
    )
    return PartTask(shard, task.scratch, part)


def _index_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows of a kit as an index file, so that the build takes them; `sha256` is now upstream's.

    To the build, an image without captions is one with an empty caption.
    """
    unknown: dict[str, Any] = {"width": None, "height": None, "spans": [], "rows": []}
    bare: dict[str, Any] = {"captions": [""], "fields": [""]}
    records = [{**row, **unknown, **({} if row["captions"] else bare)} for row in rows]
    out = BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=KEPT_SCHEMA), out, compression="zstd")
    return out.getvalue()


def _ledger_row(wanted: Mapping[str, Any], made: Mapping[str, Any] | None) -> dict[str, Any]:
    """A row of the ledger: as it was where nothing was asked for, as it is now where it was.

    A redirect that has another end today does not make another image.
    """
    if made is None:
        return {name: wanted.get(name) for name in LEDGER_SCHEMA.names}
    if made["status"] != Status.SUCCESS:
        return dict(made)
    return {**made, "final_url": wanted["final_url"]}


def _same_pictures(
    task: RestoreTask,
    entry: ShardEntry,
    wanted: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> set[str]:
    """Keys of the images that are stored with the very bytes that the kit speaks of."""
    there = [row for row in rows if row["status"] == Status.SUCCESS]
    if entry.sha256 == task.entry.sha256:
        return {row["key"] for row in there}
    stored = {row["key"]: row["stored_sha256"] for row in wanted}
    same: set[str] = set()
    with open_read(entry.path) as tar:
        for row in there:
            tar.seek(row["image_offset"])
            if hashlib.sha256(tar.read(row["image_size"])).hexdigest() == stored[row["key"]]:
                same.add(row["key"])
    return same


def _list_missing(
    task: RestoreTask,
    wanted: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    found: Restored,
) -> None:
    """Count the images that are missing, and write a line of JSON for each."""
    lines: list[str] = []
    for before, now in zip(wanted, rows, strict=True):
        if before["status"] == Status.SUCCESS and now["status"] != Status.SUCCESS:
            found.missing[now["reason"]] += 1
            told = {name: now[name] for name in ("key", "id", "url", "reason", "error_message")}
            expected = {"source": task.part.source, "sha256": before["sha256"]}
            lines.append(json.dumps({**expected, **told}, ensure_ascii=False) + "\n")
    write_whole(task.missing, "".join(lines).encode())


def _codes(
    task: RestoreTask, entry: ShardEntry, wanted: Sequence[Mapping[str, Any]], same: set[str]
) -> CodesReport | None:
    """Take over the codes of the images that are there, all of them stored as they were."""
    made = task.part.codes
    if made is None:
        return None
    content = kit_file(task.kit, task.part, made.file)
    if (entry.sha256, entry.ledger_sha256) != (task.entry.sha256, task.entry.ledger_sha256):
        keys = [row["key"] for row in wanted if row["status"] == Status.SUCCESS]
        chosen = [number for number, key in enumerate(keys) if key in same]
        content = _chosen_codes(task, made, content, chosen, entry.sha256)
        tensors = code_tensors(content)
        assert not isinstance(tensors, str)
        made = made.model_copy(
            update={
                "dependency": codes_dependency(entry, made.rules),
                "images": len(chosen),
                "views": len(tensors["codes"]),
                "file": FileDigest.of(made.file.name, content),
            }
        )
    there = done_codes(entry.path, entry, sizes(task.shards))
    if there and there.file == made.file:
        return made
    base = entry.path.removesuffix(".tar")
    write_whole(f"{base}.codes.safetensors", content)
    write_whole(f"{base}.codes.json", made.model_dump_json(indent=1).encode())
    return made


def _chosen_codes(
    task: RestoreTask, made: CodesReport, content: bytes, chosen: Sequence[int], tar: str
) -> bytes:
    """The file of codes of some of the images."""
    address = join(task.kit, task.part.source, made.file.name)
    tensors = code_tensors(content)
    if isinstance(tensors, str):
        raise PmdError(f"{address} {tensors}")
    first = tensors["first"]
    is_sound = first[:1].tolist() == [0] and (np.diff(first) >= 0).all()
    views = {len(tensors["boxes"]), len(tensors["codes"]), *first[-1:].tolist()}
    if not is_sound or len(first) != task.entry.images + 1 or len(views) != 1:
        raise PmdError(f"{address} has codes of other images than the kit: get it again")
    ranges = [np.arange(first[number], first[number + 1]) for number in chosen]
    rows = np.concatenate([np.empty(0, np.int64), *ranges])
    picked = {
        "boxes": tensors["boxes"][rows],
        "codes": tensors["codes"][rows],
        "first": np.cumsum([0, *map(len, ranges)], dtype=np.int64),
    }
    return tensor_bytes(picked, {"rules": made.rules.model_dump(mode="json"), "tar": tar})
