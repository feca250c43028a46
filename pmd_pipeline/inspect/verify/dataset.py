"""Prove that a dataset on disk is the one that its manifest describes, or say what is wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pmd_pipeline.base.parallel import Pool, WorkerDied
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.files import local_path
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.contract.models import Counts, Manifest, Report, SourceEntry
from pmd_pipeline.dataset.manifest import same_bytes, total_words
from pmd_pipeline.inspect.verify.shards import Checked, ShardTask, check_shard


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Args:
        source: the source that it is about.
        part: its part; None where the manifest itself is wrong.
        path: the file.
        fault: what is wrong with it, in words.
    """

    source: str
    part: int | None
    path: str
    fault: str

    def __str__(self) -> str:
        return f"{self.path}: {self.fault}"


def verify(path: str, pool: Pool, reporter: Reporter, *, fast: bool = False) -> Iterator[Finding]:
    """Everything that is wrong with the dataset of the manifest at `path`; nothing if it is whole.

    Sources come one after another, in the order of the manifest, and their shards by part. A part
    that is not built yet is no damage: the manifest itself says that it is missing.

    Args:
        fast: look at sizes and reports only, not into the shards.

    Raises:
        PmdError: there is no manifest at `path`, or its digest is not that of its content.
    """
    manifest = load_manifest(path)
    unknown = {shard.source for shard in manifest.shards} - manifest.sources.keys()
    for source in sorted(unknown):
        yield Finding(source, None, path, f"has shards of {source}, and says nothing of it")
    for source, entry in manifest.sources.items():
        tasks = [
            ShardTask(
                entry=shard,
                address=located(path, shard.path),
                kind=manifest.kind,
                rules=manifest.codes,
                fast=fast,
            )
            for shard in manifest.shards
            if shard.source == source
        ]
        checked = _checked(tasks, source, pool, reporter, fast=fast)
        for task, found in zip(tasks, checked, strict=True):
            for address, fault in found.faults:
                yield Finding(source, task.entry.part, _plain(address), fault)
        for task, fault in _between_shards(tasks, checked):
            yield Finding(source, task.entry.part, _plain(task.address), fault)
        for fault in _source_faults(manifest, source, entry, tasks, checked):
            yield Finding(source, None, path, f"{source}: {fault}")


def _plain(address: str) -> str:
    """An address without the steps back that lead from a manifest to its shards."""
    here = local_path(address)
    return str(here.resolve()) if here else address


def _checked(
    tasks: Sequence[ShardTask], source: str, pool: Pool, reporter: Reporter, *, fast: bool
) -> list[Checked]:
    """What was found in each shard, in the order of the tasks."""
    results: dict[int, Checked] = {}
    unit = "shards" if fast else "bytes"
    total = len(tasks) if fast else sum(task.entry.num_bytes for task in tasks)
    with reporter.stage(f"{source} verify", unit, total) as stage:
        for task, result in pool.run(check_shard, tasks, stage.update):
            if isinstance(result, WorkerDied):
                results[id(task)] = Checked(faults=[(task.address, str(result))])
            else:
                results[id(task)] = result
            stage.advance(str(task), {"shards": 1, "bytes": task.entry.num_bytes})
    return [results[id(task)] for task in tasks]


def _between_shards(
    tasks: Sequence[ShardTask], checked: Sequence[Checked]
) -> Iterator[tuple[ShardTask, str]]:
    """Parts are key ranges in order, each once."""
    for before, after in pairwise(tasks):
        if before.entry.part >= after.entry.part:
            yield after, f"part {after.entry.part} comes after part {before.entry.part}"
    ranges = [(task, found.keys) for task, found in zip(tasks, checked, strict=True) if found.keys]
    for (before, low), (after, high) in pairwise(ranges):
        if low[1] >= high[0]:
            said = f"begins with the key {high[0]}, but {before} ends with {low[1]}"
            yield after, f"{said}: it is the ledger of another part"


