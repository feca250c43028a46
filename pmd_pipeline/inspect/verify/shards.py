"""What can be wrong with one shard: its report, its ledger, its tar, its image codes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from pmd_pipeline.base.parallel import ReportProgress
from pmd_pipeline.base.record import key_of
from pmd_pipeline.base.tables import read_table
from pmd_pipeline.build.tar_reader import TarReader
from pmd_pipeline.codes.tensors import code_faults
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import open_read, read_bytes
from pmd_pipeline.contract.models import (
    CodeRules,
    CodesReport,
    Counts,
    FileDigest,
    Report,
    ShardEntry,
)
from pmd_pipeline.contract.reasons import FAILURE_REASONS, Status
from pmd_pipeline.contract.schemas import LEDGER_SCHEMA
from pmd_pipeline.inspect.verify.samples import Samples

Model = TypeVar("Model", bound=BaseModel)

_MOST_FAULTS = 20
"""Told of one shard; who has as many needs no list."""

_PLACES = ("image_offset", "image_size", "json_offset", "json_size")
_TEXTS = pa.schema([("text", pa.string()), ("tokens", pa.int32()), ("keys", pa.list_(pa.string()))])
"""Columns of a shard of texts: a sequence, its tokens, the documents that it is made of."""

_FAILURES = ("failed_to_download", "failed_to_resize")


@dataclass(frozen=True)
class ShardTask:
    """One shard to check; `address` is where its tar or Parquet file lies.

    Args:
        rules: how the dataset's image codes were made, if it has any.
        fast: look at sizes and reports only.
    """

    entry: ShardEntry
    address: str
    kind: str
    rules: CodeRules | None
    fast: bool

    def __str__(self) -> str:
        return f"part {self.entry.part} of {self.entry.source}"


@dataclass
class Checked:
    """What a check has found in one shard.

    Args:
        faults: the file it is about, and a sentence.
        report: None where it cannot be read.
        keys: the first and the last key of the ledger, where it has been read.
        images: the first 64 bits of the sha256 of each image as fetched, each once.
    """

    faults: list[tuple[str, str]] = field(default_factory=list)
    report: Report | None = None
    keys: tuple[str, str] | None = None
    images: bytes = b""

    def add(self, address: str, sentence: str) -> None:
        """Note one fault, unless there are enough."""
        if len(self.faults) == _MOST_FAULTS:
            self.faults.append((address, "and more: only the first faults are told"))
        elif len(self.faults) < _MOST_FAULTS:
            self.faults.append((address, sentence))


def check_shard(task: ShardTask, report_progress: ReportProgress) -> Checked:
    """Everything that is wrong with one shard, its neighbours aside."""
    found = Checked()
    base = task.address.removesuffix(".tar").removesuffix(".parquet")
    report = found.report = _loaded(Report, f"{base}.json", found)
    if report:
        _check_report(task, report, f"{base}.json", found)
    if task.fast:
        _check_size(task.address, task.entry.num_bytes, found)
        if report and task.kind != "text":
            _check_size(f"{base}.parquet", report.ledger.num_bytes, found)
        if task.rules:
            _check_codes(task, task.rules, base, None, found)
    elif task.kind == "text":
        _check_texts(task, found)
    else:
        rows = _checked_ledger(task, f"{base}.parquet", found)
        samples = _checked_tar(task, rows or [], report_progress, found)
        if report and rows is not None:
            _check_counts(task, report, rows, samples.words, f"{base}.json", found)
        if task.rules:
            _check_codes(task, task.rules, base, samples, found)
    return found


@contextmanager
def _told(found: Checked, address: str) -> Iterator[None]:
    """What keeps a file from being read is a fault of the shard, not the end of the check."""
    try:
        yield
    except PmdError as error:
        found.add(address, str(error).removeprefix(f"cannot read {address}: "))


def _loaded(kind: type[Model], address: str, found: Checked) -> Model | None:
    with _told(found, address):
        try:
            return kind.model_validate_json(read_bytes(address))
        except ValidationError as error:
            said = error.errors()[0]
            where = ".".join(str(step) for step in said["loc"])
            found.add(address, f"is no report of this version ({where}: {said['msg'].lower()})")
    return None


def _check_size(address: str, stated: int, found: Checked) -> None:
    with _told(found, address), open_read(address) as file:
        there = file.seek(0, 2)
        if there != stated:
            found.add(address, f"has {there:,} bytes, not the {stated:,} that are stated")


def _check_report(task: ShardTask, report: Report, address: str, found: Checked) -> None:
    """The report against the manifest, and against itself."""
    entry, name = task.entry, task.address.rpartition("/")[2]
    is_text = task.kind == "text"
    stated = {
        "source": (report.source, entry.source),
        "part": (report.part, entry.part),
        "rows": (report.sequences if is_text else report.records, entry.records),
        "images": (report.images, entry.images),
        "pairs": (report.sequences if is_text else report.counts.kept, entry.pairs),
        "the tar's name": (report.tar.name, name),
        "the tar's sha256": (report.tar.sha256, entry.sha256),
        "the tar's size": (report.tar.num_bytes, entry.num_bytes),
        "the ledger's sha256": (report.ledger.sha256, entry.ledger_sha256),
    }
    for what, (said, expected) in stated.items():
        if said != expected:
            found.add(address, f"{what} is {said}, in the manifest {expected}")
    if lost := report.counts.unaccounted():
        found.add(address, f"{lost:,} pairs came in and are neither kept, dropped nor failed")
    if task.kind == "pairs" and sum(report.words.values()) != report.counts.kept:
        found.add(address, "the lengths of captions are not as many as the pairs kept")


def _check_digest(file: FileDigest, address: str, sha256: str, size: int, found: Checked) -> None:
    if size != file.num_bytes:
        found.add(address, f"has {size:,} bytes, not the {file.num_bytes:,} that are stated")
    elif sha256 != file.sha256:
        found.add(address, f"has sha256 {sha256}, not {file.sha256}: its bytes have changed")


def _checked_ledger(task: ShardTask, address: str, found: Checked) -> list[dict[str, Any]] | None:
    """The rows of the ledger, if they can be read at all."""
    content = b""
    with _told(found, address):
        content = read_bytes(address)
        stated = found.report.ledger.num_bytes if found.report else len(content)
        expected = FileDigest(name="ledger", sha256=task.entry.ledger_sha256, num_bytes=stated)
        there = FileDigest.of("ledger", content)
        _check_digest(expected, address, there.sha256, there.num_bytes, found)
    table = read_parquet(content, address, LEDGER_SCHEMA, found) if content else None
    if table is None:
        return None
    rows: list[dict[str, Any]] = table.to_pylist()
    keys = [str(row["key"]) for row in rows]
    for before, after in pairwise(keys):
        if not before < after:
            found.add(address, f"its rows are not in order: {after} comes after {before}")
    for row in rows:
        for sentence in _row_faults(task, row):
            found.add(address, f"row {row['key']} {sentence}")
    if keys:
        found.keys = keys[0], keys[-1]
    found.images = _image_hashes(rows)
    return rows


def read_parquet(
    content: bytes, address: str, schema: pa.Schema, found: Checked
) -> pa.Table | None:
    """The table that a Parquet file holds; None, and a fault, where it is damaged or another."""
    try:
        table = read_table(BytesIO(content))
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        found.add(address, f"is no whole Parquet file ({str(error).partition(chr(10))[0]})")
        return None
    if not table.schema.equals(schema):
        other = set(table.schema.names) ^ set(schema.names)
        what = f"has other columns: {', '.join(sorted(other))}" if other else "has other types"
        found.add(address, what)
        return None
    return table


def _row_faults(task: ShardTask, row: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with one row of the ledger, whatever the tar holds."""
    if row["id"] is None or row["key"] != key_of(task.entry.source, row["id"]):
        yield f"has not the key of the image {row['id']!r}"
    if (row["num_pairs"] or 0) < 1:
        yield f"counts {row['num_pairs']} pairs"
    if (row["caption"] is None) == (task.kind == "pairs"):
        yield "has no caption" if task.kind == "pairs" else "has a caption"
    status, reason = row["status"], row["reason"]
    if status == Status.SUCCESS:
        needed = (*_PLACES, "width", "height", "original_width", "original_height", "sha256")
        absent = [name for name in needed if row[name] is None]
        if absent or reason is not None:
            yield f"is a success, but has {'no ' + absent[0] if absent else 'the reason ' + reason}"
        return
    if status not in (*_FAILURES, "dropped"):
        yield f"has the status {status!r}, which nothing has"
    elif reason is None or (reason in FAILURE_REASONS) != (status in _FAILURES):
        yield f"is {status} for the reason {reason!r}"
    if any(row[name] is not None for name in _PLACES):
        yield f"is {status}, but has a place in the tar"


