"""A whole source, from its annotation files to its manifest, through the stages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pmd_pipeline import sources
from pmd_pipeline.base.parallel import Pool, WorkerDied, open_pool
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.base.storage import sizes, sweep
from pmd_pipeline.build.image_locations import WEB, ImageLocation, image_locations
from pmd_pipeline.build.optout import add_to_list, load_list
from pmd_pipeline.build.part import PartTask, build_part, part_dependency
from pmd_pipeline.build.report import done_report
from pmd_pipeline.build.shard import ShardBuild
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import is_local, join
from pmd_pipeline.contract.manifest import save_manifest
from pmd_pipeline.contract.models import Manifest, Report
from pmd_pipeline.contract.reasons import FAILURE_REASONS
from pmd_pipeline.contract.suggestions import suggestion
from pmd_pipeline.dataset.manifest import merge_manifests, repeated_pictures, source_manifest
from pmd_pipeline.images.local.imagenet import check_images, list_images
from pmd_pipeline.index.build import Index, build_index
from pmd_pipeline.recipe import Recipe, load_recipe
from pmd_pipeline.sources.upstream import download as annotations
from pmd_pipeline.sources.upstream.held_out import KARPATHY_FILE
from pmd_pipeline.text.hub import dataset_folder, keep_dataset
from pmd_pipeline.text.packing import build_texts, with_tokenizer


@dataclass(frozen=True)
class SourceBuild:
    """What to build and where.

    Args:
        raw: folder of the annotation files.
        data: address under which `index/` and `shards/` lie.
        manifest: address of the manifest to write.
        limit: build only so many records, in key order; None builds all.
        places: where images are looked for, in order: `web`, or paths of folders, zips and tars.
        again: reasons under which what failed is asked for again, in parts that are built; then
            nothing else is built.
    """

    recipe: Recipe
    raw: str
    data: str
    manifest: str
    limit: int | None = None
    places: tuple[str, ...] = (WEB,)
    again: frozenset[str] = frozenset()

    @property
    def index(self) -> str:
        """Folder of the source's index."""
        return join(self.data, "index", self.recipe.source)

    @property
    def shards(self) -> str:
        """Folder of the source's shards."""
        return join(self.data, "shards", self.recipe.source)


@dataclass(frozen=True)
class BuildRequest:
    """What a user asks for, of one or of many sources.

    Args:
        recipes: names or paths of recipes; one that includes others gives a manifest of them all.
        out: address for index and shards.
        manifests: address for manifests.
        raw: folder of annotation files, one source's or with a folder for each; None takes
            `out/raw/SOURCE`, where what upstream gives freely is downloaded to.
        images: see `SourceBuild.places`.
        changes: laid over every recipe.
        optout: file of images to leave out, now and in later builds; see `parts.optout`.
        again: see `SourceBuild`.
    """

    recipes: tuple[str, ...]
    out: str
    manifests: str
    raw: str | None = None
    images: tuple[str, ...] = (WEB,)
    limit: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    optout: str | None = None
    again: frozenset[str] = frozenset()
    runner: str = "ray"
    workers: int | None = None
    ray_address: str | None = None


