"""Build whole sources, from their annotation files to their manifests, through the stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pmd_pipeline.base.parallel import Pool, WorkerDied, open_pool
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.base.storage import sweep
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import is_local, join
from pmd_pipeline.contract.manifest import save_manifest
from pmd_pipeline.contract.models import Manifest, Report
from pmd_pipeline.contract.reasons import FAILURE_REASONS
from pmd_pipeline.contract.suggestions import suggestion
from pmd_pipeline.dataset.manifest import merge_manifests, repeated_images, source_manifest
from pmd_pipeline.dataset.source_build import (
    SourceBuild,
    done_reports,
    part_tasks,
    unfinished_tasks,
)
from pmd_pipeline.images.local.imagenet import check_images, list_images
from pmd_pipeline.index.build import Index, build_index
from pmd_pipeline.recipe import Recipe, load_recipe
from pmd_pipeline.shards.image_locations import WEB, image_locations
from pmd_pipeline.shards.optout import add_to_list, load_list
from pmd_pipeline.shards.part import PartTask, build_part
from pmd_pipeline.sources import Annotations, find_annotations
from pmd_pipeline.sources.upstream.download import download_annotations
from pmd_pipeline.sources.upstream.held_out import KARPATHY_FILE
from pmd_pipeline.text.hub import dataset_folder, save_dataset
from pmd_pipeline.text.packing import build_texts, with_tokenizer


@dataclass(frozen=True)
class BuildRequest:
    """What a user wants to build: one source or many.

    Args:
        recipes: names or paths of recipes; one that includes others gives a manifest of them all.
        out: address for index and shards.
        manifests: address for manifests.
        raw: folder of annotation files, one source's or with a folder for each; None takes
            `out/raw/SOURCE` and downloads files that need no login.
        images: see `SourceBuild.images`.
        changes: laid over every recipe.
        optout: file of images to leave out, in this build and later ones; see `shards.optout`.
        retry_reasons: see `SourceBuild`.
        runner: see `open_pool`.
        workers: see `open_pool`.
        ray_address: see `open_pool`.
    """

    recipes: tuple[str, ...]
    out: str
    manifests: str
    raw: str | None = None
    images: tuple[str, ...] = (WEB,)
    limit: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    optout: str | None = None
    retry_reasons: frozenset[str] = frozenset()
    runner: str = "ray"
    workers: int | None = None
    ray_address: str | None = None


@dataclass
class BuildResult:
    """Manifests with their addresses, and a sentence for each part that failed."""

    manifests: list[tuple[str, Manifest]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def parse_reasons(texts: Sequence[str]) -> frozenset[str]:
    """The failure reasons in `texts`, each one reason or several with commas between them.

    Raises:
        PmdError: one is no failure reason.
    """
    names = [name.strip() for text in texts for name in text.split(",")]
    for name in names:
        if name not in FAILURE_REASONS:
            raise PmdError(f"--reason {name}: {suggestion(name, FAILURE_REASONS)}")
    return frozenset(names)


def build_all(request: BuildRequest, reporter: Reporter) -> BuildResult:
    """Build every source of the request, one after another, then the manifests of several sources.

    Raises:
        PmdError: the request names no recipe, a recipe is wrong, the input is missing or wrong, or
            nothing can be written.
    """
    if not request.recipes:
        raise PmdError("nothing to build: give --source NAME, --all or --recipe FILE")
    groups = {name: load_recipe(name, request.changes) for name in request.recipes}
    recipes: dict[str, Recipe] = {}
    for recipe in chain.from_iterable(groups.values()):
        if recipes.setdefault(recipe.source, recipe) != recipe:
            raise PmdError(f"two recipes for {recipe.source} are asked for; give one of them")
    builds = [_source_build(request, recipe) for recipe in recipes.values()]
    if request.optout:
        add_to_list(request.out, request.optout)
    if request.raw is None:
        builds = [_with_downloads(build, reporter) for build in builds]
    result = BuildResult()
    by_source: dict[str, tuple[str, Manifest]] = {}
    with open_pool(request.runner, request.workers, request.ray_address) as pool:
        for build in builds:
            manifest, failures = build_source(build, pool, reporter)
            by_source[build.recipe.source] = build.manifest, manifest
            result.failures += failures
    result.manifests += by_source.values()
    for name, included in groups.items():
        if len(included) > 1:
            path = join(request.manifests, f"{Path(name).stem}.json")
            parts = [by_source[recipe.source] for recipe in included]
            manifest = merge_manifests(Path(name).stem, path, parts)
            save_manifest(path, manifest)
            result.manifests.append((path, manifest))
    return result


def build_source(build: SourceBuild, pool: Pool, reporter: Reporter) -> tuple[Manifest, list[str]]:
    """Index and build one source and write its manifest; finished work is not repeated.

    Returns the manifest, and a sentence for each part that failed.

    Raises:
        PmdError: the input is missing or wrong, or nothing can be written.
    """
    sweep(build.index)
    sweep(build.shards)
    if build.recipe.kind == "images":
        build = _with_image_list(build, pool, reporter)
    locations = image_locations(build.images, build.index, pool)
    index = _build_index(build, pool, reporter)
    tasks = list(part_tasks(build, index, locations))
    reports = done_reports(build, tasks)
    unfinished = unfinished_tasks(build, tasks, reports, pool.workers)
    for task in unfinished:
        reports.pop(task.shard.part, None)
    num_records = sum(task.num_records for task in tasks)
    failures: list[str] = []
    with reporter.stage(f"{build.recipe.source} build", "records", num_records) as stage:
        for report in reports.values():
            stage.resume_from(_progress(report))
        function = build_texts if build.recipe.kind == "text" else build_part
        for task, result in pool.run(function, unfinished, stage.update):
            if isinstance(result, WorkerDied):
                failures.append(str(result))
            else:
                reports[task.shard.part] = result
                stage.advance(str(task), _progress(result))
    manifest = _write_manifest(build, index, tasks, reports)
    for warning in repeated_images(manifest):
        reporter.warn(warning)
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


def _source_build(request: BuildRequest, recipe: Recipe) -> SourceBuild:
    """One source of the request, checked: its annotation files exist or can be downloaded."""
    source = recipe.load_source()
    recipe = with_tokenizer(recipe)
    raw = raw_folder(request.raw, request.out, recipe.source)
    annotations: Annotations | None = None
    if recipe.texts.dataset and request.raw is not None:
        raise PmdError(f"{recipe.source}: --raw and texts.dataset exclude each other; give one")
    if recipe.texts.dataset:
        raw = dataset_folder(recipe, raw)
    elif recipe.kind == "images":
        check_images(raw)
    elif request.raw is not None or not source.downloadable(recipe.form):
        annotations = find_annotations(source, raw, recipe.form)
    return SourceBuild(
        recipe=recipe,
        raw=raw,
        data=request.out,
        manifest=join(request.manifests, f"{recipe.source}.json"),
        limit=request.limit,
        images=request.images,
        retry_reasons=request.retry_reasons,
        annotations=annotations,
    )


def _with_downloads(build: SourceBuild, reporter: Reporter) -> SourceBuild:
    """The build with its annotation files, which are downloaded where they are missing."""
    recipe = build.recipe
    if recipe.kind == "images":
        return build  # images are too many to download one by one
    if recipe.texts.dataset:
        with reporter.stage(f"{recipe.source} dataset", "rows") as stage:
            save_dataset(recipe, build.raw, stage.update)
        return build
    with reporter.stage(f"{recipe.source} annotations", "bytes") as stage:
        annotations, warnings = download_annotations(
            recipe.load_source(), build.raw, recipe.form, recipe.fetch.contact, stage.update
        )
        for warning in warnings:
            reporter.say(warning)
    return replace(build, annotations=annotations)


def _with_image_list(build: SourceBuild, pool: Pool, reporter: Reporter) -> SourceBuild:
    """The build with a list of its images as the annotation file, and the folder they are in."""
    with reporter.stage(f"{build.recipe.source} images", "rows") as stage:
        raw, images = list_images(build.raw, join(build.index, "images"), pool, stage.update)
    return replace(build, raw=raw, images=(images,))


def _build_index(build: SourceBuild, pool: Pool, reporter: Reporter) -> Index:
    source = build.recipe.source
    with reporter.stage(f"{source} index", "rows") as stage:
        annotations = build.annotations or find_annotations(
            build.recipe.load_source(), build.raw, build.recipe.form
        )
        index = build_index(build.recipe, annotations, build.index, pool, stage.update)
        stage.set_total({"rows": index.rows})
    if index.leakage == "not checked":
        reporter.warn(
            f"{source}: no {KARPATHY_FILE} in {build.raw} or beside it, so evaluation images were "
            "not left out; the manifest says so"
        )
    return index


def _write_manifest(
    build: SourceBuild, index: Index, tasks: Sequence[PartTask], reports: Mapping[int, Report]
) -> Manifest:
    manifest = source_manifest(
        build.recipe,
        index,
        [reports[part] for part in sorted(reports)],
        build.shards,
        build.manifest,
        build.limit,
        [task.shard.part for task in tasks],
        load_list(build.data).digest,
    )
    save_manifest(build.manifest, manifest)
    return manifest


def _progress(report: Report) -> dict[str, int]:
    failed = sum(report.counts.failed.values())
    return {"records": report.records, "images": report.images, "failed": failed}