def _image_hashes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    hexes = [str(row["sha256"])[:16] for row in rows if row["status"] == Status.SUCCESS]
    whole = [
        int(one, 16) for one in hexes if len(one) == 16 and set(one) <= set("0123456789abcdef")
    ]
    return np.array(whole, dtype=np.uint64).tobytes()


def _checked_tar(
    task: ShardTask,
    rows: Sequence[Mapping[str, Any]],
    report_progress: ReportProgress,
    found: Checked,
) -> Samples:
    """Read the whole tar and hold it against the ledger."""
    samples = Samples(
        task.entry.source, task.kind, rows, lambda sentence: found.add(task.address, sentence)
    )
    with _told(found, task.address), open_read(task.address) as file:
        members = TarReader(file)
        for number, (member, content) in enumerate(members):
            samples.see(member, content)
            if number % 300 == 0:
                report_progress({"bytes": members.num_bytes})
        for sentence in members.faults:
            found.add(task.address, sentence)
        if rows:
            samples.compare(is_whole=members.is_whole)
        stated = FileDigest(name="shard", sha256=task.entry.sha256, num_bytes=task.entry.num_bytes)
        _check_digest(stated, task.address, members.sha256, members.num_bytes, found)
    return samples


def _check_counts(
    task: ShardTask,
    report: Report,
    rows: Sequence[Mapping[str, Any]],
    words: Counter[int],
    address: str,
    found: Checked,
) -> None:
    """The report's counts against those of the ledger and of the captions."""
    lost: dict[str, Counter[str]] = {"dropped": Counter(), "failed": Counter()}
    kept = images = 0
    for row in rows:
        pairs = row["num_pairs"] or 0
        if row["status"] == Status.SUCCESS:
            images += 1
            kept += pairs
        else:
            lost["dropped" if row["status"] == "dropped" else "failed"][str(row["reason"])] += pairs
    counted = Counts(
        pairs_in=sum(row["num_pairs"] or 0 for row in rows),
        kept=kept,
        dropped=dict(lost["dropped"]),
        failed=dict(lost["failed"]),
    )
    for name, value in counted.model_dump().items():
        if value != getattr(report.counts, name):
            said = getattr(report.counts, name)
            found.add(address, f"states {name} = {said}, the ledger has {value}")
    for name, value in (("records", len(rows)), ("images", images)):
        if value != getattr(report, name):
            found.add(address, f"states {getattr(report, name):,} {name}, the ledger has {value:,}")
    if task.kind == "pairs" and report.words != words:
        found.add(address, "states other lengths of captions than the tar has")


