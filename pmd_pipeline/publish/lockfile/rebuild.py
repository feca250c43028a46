"""A dataset rebuilt from its lock file, with the proof that it is the same, or what is missing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pmd_pipeline import sources
from pmd_pipeline.base.parallel import Pool, WorkerDied
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.base.storage import remove, sizes, sweep
from pmd_pipeline.codes.reports import with_codes
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, local_path, read_bytes, whole_file
from pmd_pipeline.contract.manifest import load_manifest, located, save_manifest
from pmd_pipeline.contract.models import Counts, Manifest, SourceEntry
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.dataset.manifest import (
    common_versions,
    count_unique_images,
    merge_manifests,
    total_words,
)
from pmd_pipeline.index.build import build_index
from pmd_pipeline.publish.lockfile.format import LockFile, load_lockfile
from pmd_pipeline.publish.lockfile.restore_part import (
    RestoredShard,
    RestoreTask,
    earlier_report,
    missing_name,
    restore_part,
)
from pmd_pipeline.recipe import Fetch, Recipe, load_recipe
from pmd_pipeline.shards.image_locations import WEB, image_locations


@dataclass(frozen=True, kw_only=True)
class RebuildRequest:
    """What to rebuild, and where.

    Args:
        lockfile: folder of the lock file.
        out: address under which `shards/` lies, and the list of images to leave out, if any.
        manifests: address for the manifest, and for the list of missing images.
        images: where images are looked for, in order: `web`, or paths of folders, zips and tars.
        raw: folder of upstream's annotation files, of one source or with a folder per source;
            needed for the captions if the lock file has their hashes.
        changes: override the recipe of each source; only `fetch` has an effect.
    """

    lockfile: str
    out: str
    manifests: str
    images: tuple[str, ...] = (WEB,)
    raw: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Coverage:
    """How much of one source was rebuilt.

    Args:
        images: in the lock file.
        restored: images of these that were rebuilt.
        stored_differently: restored images with other stored bytes, by other libraries.
        missing: the other images, by reason.
        failed_parts: whose workers died.
    """

    source: str
    images: int = 0
    restored: int = 0
    stored_differently: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    failed_parts: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        share = 100 * self.restored / self.images if self.images else 100.0
        phrases = [f"{self.source}: {self.restored:,} of {self.images:,} images ({share:.2f} %)"]
        phrases += [f"{count:,} {reason}" for reason, count in sorted(self.missing.items())]
        if self.stored_differently:
            phrases.append(f"{self.stored_differently:,} stored with other bytes")
        phrases += [f"part {part} failed: run the same command again" for part in self.failed_parts]
        return ", ".join(phrases)

    def facts(self) -> dict[str, Any]:
        """The same by the names of `pmd rebuild --json`."""
        return {
            "source": self.source,
            "images": self.images,
            "there": self.restored,
            "otherwise": self.stored_differently,
            "missing": self.missing,
            "parts": self.failed_parts,
        }


@dataclass
class RebuildResult:
    """A rebuilt dataset.

    Args:
        path: of its manifest.
        missing: path of the list of missing images; None where none is missing.
        expected: digest of the manifest in the lock file.
        versions: sentences about libraries of other versions than those of the locked dataset.
        codes_lost: whether the lock file has image codes, and the dataset has none.
    """

    path: str
    manifest: Manifest
    expected: str
    coverage: list[Coverage]
    missing: str | None
    versions: list[str]
    codes_lost: bool

    @property
    def is_same(self) -> bool:
        """Whether this is the dataset that was locked."""
        return self.manifest.digest == self.expected

    def reasons(self) -> list[str]:
        """Sentences that explain why it is not."""
        sentences = [f"not the same dataset: the lock file is of {self.expected}"]
        if self.missing:
            count = sum(sum(one.missing.values()) for one in self.coverage)
            sentences.append(f"images missing: {count:,}; {self.missing} lists them")
        sentences += [f"built with {difference}" for difference in self.versions]
        if self.codes_lost:
            sentences.append(f"image codes could not be reused: pmd codes {self.path} makes them")
        return sentences

    def facts(self) -> dict[str, Any]:
        """Everything but the manifest, for programs."""
        return {
            "manifest": self.path,
            "digest": self.manifest.digest,
            "expected": self.expected,
            "same": self.is_same,
            "missing": self.missing,
            "versions": self.versions,
            "coverage": [one.facts() for one in self.coverage],
        }


def rebuild(request: RebuildRequest, pool: Pool, reporter: Reporter) -> RebuildResult:
    """Rebuild the dataset of a lock file; parts that are done are kept.

    An image is accepted only with the SHA-256 that it had. Records without an image in the locked
    dataset are not fetched: their rows are copied. From unchanged images, with the same libraries,
    the manifest has the digest of the locked one.

    Raises:
        PmdError: there is no lock file, or one of its files was changed; it has hashes of captions,
            and upstream's files are absent or different; a location of images does not exist;
            another dataset lies in `out`; nothing can be written.
    """
    lockfile = load_lockfile(request.lockfile)
    if lockfile.captions != "text" and request.raw is None:
        raise PmdError(
            f"{request.lockfile} has the sha256 of captions: compare its digest with that of your "
            "dataset (pmd lock --hash-captions), or rebuild with --raw, upstream's files"
        )
    _refuse_overwriting_others(lockfile, request)
    results: dict[tuple[str, int], RestoredShard] = {}
    coverage: list[Coverage] = []
    for source in lockfile.manifest.sources:
        recipe = _locked_recipe(lockfile.manifest.sources[source], source, request.changes)
        index = (
            _index_folder(lockfile, request, recipe, pool, reporter)
            if lockfile.captions != "text"
            else None
        )
        tasks = _tasks(lockfile, request, recipe, index, pool)
        coverage.append(_restore_source(tasks, source, pool, reporter, results))
    path = join(request.manifests, f"{lockfile.manifest.name}.json")
    manifest = _rebuilt_manifest(lockfile, results, path)
    save_manifest(path, manifest)
    return RebuildResult(
        path=path,
        manifest=manifest,
        expected=lockfile.manifest.digest,
        coverage=coverage,
        missing=_join_missing_lists(lockfile, request, results),
        versions=_version_differences(lockfile.manifest.versions, manifest.versions),
        codes_lost=lockfile.manifest.codes is not None and manifest.codes is None,
    )


def _refuse_overwriting_others(lockfile: LockFile, request: RebuildRequest) -> None:
    """Check the manifest and all existing shards before any file changes.

    Raises:
        PmdError: the manifest is of shards elsewhere; or as `earlier_report`.
    """
    _refuse_foreign_manifest(f"{lockfile.manifest.name}.json", request)
    folders = {name: join(request.out, "shards", name) for name in lockfile.manifest.sources}
    file_sizes = {name: sizes(folder) for name, folder in folders.items()}
    for part, entry in zip(lockfile.parts, lockfile.manifest.shards, strict=True):
        earlier_report(folders[part.source], part, entry, file_sizes[part.source])


def _refuse_foreign_manifest(name: str, request: RebuildRequest) -> None:
    if name not in sizes(request.manifests):
        return
    path = join(request.manifests, name)
    for shard in load_manifest(path).shards:
        address, folder = located(path, shard.path), join(request.out, "shards", shard.source)
        actual, expected = local_path(ShardPaths.of(address).folder), local_path(folder)
        if actual and expected:
            is_own = actual.resolve() == expected.resolve()
        else:
            is_own = address.startswith(folder)
        if not is_own:
            raise PmdError(f"{path} is the manifest of {address}: give another --manifests")


def _index_folder(
    lockfile: LockFile, request: RebuildRequest, recipe: Recipe, pool: Pool, reporter: Reporter
) -> str:
    """The folder of an index of upstream's files, which must be those that were locked."""
    source, raw = recipe.source, str(request.raw)
    raw_of_source = Path(raw) / source
    folder = join(request.out, "index", source)
    with reporter.stage(f"{source} index", "rows") as stage:
        annotations = sources.find_annotations(
            recipe.load_source(),
            str(raw_of_source) if raw_of_source.is_dir() else raw,
            recipe.form,
        )
        index = build_index(recipe, annotations, folder, pool, stage.update)
        stage.set_total({"rows": index.rows})
    sha256_of = {file.name: file.sha256 for file in index.upstream}
    for file in lockfile.manifest.sources[source].upstream:
        if sha256_of.get(file.name) != file.sha256:
            raise PmdError(
                f"--raw {raw}: the lock file was made with {file.name} of sha256 {file.sha256}, "
                f"and here is {sha256_of.get(file.name, 'no such file')}"
            )
    return folder


