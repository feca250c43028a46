"""A dataset made again from its kit, with the proof that it is the same, or what is missing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pmd_pipeline import sources
from pmd_pipeline.base.parallel import Pool, WorkerDied
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.base.storage import remove, sizes, sweep
from pmd_pipeline.build.image_locations import WEB, image_locations
from pmd_pipeline.codes.reports import with_codes
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, local_path, read_bytes, whole_file
from pmd_pipeline.contract.manifest import load_manifest, located, save_manifest
from pmd_pipeline.contract.models import Counts, Manifest, SourceEntry
from pmd_pipeline.dataset.manifest import copies_in, merge_manifests, one_version, total_words
from pmd_pipeline.index.build import build_index
from pmd_pipeline.publish.lockfile.format import Kit, load_kit
from pmd_pipeline.publish.lockfile.restore_part import (
    Restored,
    RestoreTask,
    earlier_report,
    missing_name,
    restore_part,
)
from pmd_pipeline.recipe import Fetch, Recipe, load_recipe


@dataclass(frozen=True, kw_only=True)
class RebuildRequest:
    """What to make again, and where.

    Args:
        kit: folder of the kit.
        out: address under which `shards/` lies, and the list of images to leave out, if any.
        manifests: address for the manifest, and for the list of what is missing.
        places: where images are looked for, in order: `web`, or paths of folders, zips and tars.
        raw: folder of upstream's annotation files, one source's or with a folder for each, which a
            kit of hashes needs for its captions.
        changes: laid over the recipe of each source; only its `fetch` counts.
    """

    kit: str
    out: str
    manifests: str
    places: tuple[str, ...] = (WEB,)
    raw: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Coverage:
    """How much of one source there is again.

    Args:
        images: in the kit.
        there: of them, again.
        otherwise: of these, stored as another JPEG than before: other libraries made it.
        missing: the others, by reason.
        parts: that a worker died of.
    """

    source: str
    images: int = 0
    there: int = 0
    otherwise: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    parts: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        share = 100 * self.there / self.images if self.images else 100.0
        words = [f"{self.source}: {self.there:,} of {self.images:,} images ({share:.2f} %)"]
        words += [f"{count:,} {reason}" for reason, count in sorted(self.missing.items())]
        if self.otherwise:
            words.append(f"{self.otherwise:,} stored as another JPEG")
        words += [f"part {part} failed: run the same command again" for part in self.parts]
        return ", ".join(words)


@dataclass
class RebuildResult:
    """A dataset made again.

    Args:
        path: of its manifest.
        missing: of the list of images that could not be had; None where all are there.
        expected: digest of the kit's manifest.
        versions: libraries that differ from those behind the kit.
        codes_lost: whether the kit has image codes, and the dataset has none.
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
        """Say whether this is the dataset that the kit was made of."""
        return self.manifest.digest == self.expected

    def reasons(self) -> list[str]:
        """Why it is not, in sentences."""
        found = [f"not the same dataset: the kit was made of {self.expected}"]
        if self.missing:
            count = sum(sum(one.missing.values()) for one in self.coverage)
            found.append(f"images missing: {count:,}; {self.missing} names each")
        found += [f"made with {sentence}" for sentence in self.versions]
        if self.codes_lost:
            found.append(f"image codes were not taken over: pmd codes {self.path} makes them")
        return found

    def facts(self) -> dict[str, Any]:
        """All of it but the manifest, for programs."""
        return {
            "manifest": self.path,
            "digest": self.manifest.digest,
            "expected": self.expected,
            "same": self.is_same,
            "missing": self.missing,
            "versions": self.versions,
            "coverage": [asdict(one) for one in self.coverage],
        }