def _check_texts(task: ShardTask, found: Checked) -> None:
    """A shard of texts: one Parquet file, which is its own ledger."""
    content = b""
    with _told(found, task.address):
        content = read_bytes(task.address)
        entry, there = task.entry, FileDigest.of("shard", content)
        digest = FileDigest(name="shard", sha256=entry.sha256, num_bytes=entry.num_bytes)
        _check_digest(digest, task.address, there.sha256, there.num_bytes, found)
    table = read_parquet(content, task.address, _TEXTS, found) if content else None
    if table is None:
        return
    if table.num_rows != task.entry.pairs:
        stated = f"by the manifest {task.entry.pairs:,}"
        found.add(task.address, f"has {table.num_rows:,} rows, {stated}")
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        if not (row["text"] and row["keys"] and row["tokens"]):
            found.add(task.address, f"row {number:,} has no text, no documents or no tokens")
    tokens = sum(row["tokens"] or 0 for row in rows)
    if found.report and tokens != found.report.tokens:
        found.add(task.address, f"has {tokens:,} tokens, by the report {found.report.tokens:,}")
    keys = [key for row in rows for key in row["keys"] or ()]
    for before, after in pairwise(keys):
        if before > after:  # a long document goes on in the next row
            found.add(task.address, f"its documents are not in order: {after} after {before}")
    if keys:
        found.keys = keys[0], keys[-1]


def _check_codes(
    task: ShardTask, rules: CodeRules, base: str, samples: Samples | None, found: Checked
) -> None:
    """The codes' report against the manifest, and the codes against both and the ledger."""
    entry, address = task.entry, f"{base}.codes.safetensors"
    report = _loaded(CodesReport, f"{base}.codes.json", found)
    if report is None:
        return
    stated = {
        "source": (report.source, entry.source),
        "part": (report.part, entry.part),
        "images": (report.images, entry.images),
        "views": (report.views, entry.views),
        "sha256": (report.file.sha256, entry.codes_sha256),
        "rules": (report.rules, rules),
    }
    for what, (said, expected) in stated.items():
        if said != expected:
            found.add(f"{base}.codes.json", f"{what} is {said}, in the manifest {expected}")
    if samples is None:
        _check_size(address, report.file.num_bytes, found)
        return
    with _told(found, address):
        content = read_bytes(address)
        there = FileDigest.of("codes", content)
        _check_digest(report.file, address, there.sha256, there.num_bytes, found)
        for sentence in code_faults(content, rules, report.views, samples.views(rules)):
            found.add(address, sentence)