def _tasks(
    lockfile: LockFile, request: RebuildRequest, recipe: Recipe, index: str | None, pool: Pool
) -> list[RestoreTask]:
    source = recipe.source
    scratch = _scratch(request, source)
    shards = join(request.out, "shards", source)
    sweep(shards)
    locations = image_locations(request.images, scratch, pool)
    parts = [
        (part, entry)
        for part, entry in zip(lockfile.parts, lockfile.manifest.shards, strict=True)
        if part.source == source
    ]
    return [
        RestoreTask(
            lockfile=request.lockfile,
            part=part,
            entry=entry,
            recipe=recipe,
            index=index,
            scratch=scratch,
            shards=shards,
            locations=locations,
            optout=request.out,
            workers=min(pool.workers, len(parts)),
        )
        for part, entry in parts
    ]


def _restore_source(
    tasks: Sequence[RestoreTask],
    source: str,
    pool: Pool,
    reporter: Reporter,
    results: dict[tuple[str, int], RestoredShard],
) -> Coverage:
    """Restore the parts of a source into `results`."""
    coverage = Coverage(source, images=sum(task.entry.images for task in tasks))
    with reporter.stage(f"{source} rebuild", "records", coverage.images) as stage:
        for task, result in pool.run(restore_part, tasks, stage.update):
            if isinstance(result, WorkerDied):
                coverage.failed_parts.append(task.part.part)
                continue
            results[source, task.part.part] = result
            coverage.restored += result.entry.images
            coverage.stored_differently += result.stored_differently
            for reason, count in sorted(result.missing.items()):
                coverage.missing[reason] = coverage.missing.get(reason, 0) + count
            stage.advance(str(task), {"records": task.entry.images})
    return coverage