def rebuild(order: RebuildRequest, pool: Pool, reporter: Reporter) -> RebuildResult:
    """Make the dataset of a kit again; what is done is not done again.

    Every image is accepted only with the sha256 that it had. What was dropped or had failed when
    the kit was made is not asked for: the kit knows how that ended. Over an unchanged web, with the
    same libraries, the manifest has the digest of the kit's.

    Raises:
        PmdError: there is no kit, or one of its files has changed; it holds hashes in place of
            captions, and upstream's files are not there or others; a place of images is not there;
            another dataset lies in `out`; nothing can be written.
    """
    kit = load_kit(order.kit)
    if kit.captions != "text" and order.raw is None:
        raise PmdError(
            f"{order.kit} holds the sha256 of captions, so it proves a dataset (lock yours with "
            "--hash-captions and compare the digests); to make one, give --raw, upstream's files"
        )
    _refuse_others(kit, order)
    results: dict[tuple[str, int], Restored] = {}
    coverage: list[Coverage] = []
    for source in kit.manifest.sources:
        recipe = _recipe(kit.manifest.sources[source], source, order.changes)
        index = _index(kit, order, recipe, pool, reporter) if kit.captions != "text" else None
        tasks = _tasks(kit, order, recipe, index, pool)
        coverage.append(_run(tasks, source, pool, reporter, results))
    path = join(order.manifests, f"{kit.manifest.name}.json")
    manifest = _manifest(kit, results, path)
    save_manifest(path, manifest)
    return RebuildResult(
        path=path,
        manifest=manifest,
        expected=kit.manifest.digest,
        coverage=coverage,
        missing=_list_missing(kit, order, results),
        versions=_other_versions(kit.manifest.versions, manifest.versions),
        codes_lost=kit.manifest.codes is not None and manifest.codes is None,
    )


def _refuse_others(kit: Kit, order: RebuildRequest) -> None:
    """Look at the manifest and all shards that are there before any file changes.

    Raises:
        PmdError: the manifest is of shards elsewhere; or as `earlier_report`.
    """
    _refuse_manifest(f"{kit.manifest.name}.json", order)
    folders = {name: join(order.out, "shards", name) for name in kit.manifest.sources}
    there = {name: sizes(folder) for name, folder in folders.items()}
    for part, entry in zip(kit.parts, kit.manifest.shards, strict=True):
        earlier_report(folders[part.source], part, entry, there[part.source])


def _refuse_manifest(name: str, order: RebuildRequest) -> None:
    if name not in sizes(order.manifests):
        return
    path = join(order.manifests, name)
    for shard in load_manifest(path).shards:
        lies, wanted = located(path, shard.path), join(order.out, "shards", shard.source)
        here, there = local_path(lies.rpartition("/")[0]), local_path(wanted)
        same = here.resolve() == there.resolve() if here and there else lies.startswith(wanted)
        if not same:
            raise PmdError(f"{path} is the manifest of {lies}: give another --manifests")


def _index(kit: Kit, order: RebuildRequest, recipe: Recipe, pool: Pool, reporter: Reporter) -> str:
    """The folder of an index made of upstream's files, which must be those of the kit."""
    source, raw = recipe.source, str(order.raw)
    below = Path(raw) / source
    folder = join(order.out, "index", source)
    with reporter.stage(f"{source} index", "rows") as stage:
        found = build_index(
            recipe, str(below) if below.is_dir() else raw, folder, pool, stage.update
        )
        stage.set_total({"rows": found.rows})
    there = {file.name: file.sha256 for file in found.upstream}
    for file in kit.manifest.sources[source].upstream:
        if there.get(file.name) != file.sha256:
            raise PmdError(
                f"--raw {raw}: the kit was made with {file.name} of sha256 {file.sha256}, and here "
                f"is {there.get(file.name, 'no such file')}"
            )
    return folder


def _tasks(
    kit: Kit, order: RebuildRequest, recipe: Recipe, index: str | None, pool: Pool
) -> list[RestoreTask]:
    source = recipe.source
    scratch = _scratch(order, source)
    shards = join(order.out, "shards", source)
    sweep(shards)
    locations = image_locations(order.places, scratch, pool)
    parts = [
        (part, entry)
        for part, entry in zip(kit.parts, kit.manifest.shards, strict=True)
        if part.source == source
    ]
    return [
        RestoreTask(
            kit=order.kit,
            part=part,
            entry=entry,
            recipe=recipe,
            index=index,
            scratch=scratch,
            shards=shards,
            locations=locations,
            optout=order.out,
            workers=min(pool.workers, len(parts)),
        )
        for part, entry in parts
    ]


def _run(
    tasks: Sequence[RestoreTask],
    source: str,
    pool: Pool,
    reporter: Reporter,
    results: dict[tuple[str, int], Restored],
) -> Coverage:
    """Restore the parts of a source into `results`."""
    found = Coverage(source, images=sum(task.entry.images for task in tasks))
    with reporter.stage(f"{source} rebuild", "records", found.images) as stage:
        for task, result in pool.run(restore_part, tasks, stage.update):
            if isinstance(result, WorkerDied):
                found.parts.append(task.part.part)
                continue
            results[source, task.part.part] = result
            found.there += result.entry.images
            found.otherwise += result.otherwise
            for reason, count in sorted(result.missing.items()):
                found.missing[reason] = found.missing.get(reason, 0) + count
            stage.advance(str(task), {"records": task.entry.images})
    return found


