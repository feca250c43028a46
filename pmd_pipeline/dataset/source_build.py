"""One source to build: its parts, and which of them are done."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pmd_pipeline.base.storage import sizes
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join
from pmd_pipeline.contract.models import Report
from pmd_pipeline.index.build import Index
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.shards.image_locations import WEB, ImageLocation
from pmd_pipeline.shards.part import PartTask, part_dependency
from pmd_pipeline.shards.report import done_report
from pmd_pipeline.shards.shard import ShardBuild
from pmd_pipeline.sources import Annotations


@dataclass(frozen=True)
class SourceBuild:
    """One source to build: by which recipe, from where, and to where.

    Args:
        raw: folder of the annotation files.
        data: address under which `index/` and `shards/` lie.
        manifest: address of the manifest to write.
        limit: build only so many records, in key order; None builds all.
        images: where images are looked for, in order: `web`, or paths of folders, zips and tars.
        retry_reasons: failure reasons to retry in parts that are built; if there are any, no other
            part is built.
        annotations: the annotation files, where they are known already.
    """

    recipe: Recipe
    raw: str
    data: str
    manifest: str
    limit: int | None = None
    images: tuple[str, ...] = (WEB,)
    retry_reasons: frozenset[str] = frozenset()
    annotations: Annotations | None = None

    @property
    def index(self) -> str:
        """Folder of the source's index."""
        return join(self.data, "index", self.recipe.source)

    @property
    def shards(self) -> str:
        """Folder of the source's shards."""
        return join(self.data, "shards", self.recipe.source)


def part_tasks(
    build: SourceBuild, index: Index, locations: tuple[ImageLocation, ...]
) -> Iterator[PartTask]:
    """The parts of the source; with a limit, the first ones, the last of them shortened."""
    left = build.limit
    for part in index.parts:
        if left is not None and left <= 0:
            return
        limit = left if left is not None and left < part.records else None
        shard = ShardBuild(
            recipe=build.recipe,
            part=part.part,
            shards=build.shards,
            locations=locations,
            dependency=part_dependency(build.recipe, part, limit, locations),
            optout=build.data,
            retry_reasons=build.retry_reasons,
        )
        yield PartTask(shard, build.index, part, limit)
        left = None if left is None else left - part.records


def done_reports(build: SourceBuild, tasks: Sequence[PartTask]) -> dict[int, Report]:
    """Reports of the parts that are done, by number of the part."""
    file_sizes = sizes(build.shards)
    return {
        task.shard.part: report
        for task in tasks
        if (report := done_report(build.shards, task.shard.part, task.shard.dependency, file_sizes))
    }


def unfinished_tasks(
    build: SourceBuild,
    tasks: Sequence[PartTask],
    reports: Mapping[int, Report],
    max_workers: int,
) -> list[PartTask]:
    """The parts to build, each with the number of workers that share the hosts.

    These are parts without a report, parts that leave out other records than the opt-out list and
    the licences demand now, and, of a retry, only parts with failures for its reasons.

    Raises:
        PmdError: it is a retry, but no part is done.
    """
    if build.retry_reasons and tasks and not reports:
        raise PmdError(
            f"nothing of {build.recipe.source} is built by this recipe and these places: give "
            "the options that it was built with, or build it first"
        )
    unfinished = [task for task in tasks if _is_unfinished(task, reports.get(task.shard.part))]
    workers = min(max_workers, len(unfinished))
    return [replace(task, shard=replace(task.shard, workers=workers)) for task in unfinished]


def _is_unfinished(task: PartTask, report: Report | None) -> bool:
    shard = task.shard
    if shard.retry_reasons:
        return report is not None and bool(report.counts.failed.keys() & shard.retry_reasons)
    if report is None:
        return True
    if shard.recipe.kind == "text":
        return False  # the opt-out list names images
    return not shard.exclusions().still_hold(task.index, task.part, shard.shards, report)
