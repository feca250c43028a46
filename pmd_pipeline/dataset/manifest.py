"""Reports become a manifest: which shards make a dataset, proved by one digest."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pmd_pipeline.base.storage import sizes
from pmd_pipeline.base.tables import read_table
from pmd_pipeline.codes.reports import common_rules, done_codes, with_codes
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, local_path, open_read
from pmd_pipeline.contract.manifest import located, sealed
from pmd_pipeline.contract.models import (
    CodesReport,
    Counts,
    Manifest,
    Report,
    ShardEntry,
    SourceEntry,
)
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.index.build import Index
from pmd_pipeline.recipe import Recipe

MANY = 10
"""Records that have the same picture, from which on it looks like one that stands for others."""

_MOST_REPEATED = 20
_DIGITS = 16


def source_manifest(
    recipe: Recipe,
    index: Index,
    reports: Sequence[Report],
    shards: str,
    path: str,
    limit: int | None,
    planned: Sequence[int],
    optout: str | None = None,
) -> Manifest:
    """The manifest of one source, from its index and the reports of its parts.

    It keeps the image codes that are there, if they are of these very shards, all by one rule.

    Args:
        shards: folder of the shards.
        path: where the manifest will lie; shard paths are relative to it.
        limit: records asked for; pairs beyond it count as dropped.
        planned: parts that the dataset is to have.
        optout: digest of the list of images to leave out.
    """
    info = recipe.load_source().info
    done = {report.part for report in reports}
    missing = [part for part in planned if part not in done]
    rules = recipe.rules()
    ledgers = [join(shards, report.ledger.name) for report in reports if report.images]
    unique, repeated = copies_in(ledgers)
    entry = SourceEntry(
        licence=info.licence,
        citation=info.citation,
        counts=_counts(index, reports, missing),
        images=sum(report.images for report in reports),
        unique_images=unique,
        repeated=repeated,
        tokens=sum(report.tokens for report in reports),
        words=total_words(report.words for report in reports),
        rules=rules,
        rules_sha256=digest(rules),
        upstream=index.upstream,
        leakage=index.leakage,
        limit=limit,
        optout=optout,
    )
    manifest = Manifest(
        name=recipe.source,
        kind=info.kind,
        sources={recipe.source: entry},
        shards=[_shard(report, shards, path) for report in reports if _rows(report)],
        versions=one_version(report.versions for report in reports),
        missing={recipe.source: missing} if missing else {},
    )
    return with_codes(manifest, _codes_there(manifest, shards))


def merge_manifests(name: str, path: str, manifests: Sequence[tuple[str, Manifest]]) -> Manifest:
    """One manifest of several, each given with where it lies; `path` is where this one will lie.

    It has image codes if all have them by one rule.

    Raises:
        PmdError: two of them have one source, or hold different kinds of samples.
    """
    entries: dict[str, SourceEntry] = {}
    shards: list[ShardEntry] = []
    missing: dict[str, list[int]] = {}
    codes = common_rules(manifest.codes for _, manifest in manifests)
    bare = {} if codes else {"codes_sha256": None, "views": None}
    for where, manifest in manifests:
        if twice := sorted(entries.keys() & manifest.sources.keys()):
            raise PmdError(f"{where}: {twice[0]} is already in another manifest; give each once")
        if manifest.kind != manifests[0][1].kind:
            raise PmdError(f"{where} holds {manifest.kind}, the first {manifests[0][1].kind}")
        entries |= manifest.sources
        missing |= manifest.missing
        shards += [
            shard.model_copy(update={"path": _relative(located(where, shard.path), path), **bare})
            for shard in manifest.shards
        ]
    return sealed(
        Manifest(
            name=name,
            kind=manifests[0][1].kind,
            sources=dict(sorted(entries.items())),
            shards=sorted(shards, key=lambda shard: (shard.source, shard.part)),
            codes=codes,
            versions=one_version(manifest.versions for _, manifest in manifests),
            missing=missing,
        )
    )


def repeated_images(manifest: Manifest) -> list[str]:
    """A sentence for the picture of each source that most records share, if many do."""
    found = []
    for name, entry in sorted(manifest.sources.items()):
        if entry.repeated:
            sha256, records = max(entry.repeated.items(), key=lambda item: item[1])
            found.append(
                f"{name}: {records:,} records share one picture; if it stands for removed ones, "
                f"give --optout a file with the line {sha256}"
            )
    return found


def copies_in(ledgers: Sequence[str]) -> tuple[int, dict[str, int]]:
    """Different images, and the sha256 of each that many records share with their number."""
    hashes = [
        np.array([int(one[:_DIGITS], 16) for one in _sha256s(ledger)], dtype=np.uint64)
        for ledger in ledgers
    ]
    unique, copies = same_bytes(hashes)
    if not copies:
        return unique, {}
    sha256s = (one for ledger in ledgers for one in _sha256s(ledger))
    whole = {one[:_DIGITS]: one for one in sha256s if one[:_DIGITS] in copies}
    return unique, {whole[first]: count for first, count in copies.items()}


def same_bytes(hashes: Sequence[NDArray[np.uint64]]) -> tuple[int, dict[str, int]]:
    """How many images differ, and which came as the same bytes for many records.

    Args:
        hashes: the first 64 bits of the sha256 of each record's image, shard by shard; eight
            bytes a record are held.

    Returns:
        The number of different ones, and for each of those with most records (see
        `SourceEntry.repeated`) its 16 hex digits and its records.
    """
    different, counts = np.unique(
        np.concatenate([np.empty(0, np.uint64), *hashes]), return_counts=True
    )
    many = np.flatnonzero(counts >= MANY)
    most = many[np.argsort(-counts[many], kind="stable")][:_MOST_REPEATED]
    return len(different), {
        f"{different[at]:0{_DIGITS}x}": int(counts[at]) for at in sorted(most.tolist())
    }


def total_words(histograms: Iterable[dict[int, int]]) -> dict[int, int]:
    """Captions by their number of words, over all parts."""
    words = Counter[int]()
    for histogram in histograms:
        words.update(histogram)
    return dict(sorted(words.items()))


def one_version(given: Iterable[dict[str, str]]) -> dict[str, str]:
    """The versions behind all parts; where parts differ, all of them, so that it shows."""
    found: dict[str, set[str]] = {}
    for versions in given:
        for name, version in versions.items():
            found.setdefault(name, set()).update(version.split(" and "))
    return {name: " and ".join(sorted(all_)) for name, all_ in sorted(found.items())}


def _codes_there(manifest: Manifest, shards: str) -> Iterator[CodesReport]:
    """Reports of the image codes that lie in the folder `shards` and hold."""
    there = sizes(shards)
    for shard in manifest.shards:
        report = done_codes(join(shards, shard.path.rpartition("/")[2]), shard, there)
        if report:
            yield report


def _counts(index: Index, reports: Sequence[Report], missing: Sequence[int]) -> Counts:
    """All pairs of the source: dropped by the index, seen by a part, or taken by no part."""
    parts = Counts.total(report.counts for report in reports)
    dropped = Counter(index.counts.dropped) + Counter(parts.dropped)
    failed = Counter(parts.failed)
    absent = {part.part: part.counts.kept for part in index.parts}
    failed["no_part"] = sum(absent[part] for part in missing)
    dropped["limit"] = index.counts.kept - parts.pairs_in - failed["no_part"]
    return Counts(
        pairs_in=index.counts.pairs_in,
        kept=parts.kept,
        dropped={reason: count for reason, count in sorted(dropped.items()) if count},
        failed={reason: count for reason, count in sorted(failed.items()) if count},
    )


def _sha256s(ledger: str) -> list[str]:
    """Of the images in a shard."""
    with open_read(ledger) as file:
        table = read_table(file, ["sha256", "status"], address=ledger)
    found: list[str] = table.filter(pc.equal(table["status"], Status.SUCCESS))["sha256"].to_pylist()
    return found


def _shard(report: Report, shards: str, path: str) -> ShardEntry:
    return ShardEntry(
        source=report.source,
        part=report.part,
        path=_relative(join(shards, report.tar.name), path),
        sha256=report.tar.sha256,
        num_bytes=report.tar.num_bytes,
        ledger_sha256=report.ledger.sha256,
        records=_rows(report),
        images=report.images,
        pairs=report.sequences or report.counts.kept,
    )


def _rows(report: Report) -> int:
    """Rows of the shard's ledger, which a shard of texts is itself."""
    is_text = report.ledger == report.tar
    return report.sequences if is_text else report.records


def _relative(address: str, manifest_path: str) -> str:
    """`address` as a manifest at `manifest_path` calls it."""
    here, there = local_path(address), local_path(manifest_path)
    if here is None or there is None:
        return address
    return Path(os.path.relpath(here, there.parent)).as_posix()