@dataclass
class BuildResult:
    """Manifests with their addresses, and a sentence for each part that failed."""

    manifests: list[tuple[str, Manifest]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def reasons_of(words: Sequence[str]) -> frozenset[str]:
    """The reasons that `words`, each one or several with commas, name.

    Raises:
        PmdError: one is no reason why an image may fail.
    """
    names = [name.strip() for word in words for name in word.split(",")]
    for name in names:
        if name not in FAILURE_REASONS:
            raise PmdError(f"--reason {name}: {suggestion(name, FAILURE_REASONS)}")
    return frozenset(names)


def build_all(request: BuildRequest, reporter: Reporter) -> BuildResult:
    """Build every source that is asked for, one after another, then the manifests of many.

    Raises:
        PmdError: nothing is asked for, a recipe is wrong, the input is missing or wrong, or
            nothing can be written.
    """
    if not request.recipes:
        raise PmdError("nothing to build: give --source NAME, --all or --recipe FILE")
    groups = {name: load_recipe(name, request.changes) for name in request.recipes}
    chosen: dict[str, Recipe] = {}
    for recipe in chain.from_iterable(groups.values()):
        if chosen.setdefault(recipe.source, recipe) != recipe:
            raise PmdError(f"two recipes for {recipe.source} are asked for; give one of them")
    orders = [_order(request, recipe) for recipe in chosen.values()]
    if request.optout:
        add_to_list(request.out, request.optout)
    if request.raw is None:
        for order in orders:
            _download(order, reporter)
    built = BuildResult()
    done: dict[str, str] = {}
    with open_pool(request.runner, request.workers, request.ray_address) as pool:
        for order in orders:
            done[order.recipe.source] = order.manifest
            manifest, failures = build_source(order, pool, reporter)
            built.manifests.append((order.manifest, manifest))
            built.failures += failures
    by_path = dict(built.manifests)
    for name, recipes in groups.items():
        if len(recipes) > 1:
            path = join(request.manifests, f"{Path(name).stem}.json")
            paths = [done[recipe.source] for recipe in recipes]
            manifest = merge_manifests(
                Path(name).stem, path, [(one, by_path[one]) for one in paths]
            )
            save_manifest(path, manifest)
            built.manifests.append((path, manifest))
    return built


def build_source(order: SourceBuild, pool: Pool, reporter: Reporter) -> tuple[Manifest, list[str]]:
    """Index, build and list one source; what is done and still true is not done again.

    Returns the manifest, and a sentence for each part that failed.

    Raises:
        PmdError: the input is missing or wrong, or nothing can be written.
    """
    source = order.recipe.source
    sweep(order.index)
    sweep(order.shards)
    if order.recipe.kind == "images":
        order = _with_images(order, pool, reporter)
    locations = image_locations(order.places, order.index, pool)
    with reporter.stage(f"{source} index", "rows") as stage:
        index = build_index(order.recipe, order.raw, order.index, pool, stage.update)
        stage.set_total({"rows": index.rows})
    if index.leakage == "not checked":
        reporter.warn(
            f"{source}: no {KARPATHY_FILE} in {order.raw} or beside it, so evaluation images were "
            "not left out; the manifest says so"
        )
    tasks = list(_tasks(order, index, locations))
    file_sizes = sizes(order.shards)
    reports = {
        task.part.part: report
        for task in tasks
        if (report := done_report(order.shards, task.part.part, task.shard.dependency, file_sizes))
    }
    waiting = list(_waiting(order, tasks, reports))
    for task in waiting:
        reports.pop(task.part.part, None)
    failures: list[str] = []
    num_records = sum(task.num_records for task in tasks)
    with reporter.stage(f"{source} build", "records", num_records) as stage:
        for report in reports.values():
            stage.resume_from(_counts(report))
        build = build_texts if order.recipe.kind == "text" else build_part
        for task, result in pool.run(build, list(_side_by_side(waiting, pool)), stage.update):
            if isinstance(result, WorkerDied):
                failures.append(str(result))
            else:
                reports[task.part.part] = result
                stage.advance(str(task), _counts(result))
    manifest = source_manifest(
        order.recipe,
        index,
        [reports[part] for part in sorted(reports)],
        order.shards,
        order.manifest,
        order.limit,
        [task.part.part for task in tasks],
        load_list(order.data).digest,
    )
    save_manifest(order.manifest, manifest)
    for sentence in repeated_pictures(manifest):
        reporter.warn(sentence)
    return manifest, failures


def raw_folder(raw: str | None, out: str, source: str) -> str:
    """The folder of a source's annotation files: below `raw`, `raw` itself, or below `out`.

    Raises:
        PmdError: there is no such folder, or it is not on this machine.
    """
    if raw is None:
        folder = join(out, "raw", source)
        if not is_local(folder):
            raise PmdError(f"annotation files cannot be read from {folder}: give a local --raw")
        return folder
    below = Path(raw) / source
    folder = str(below) if below.is_dir() else raw
    if not Path(folder).is_dir():
        raise PmdError(f"--raw {folder}: there is no such folder")
    return folder


def _order(request: BuildRequest, recipe: Recipe) -> SourceBuild:
    """What to build of one source, whose annotation files are there or can be downloaded."""
    source = recipe.load_source()
    recipe = with_tokenizer(recipe)
    raw = raw_folder(request.raw, request.out, recipe.source)
    if recipe.texts.dataset and request.raw is not None:
        raise PmdError(f"{recipe.source}: --raw and texts.dataset exclude each other; give one")
    if recipe.texts.dataset:
        raw = dataset_folder(recipe, raw)
    elif recipe.kind == "images":
        check_images(raw)
    elif request.raw is not None or not source.downloadable(recipe.form):
        sources.find_spans(source, raw, recipe.form)  # says now what a later source lacks
    return SourceBuild(
        recipe=recipe,
        raw=raw,
        data=request.out,
        manifest=join(request.manifests, f"{recipe.source}.json"),
        limit=request.limit,
        places=request.images,
        again=request.again,
    )


def _download(order: SourceBuild, reporter: Reporter) -> None:
    recipe, source = order.recipe, order.recipe.load_source()
    if recipe.kind == "images":
        return  # its raw folder holds images, which are many
    if recipe.texts.dataset:
        with reporter.stage(f"{recipe.source} dataset", "rows") as stage:
            keep_dataset(recipe, order.raw, stage.update)
        return
    with reporter.stage(f"{recipe.source} annotations", "bytes") as stage:
        contact = recipe.fetch.contact
        for sentence in annotations.download_annotations(
            source, order.raw, recipe.form, contact, stage.update
        ):
            reporter.say(sentence)


def _with_images(order: SourceBuild, pool: Pool, reporter: Reporter) -> SourceBuild:
    """The order with a list of its images as what the index reads, and where they are now."""
    with reporter.stage(f"{order.recipe.source} images", "rows") as stage:
        raw, place = list_images(order.raw, join(order.index, "images"), pool, stage.update)
    return replace(order, raw=raw, places=(place,))


def _tasks(
    order: SourceBuild, index: Index, locations: tuple[ImageLocation, ...]
) -> Iterator[PartTask]:
    """The parts to build; with a limit, the first ones, the last of them in part."""
    left = order.limit
    for part in index.parts:
        if left is not None and left <= 0:
            return
        limit = left if left is not None and left < part.records else None
        shard = ShardBuild(
            recipe=order.recipe,
            part=part.part,
            shards=order.shards,
            locations=locations,
            dependency=part_dependency(order.recipe, part, limit, locations),
            optout=order.data,
            again=order.again,
        )
        yield PartTask(shard, order.index, part, limit)
        left = None if left is None else left - part.records


def _waiting(
    order: SourceBuild, tasks: Sequence[PartTask], reports: Mapping[int, Report]
) -> Iterator[PartTask]:
    """The parts to build: not built, or not as what is to be left out or asked again wants.

    Raises:
        PmdError: something is to be asked again, but nothing is built by this order.
    """
    if order.again:
        if tasks and not reports:
            raise PmdError(
                f"nothing of {order.recipe.source} is built by this recipe and these places: give "
                "the options that it was built with, or build it first"
            )
        for task in tasks:
            report = reports.get(task.part.part)
            if report and report.counts.failed.keys() & order.again:
                yield task
        return
    for task in tasks:
        report = reports.get(task.part.part)
        if report is None or not _leaves_out(task, report):
            yield task


def _side_by_side(waiting: Sequence[PartTask], pool: Pool) -> Iterator[PartTask]:
    """The tasks, each knowing how many run beside it and ask the same hosts."""
    for task in waiting:
        workers = min(pool.workers, len(waiting))
        yield replace(task, shard=replace(task.shard, workers=workers))


def _leaves_out(task: PartTask, report: Report) -> bool:
    """Say whether a part that is built leaves out what is to be left out, and nothing else."""
    if task.shard.recipe.kind == "text":
        return True  # nobody lists texts
    return task.shard.exclusions().hold(task.index, task.part, task.shard.shards, report)


def _counts(report: Report) -> dict[str, int]:
    failed = sum(report.counts.failed.values())
    return {"records": report.records, "images": report.images, "failed": failed}