def _recipe(entry: SourceEntry, source: str, changes: Mapping[str, Any]) -> Recipe:
    """The recipe behind a source of the kit, with the manners of today's."""
    if source in sources.names():
        fetch = load_recipe(source, changes)[0].fetch
    else:
        fetch = Fetch.model_validate(changes.get("fetch", {}))
    try:
        return Recipe.model_validate({**entry.rules, "source": source, "fetch": fetch})
    except ValidationError as error:
        said = error.errors()[0]
        where = ".".join(str(step) for step in said["loc"])
        raise PmdError(
            f"the kit's rules for {source} are of another version ({where}: {said['msg'].lower()})"
        ) from error


def _manifest(kit: Kit, results: Mapping[tuple[str, int], Restored], path: str) -> Manifest:
    """The manifest of what is there, which is the kit's if all is."""
    found = [results.get((part.source, part.part)) for part in kit.parts]
    missing = {name: list(parts) for name, parts in kit.manifest.missing.items()}
    for part, result in zip(kit.parts, found, strict=True):
        if result is None:
            missing[part.source] = sorted([*missing.get(part.source, []), part.part])
    there = [result for result in found if result]
    manifest = kit.manifest.model_copy(
        update={
            "sources": {
                name: _entry(kit, name, entry, results)
                for name, entry in kit.manifest.sources.items()
            },
            "shards": [result.entry for result in there],
            "versions": one_version(result.report.versions for result in there)
            or kit.manifest.versions,
            "missing": missing,
        }
    )
    codes = [result.codes for result in there if result.codes]
    return merge_manifests(kit.manifest.name, path, [(path, with_codes(manifest, codes))])


def _entry(
    kit: Kit, source: str, entry: SourceEntry, results: Mapping[tuple[str, int], Restored]
) -> SourceEntry:
    """What the manifest says of a source: as before, but for what is missing."""
    before = [part for part in kit.parts if part.source == source]
    there = [results[source, part.part] for part in before if (source, part.part) in results]
    lost = sum(part.counts.pairs_in for part in before if (source, part.part) not in results)
    unique, repeated = copies_in([result.entry.ledger_path for result in there])
    no_part = Counts(pairs_in=lost, failed={"no_part": lost})
    now = Counts.total([*(result.report.counts for result in there), no_part])
    return entry.model_copy(
        update={
            "counts": _changed(entry.counts, Counts.total(part.counts for part in before), now),
            "images": sum(result.entry.images for result in there),
            "unique_images": unique,
            "repeated": repeated,
            "words": total_words(result.report.words for result in there),
        }
    )


def _changed(whole: Counts, before: Counts, now: Counts) -> Counts:
    """The counts of a source whose parts counted `before`, and count `now`.

    All that is kept lies in parts; what the index dropped does not.
    """

    def moved(name: str) -> dict[str, int]:
        counts = Counter[str](getattr(whole, name))
        counts.subtract(getattr(before, name))
        counts.update(getattr(now, name))
        return {reason: count for reason, count in sorted(counts.items()) if count}

    return Counts(
        pairs_in=whole.pairs_in,
        kept=now.kept,
        dropped=moved("dropped"),
        failed=moved("failed"),
    )


def _other_versions(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        f"{name} {now.get(name, 'none')} instead of {before.get(name, 'none')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _list_missing(
    kit: Kit, order: RebuildRequest, results: Mapping[tuple[str, int], Restored]
) -> str | None:
    """Put the lists of all parts together; None, and no list, where no image is missing."""
    address = join(order.manifests, f"{kit.manifest.name}.missing.jsonl")
    if not any(result.missing for result in results.values()):
        remove(address)
        return None
    with whole_file(address) as file:
        for part in kit.parts:
            if (part.source, part.part) in results:
                name = missing_name(part.part)
                file.write(read_bytes(join(_scratch(order, part.source), name)))
    return address


def _scratch(order: RebuildRequest, source: str) -> str:
    return join(order.out, "kit", source)
