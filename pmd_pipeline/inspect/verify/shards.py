"""Checks of one shard: all its files, against each other and against the manifest."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pmd_pipeline.base.parallel import ReportProgress
from pmd_pipeline.contract.files import open_read
from pmd_pipeline.contract.image_format import JPEG, ImageFormat
from pmd_pipeline.contract.models import CodeRules, Kind, Report, ShardEntry
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.contract.schemas import LedgerRow
from pmd_pipeline.inspect.verify.codes import check_codes
from pmd_pipeline.inspect.verify.findings import (
    Content,
    ShardFindings,
    check_content,
    check_size,
    load_json,
)
from pmd_pipeline.inspect.verify.ledger import check_ledger
from pmd_pipeline.inspect.verify.samples import SampleChecker
from pmd_pipeline.inspect.verify.texts import check_texts
from pmd_pipeline.shards.report import counts_of, images_of
from pmd_pipeline.shards.tar_reader import TarReader

_PROGRESS_MEMBERS = 300


@dataclass(frozen=True)
class ShardTask:
    """One shard to check.

    Args:
        address: of its tar or Parquet file.
        rules: how the image codes of the dataset were made, if it has any.
        fast: check only sizes and reports.
        image_format: that of the stored images, by the rules of the source.
    """

    entry: ShardEntry
    address: str
    kind: Kind
    rules: CodeRules | None
    fast: bool
    image_format: ImageFormat = JPEG

    def __str__(self) -> str:
        return f"part {self.entry.part} of {self.entry.source}"


def check_shard(task: ShardTask, report_progress: ReportProgress) -> ShardFindings:
    """All faults of one shard; its neighbours are not read."""
    findings, paths = ShardFindings(), ShardPaths.of(task.address)
    report = findings.report = load_json(Report, paths.report, findings)
    if report:
        _check_report(task, report, paths.report, findings)
    if task.fast:
        check_size(task.address, task.entry.num_bytes, findings)
        if report and task.kind != "text":
            check_size(paths.ledger, report.ledger.num_bytes, findings)
        if task.rules:
            check_codes(task.entry, task.rules, paths, None, findings)
    elif task.kind == "text":
        check_texts(task.entry, task.address, findings)
    else:
        rows = check_ledger(task.entry, task.kind, paths.ledger, findings)
        samples = _check_tar(task, rows or [], report_progress, findings)
        if report and rows is not None:
            _check_counts(task, report, rows, samples.words, paths.report, findings)
        if task.rules:
            check_codes(task.entry, task.rules, paths, samples, findings)
    return findings


def _check_report(task: ShardTask, report: Report, path: str, findings: ShardFindings) -> None:
    """Check the report against the manifest, and against itself."""
    entry, name = task.entry, task.address.rpartition("/")[2]
    is_text = task.kind == "text"
    compared = {
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
    for what, (actual, expected) in compared.items():
        if actual != expected:
            findings.add(path, f"{what} is {actual}, in the manifest {expected}")
    if lost := report.counts.unaccounted():
        findings.add(path, f"{lost:,} pairs are neither kept, dropped nor failed")
    if task.kind == "pairs" and sum(report.words.values()) != report.counts.kept:
        findings.add(path, "its caption lengths do not add up to the pairs kept")


def _check_tar(
    task: ShardTask,
    rows: Sequence[LedgerRow],
    report_progress: ReportProgress,
    findings: ShardFindings,
) -> SampleChecker:
    """Read the whole tar and check it against the ledger."""
    entry, path = task.entry, task.address
    samples = SampleChecker(
        entry.source, task.kind, task.image_format, rows, lambda fault: findings.add(path, fault)
    )
    with findings.catch_errors(path), open_read(path) as file:
        members = TarReader(file)
        for number, (member, content) in enumerate(members):
            samples.check(member, content)
            if number % _PROGRESS_MEMBERS == 0:
                report_progress({"bytes": members.num_bytes})
        for fault in members.faults:
            findings.add(path, fault)
        if rows:
            samples.finish(is_whole=members.is_whole)
        actual = Content(members.sha256, members.num_bytes)
        check_content(path, actual, Content(entry.sha256, entry.num_bytes), findings)
    return samples


def _check_counts(
    task: ShardTask,
    report: Report,
    rows: Sequence[LedgerRow],
    words: Counter[int],
    path: str,
    findings: ShardFindings,
) -> None:
    """Check the counts of the report against the ledger and the captions."""
    for name, value in counts_of(rows).model_dump().items():
        if value != (stated := getattr(report.counts, name)):
            findings.add(path, f"states {name} = {stated}, the ledger has {value}")
    for name, stated, value in (
        ("records", report.records, len(rows)),
        ("images", report.images, images_of(rows)),
    ):
        if value != stated:
            findings.add(path, f"states {stated:,} {name}, the ledger has {value:,}")
    if task.kind == "pairs" and report.words != words:
        findings.add(path, "states other caption lengths than the tar has")