def _source_faults(
    manifest: Manifest,
    source: str,
    entry: SourceEntry,
    tasks: Sequence[ShardTask],
    checked: Sequence[Checked],
) -> Iterator[str]:
    """What the manifest says of a source, against itself and against the reports of its shards."""
    shards = [task.entry for task in tasks]
    if lost := entry.counts.unaccounted():
        yield f"{lost:,} pairs came in and are neither kept, dropped nor failed"
    if digest(entry.rules) != entry.rules_sha256:
        yield "rules_sha256 is not that of the rules"
    if both := {shard.part for shard in shards} & set(manifest.missing.get(source, [])):
        yield f"part {min(both)} is called missing, and is there"
    if manifest.codes is None and any(shard.codes_sha256 for shard in shards):
        yield "shards have image codes, but the manifest does not say how they were made"
    reports = [found.report for found in checked if found.report]
    if len(reports) == len(shards):
        yield from _report_faults(entry, reports)
        yield from _version_faults(manifest, reports)
    for name, (said, counted) in _sums(manifest, entry, tasks, checked).items():
        if said != counted:
            yield f"the manifest states {said:,} {name}, the shards have {counted:,}"


def _sums(
    manifest: Manifest, entry: SourceEntry, tasks: Sequence[ShardTask], checked: Sequence[Checked]
) -> dict[str, tuple[int, int]]:
    """Numbers of the manifest by name, each beside what its shards add up to."""
    shards = [task.entry for task in tasks]
    sums = {"images": (entry.images, sum(shard.images for shard in shards))}
    if manifest.kind == "text":  # documents come in, and sequences go out
        return sums
    sums["pairs kept"] = (entry.counts.kept, sum(shard.pairs for shard in shards))
    if manifest.kind == "pairs":
        sums["captions by length"] = (entry.counts.kept, sum(entry.words.values()))
    if tasks and not tasks[0].fast and not any(found.faults for found in checked):
        hashes = [np.frombuffer(found.images, dtype=np.uint64) for found in checked]
        unique, copies = same_bytes(hashes)
        sums["unique images"] = (entry.unique_images, unique)
        stated = {sha256[:16]: count for sha256, count in entry.repeated.items()}
        for name in sorted(stated.keys() | copies.keys()):
            here = f"images of sha256 {name}..."
            sums[here] = (stated.get(name, 0), copies.get(name, 0))
    return sums


def _report_faults(entry: SourceEntry, reports: Sequence[Report]) -> Iterator[str]:
    """Conservation between the reports and the manifest; the index drops pairs of its own."""
    parts = Counts.total(report.counts for report in reports)
    if parts.kept != entry.counts.kept:
        yield f"the manifest states {entry.counts.kept:,} kept, the reports {parts.kept:,}"
    if (tokens := sum(report.tokens for report in reports)) != entry.tokens:
        yield f"the manifest states {entry.tokens:,} tokens, the reports {tokens:,}"
    if entry.words != total_words(report.words for report in reports):
        yield "the manifest states other lengths of captions than the reports do"
    for reason, count in parts.dropped.items():
        if entry.counts.dropped.get(reason, 0) < count:
            yield f"the reports have {count:,} pairs dropped by {reason}, the manifest has fewer"
    world = {name: count for name, count in entry.counts.failed.items() if name != "no_part"}
    if world != parts.failed:
        yield f"the manifest states the failures {world}, the reports {parts.failed}"


def _version_faults(manifest: Manifest, reports: Sequence[Report]) -> Iterator[str]:
    """Versions that a report names, and the manifest does not; each once."""
    stated = {name: said.split(" and ") for name, said in manifest.versions.items()}
    for name, version in sorted({pair for report in reports for pair in report.versions.items()}):
        for one in version.split(" and "):
            if one not in stated.get(name, []):
                yield f"a shard was made with {name} {one}, of which the manifest knows nothing"
