"""Checks of a whole dataset: its shards, their order, and the sums in its manifest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pmd_pipeline.base.parallel import Pool, WorkerDied
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import local_path
from pmd_pipeline.contract.image_format import JPEG, ImageFormat, format_in_rules
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.contract.models import Counts, Manifest, Report, SourceEntry
from pmd_pipeline.dataset.manifest import count_equal, total_words
from pmd_pipeline.inspect.verify.findings import Fault, ShardFindings
from pmd_pipeline.inspect.verify.shards import ShardTask, check_shard


@dataclass(frozen=True)
class Finding:
    """One fault of a dataset.

    Args:
        source: the source that has it.
        part: its part; None if it is in the manifest.
        path: the file.
        fault: what is wrong with the file.
    """

    source: str
    part: int | None
    path: str
    fault: str

    def __str__(self) -> str:
        return f"{self.path}: {self.fault}"


def verify(path: str, pool: Pool, reporter: Reporter, *, fast: bool = False) -> Iterator[Finding]:
    """All faults of the dataset of the manifest at `path`.

    Sources come in the order of the manifest, their shards by part. Parts that the manifest lists
    as missing are no faults.

    Args:
        fast: check only sizes and reports, without reading the shards.

    Raises:
        PmdError: there is no manifest at `path`, or its digest is not that of its content.
    """
    manifest = load_manifest(path)
    unknown = {shard.source for shard in manifest.shards} - manifest.sources.keys()
    for source in sorted(unknown):
        yield Finding(source, None, path, f"has shards of {source}, but no entry of this source")
    for source, entry in manifest.sources.items():
        try:
            image_format = format_in_rules(entry.rules)
        except PmdError as error:
            image_format = JPEG
            yield Finding(source, None, path, f"{source}: {error}")
        tasks = _shard_tasks(path, manifest, source, image_format, fast=fast)
        findings = _check_shards(tasks, source, pool, reporter, fast=fast)
        for task, shard_findings in zip(tasks, findings, strict=True):
            for fault in shard_findings.faults:
                yield Finding(source, task.entry.part, _absolute(fault.path), fault.description)
        for task, description in _order_faults(tasks, findings):
            yield Finding(source, task.entry.part, _absolute(task.address), description)
        for description in _source_faults(manifest, source, entry, tasks, findings):
            yield Finding(source, None, path, f"{source}: {description}")


def _shard_tasks(
    path: str, manifest: Manifest, source: str, image_format: ImageFormat, *, fast: bool
) -> list[ShardTask]:
    return [
        ShardTask(
            entry=shard,
            address=located(path, shard.path),
            kind=manifest.kind,
            rules=manifest.codes,
            fast=fast,
            image_format=image_format,
        )
        for shard in manifest.shards
        if shard.source == source
    ]


def _absolute(address: str) -> str:
    """The address without `..`, as which shards lie beside the folder of their manifest."""
    path = local_path(address)
    return str(path.resolve()) if path else address


def _check_shards(
    tasks: Sequence[ShardTask], source: str, pool: Pool, reporter: Reporter, *, fast: bool
) -> list[ShardFindings]:
    """The findings of each shard, in the order of the tasks."""
    results: dict[int, ShardFindings] = {}
    unit = "shards" if fast else "bytes"
    total = len(tasks) if fast else sum(task.entry.num_bytes for task in tasks)
    with reporter.stage(f"{source} verify", unit, total) as stage:
        for task, result in pool.run(check_shard, tasks, stage.update):
            if isinstance(result, WorkerDied):
                results[id(task)] = ShardFindings(faults=[Fault(task.address, str(result))])
            else:
                results[id(task)] = result
            stage.advance(str(task), {"shards": 1, "bytes": task.entry.num_bytes})
    return [results[id(task)] for task in tasks]


def _order_faults(
    tasks: Sequence[ShardTask], findings: Sequence[ShardFindings]
) -> Iterator[tuple[ShardTask, str]]:
    """Faults in the order of parts and of their key ranges."""
    for before, after in pairwise(tasks):
        if before.entry.part >= after.entry.part:
            yield after, f"part {after.entry.part} comes after part {before.entry.part}"
    ranges = [(task, shard.keys) for task, shard in zip(tasks, findings, strict=True) if shard.keys]
    for (before, low), (after, high) in pairwise(ranges):
        if low[1] >= high[0]:
            overlap = f"begins with the key {high[0]}, but {before} ends with {low[1]}"
            yield after, f"{overlap}: it is the ledger of another part"


def _source_faults(
    manifest: Manifest,
    source: str,
    entry: SourceEntry,
    tasks: Sequence[ShardTask],
    findings: Sequence[ShardFindings],
) -> Iterator[str]:
    """Faults of the entry of a source, by itself and against the reports of its shards."""
    shards = [task.entry for task in tasks]
    if lost := entry.counts.unaccounted():
        yield f"{lost:,} pairs are neither kept, dropped nor failed"
    if digest(entry.rules) != entry.rules_sha256:
        yield "rules_sha256 is not that of the rules"
    if both := {shard.part for shard in shards} & set(manifest.missing.get(source, [])):
        yield f"part {min(both)} is listed as missing, but has a shard"
    if manifest.codes is None and any(shard.codes_sha256 for shard in shards):
        yield "shards have image codes, but the manifest does not state how they were made"
    reports = [shard.report for shard in findings if shard.report]
    if len(reports) == len(shards):
        yield from _report_faults(entry, reports)
        yield from _version_faults(manifest, reports)
    for name, (stated, counted) in _sums(manifest, entry, tasks, findings).items():
        if stated != counted:
            yield f"the manifest states {stated:,} {name}, the shards have {counted:,}"


def _sums(
    manifest: Manifest,
    entry: SourceEntry,
    tasks: Sequence[ShardTask],
    findings: Sequence[ShardFindings],
) -> dict[str, tuple[int, int]]:
    """By name, each number of the manifest and the sum over its shards."""
    shards = [task.entry for task in tasks]
    sums = {"images": (entry.images, sum(shard.images for shard in shards))}
    if manifest.kind == "text":  # the counts are of documents, those of shards of sequences
        return sums
    sums["pairs kept"] = (entry.counts.kept, sum(shard.pairs for shard in shards))
    if manifest.kind == "pairs":
        sums["captions by length"] = (entry.counts.kept, sum(entry.words.values()))
    if tasks and not tasks[0].fast and not any(shard.faults for shard in findings):
        hashes = [np.frombuffer(shard.image_hashes, dtype=np.uint64) for shard in findings]
        unique, copies = count_equal(hashes)
        sums["unique images"] = (entry.unique_images, unique)
        stated = {sha256[:16]: count for sha256, count in entry.repeated.items()}
        for prefix in sorted(stated.keys() | copies.keys()):
            name = f"images of sha256 {prefix}..."
            sums[name] = (stated.get(prefix, 0), copies.get(prefix, 0))
    return sums


def _report_faults(entry: SourceEntry, reports: Sequence[Report]) -> Iterator[str]:
    """Faults in the counts; the manifest's include pairs that the index dropped."""
    total = Counts.total(report.counts for report in reports)
    if total.kept != entry.counts.kept:
        yield f"the manifest states {entry.counts.kept:,} kept, the reports {total.kept:,}"
    if (tokens := sum(report.tokens for report in reports)) != entry.tokens:
        yield f"the manifest states {entry.tokens:,} tokens, the reports {tokens:,}"
    if entry.words != total_words(report.words for report in reports):
        yield "the manifest states other caption lengths than the reports"
    for reason, count in total.dropped.items():
        if entry.counts.dropped.get(reason, 0) < count:
            yield f"the reports have {count:,} pairs dropped by {reason}, the manifest has fewer"
    failed = {name: count for name, count in entry.counts.failed.items() if name != "no_part"}
    if failed != total.failed:
        yield f"the manifest states the failures {failed}, the reports {total.failed}"


def _version_faults(manifest: Manifest, reports: Sequence[Report]) -> Iterator[str]:
    """Versions that a report states and the manifest does not; each once."""
    listed = {name: versions.split(" and ") for name, versions in manifest.versions.items()}
    for name, versions in sorted({one for report in reports for one in report.versions.items()}):
        for version in versions.split(" and "):
            if version not in listed.get(name, []):
                yield f"a shard was made with {name} {version}, which the manifest does not list"