def _locked_recipe(entry: SourceEntry, source: str, changes: Mapping[str, Any]) -> Recipe:
    """The recipe of a locked source, with the `fetch` settings of the installed one, if any."""
    if source in sources.names():
        fetch = load_recipe(source, changes)[0].fetch
    else:
        fetch = Fetch.model_validate(changes.get("fetch", {}))
    try:
        return Recipe.model_validate({**entry.rules, "source": source, "fetch": fetch})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise PmdError(
            f"the rules for {source} in the lock file are of another version ({where}: "
            f"{first['msg'].lower()})"
        ) from error


def _rebuilt_manifest(
    lockfile: LockFile, results: Mapping[tuple[str, int], RestoredShard], path: str
) -> Manifest:
    """The manifest of the restored shards, which is the locked one if nothing is missing."""
    in_order = [results.get((part.source, part.part)) for part in lockfile.parts]
    missing = {name: list(parts) for name, parts in lockfile.manifest.missing.items()}
    for part, result in zip(lockfile.parts, in_order, strict=True):
        if result is None:
            missing[part.source] = sorted([*missing.get(part.source, []), part.part])
    restored = [result for result in in_order if result]
    manifest = lockfile.manifest.model_copy(
        update={
            "sources": {
                name: _source_entry(lockfile, name, entry, results)
                for name, entry in lockfile.manifest.sources.items()
            },
            "shards": [result.entry for result in restored],
            "versions": common_versions(result.report.versions for result in restored)
            or lockfile.manifest.versions,
            "missing": missing,
        }
    )
    codes = [result.codes for result in restored if result.codes]
    return merge_manifests(lockfile.manifest.name, path, [(path, with_codes(manifest, codes))])


def _source_entry(
    lockfile: LockFile,
    source: str,
    entry: SourceEntry,
    results: Mapping[tuple[str, int], RestoredShard],
) -> SourceEntry:
    """The manifest's entry of a source: as it was locked, except for what is missing."""
    parts = [part for part in lockfile.parts if part.source == source]
    restored = [results[source, part.part] for part in parts if (source, part.part) in results]
    lost = sum(part.counts.pairs_in for part in parts if (source, part.part) not in results)
    unique, repeated = count_unique_images([result.entry.ledger_path for result in restored])
    no_part = Counts(pairs_in=lost, failed={"no_part": lost})
    now = Counts.total([*(result.report.counts for result in restored), no_part])
    return entry.model_copy(
        update={
            "counts": _with_parts(entry.counts, Counts.total(part.counts for part in parts), now),
            "images": sum(result.entry.images for result in restored),
            "unique_images": unique,
            "repeated": repeated,
            "words": total_words(result.report.words for result in restored),
        }
    )


def _with_parts(source: Counts, before: Counts, now: Counts) -> Counts:
    """The counts of a source whose parts counted `before`, and count `now`.

    Pairs that the index dropped are in the counts of the source, and in those of no part.
    """

    def changed(name: str) -> dict[str, int]:
        counts = Counter[str](getattr(source, name))
        counts.subtract(getattr(before, name))
        counts.update(getattr(now, name))
        return {reason: count for reason, count in sorted(counts.items()) if count}

    return Counts(
        pairs_in=source.pairs_in,
        kept=now.kept,
        dropped=changed("dropped"),
        failed=changed("failed"),
    )


def _version_differences(locked: Mapping[str, str], rebuilt: Mapping[str, str]) -> list[str]:
    return [
        f"{name} {rebuilt.get(name, 'none')} instead of {locked.get(name, 'none')}"
        for name in sorted(locked.keys() | rebuilt.keys())
        if locked.get(name) != rebuilt.get(name)
    ]


def _join_missing_lists(
    lockfile: LockFile,
    request: RebuildRequest,
    results: Mapping[tuple[str, int], RestoredShard],
) -> str | None:
    """Join the lists of all parts; None, and no list, where no image is missing."""
    address = join(request.manifests, f"{lockfile.manifest.name}.missing.jsonl")
    if not any(result.missing for result in results.values()):
        remove(address)
        return None
    with whole_file(address) as file:
        for part in lockfile.parts:
            if (part.source, part.part) in results:
                name = missing_name(part.part)
                file.write(read_bytes(join(_scratch(request, part.source), name)))
    return address


def _scratch(request: RebuildRequest, source: str) -> str:
    return join(request.out, "kit", source)
