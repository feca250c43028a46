"""Make a manifest from reports: the shards of a dataset, with one digest over all."""

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
from pmd_pipeline.contract.schemas import column
from pmd_pipeline.index.build import Index
from pmd_pipeline.recipe import Recipe

MANY = 10
"""Records with one image, from which on it may be a placeholder of removed images."""

_MAX_REPEATED = 20
"""Repeated images that a manifest lists."""

_DIGITS = 16
"""Hex digits of a SHA-256 by which images are compared: 64 bits."""


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

    It includes image codes if all shards have current codes by the same rules.

    Args:
        shards: folder of the shards.
        path: address of the manifest; shard paths are relative to it.
        limit: records to build; pairs beyond it count as dropped.
        planned: parts of the complete dataset.
        optout: digest of the opt-out list.
    """
    info = recipe.load_source().info
    built = {report.part for report in reports}
    missing = [part for part in planned if part not in built]
    rules = recipe.rules()
    ledgers = [join(shards, report.ledger.name) for report in reports if report.images]
    unique, repeated = count_unique_images(ledgers)
    entry = SourceEntry(
        licence=info.licence,
        citation=info.citation,
        counts=_source_counts(index, reports, missing),
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
        shards=[_shard_entry(report, shards, path) for report in reports if _num_rows(report)],
        versions=common_versions(report.versions for report in reports),
        missing={recipe.source: missing} if missing else {},
    )
    return with_codes(manifest, _current_codes(manifest, shards))


def merge_manifests(name: str, path: str, manifests: Sequence[tuple[str, Manifest]]) -> Manifest:
    """One manifest of several.

    It has image codes if all of them have codes by the same rules.

    Args:
        path: address of the merged manifest.
        manifests: with their addresses.

    Raises:
        PmdError: two of them have one source, or they have different kinds of samples.
    """
    entries: dict[str, SourceEntry] = {}
    shards: list[ShardEntry] = []
    missing: dict[str, list[int]] = {}
    codes = common_rules(manifest.codes for _, manifest in manifests)
    no_codes = {} if codes else {"codes_sha256": None, "views": None}
    for address, manifest in manifests:
        if twice := sorted(entries.keys() & manifest.sources.keys()):
            raise PmdError(f"{address}: {twice[0]} is already in another manifest; give each once")
        if manifest.kind != manifests[0][1].kind:
            raise PmdError(f"{address} holds {manifest.kind}, the first {manifests[0][1].kind}")
        entries |= manifest.sources
        missing |= manifest.missing
        shards += [
            shard.model_copy(
                update={"path": _relative_path(located(address, shard.path), path), **no_codes}
            )
            for shard in manifest.shards
        ]
    return sealed(
        Manifest(
            name=name,
            kind=manifests[0][1].kind,
            sources=dict(sorted(entries.items())),
            shards=sorted(shards, key=lambda shard: (shard.source, shard.part)),
            codes=codes,
            versions=common_versions(manifest.versions for _, manifest in manifests),
            missing=missing,
        )
    )


def repeated_images(manifest: Manifest) -> list[str]:
    """A warning for each source in which many records share one image."""
    warnings = []
    for name, entry in sorted(manifest.sources.items()):
        if entry.repeated:
            sha256, records = max(entry.repeated.items(), key=lambda item: item[1])
            warnings.append(
                f"{name}: {records:,} records share one picture; if it stands for removed ones, "
                f"give --optout a file with the line {sha256}"
            )
    return warnings


def count_unique_images(ledgers: Sequence[str]) -> tuple[int, dict[str, int]]:
    """Number of different images, and the records of each SHA-256 that many records share."""
    hashes = [
        np.array([int(one[:_DIGITS], 16) for one in _image_sha256s(ledger)], dtype=np.uint64)
        for ledger in ledgers
    ]
    unique, copies = count_equal(hashes)
    if not copies:
        return unique, {}
    sha256s = (one for ledger in ledgers for one in _image_sha256s(ledger))
    full = {one[:_DIGITS]: one for one in sha256s if one[:_DIGITS] in copies}
    return unique, {full[digits]: count for digits, count in copies.items()}


def count_equal(hashes: Sequence[NDArray[np.uint64]]) -> tuple[int, dict[str, int]]:
    """Number of different images, and the most repeated ones with their numbers of records.

    Args:
        hashes: the first 64 bits of the SHA-256 of each record's image, one array per shard; eight
            bytes a record are held in memory.

    Returns:
        The number of different images, and for those in `SourceEntry.repeated` the 16 hex digits
        and the number of records.
    """
    different, counts = np.unique(
        np.concatenate([np.empty(0, np.uint64), *hashes]), return_counts=True
    )
    many = np.flatnonzero(counts >= MANY)
    most = many[np.argsort(-counts[many], kind="stable")][:_MAX_REPEATED]
    return len(different), {
        f"{different[at]:0{_DIGITS}x}": int(counts[at]) for at in sorted(most.tolist())
    }


def total_words(histograms: Iterable[dict[int, int]]) -> dict[int, int]:
    """The sum of histograms of caption lengths."""
    words = Counter[int]()
    for histogram in histograms:
        words.update(histogram)
    return dict(sorted(words.items()))


def common_versions(given: Iterable[dict[str, str]]) -> dict[str, str]:
    """The library versions of all parts; several versions of one library are joined by "and"."""
    by_name: dict[str, set[str]] = {}
    for versions in given:
        for name, version in versions.items():
            by_name.setdefault(name, set()).update(version.split(" and "))
    return {name: " and ".join(sorted(all_)) for name, all_ in sorted(by_name.items())}


def _current_codes(manifest: Manifest, shards: str) -> Iterator[CodesReport]:
    """Reports of the image codes in the folder `shards` that belong to these very shards."""
    file_sizes = sizes(shards)
    for shard in manifest.shards:
        report = done_codes(join(shards, shard.path.rpartition("/")[2]), shard, file_sizes)
        if report:
            yield report


def _source_counts(index: Index, reports: Sequence[Report], missing: Sequence[int]) -> Counts:
    """All pairs of the source: dropped by the index, counted by a part, or in no part."""
    parts = Counts.total(report.counts for report in reports)
    dropped = Counter(index.counts.dropped) + Counter(parts.dropped)
    failed = Counter(parts.failed)
    pairs_of = {part.part: part.counts.kept for part in index.parts}
    failed["no_part"] = sum(pairs_of[part] for part in missing)
    dropped["limit"] = index.counts.kept - parts.pairs_in - failed["no_part"]
    return Counts(
        pairs_in=index.counts.pairs_in,
        kept=parts.kept,
        dropped={reason: count for reason, count in sorted(dropped.items()) if count},
        failed={reason: count for reason, count in sorted(failed.items()) if count},
    )


def _image_sha256s(ledger: str) -> list[str]:
    """SHA-256 of the fetched bytes of each image in a shard."""
    with open_read(ledger) as file:
        table = read_table(file, ["sha256", "status"], address=ledger)
    kept = table.filter(pc.equal(column(table, "status"), Status.SUCCESS))
    sha256s: list[str] = column(kept, "sha256").to_pylist()
    return sha256s


def _shard_entry(report: Report, shards: str, path: str) -> ShardEntry:
    return ShardEntry(
        source=report.source,
        part=report.part,
        path=_relative_path(join(shards, report.tar.name), path),
        sha256=report.tar.sha256,
        num_bytes=report.tar.num_bytes,
        ledger_sha256=report.ledger.sha256,
        records=_num_rows(report),
        images=report.images,
        pairs=report.sequences or report.counts.kept,
    )


def _num_rows(report: Report) -> int:
    """Rows of the shard's ledger; a shard of texts is its own ledger."""
    is_text = report.ledger == report.tar
    return report.sequences if is_text else report.records


def _relative_path(address: str, manifest_path: str) -> str:
    """`address` as written in a manifest at `manifest_path`."""
    path, manifest = local_path(address), local_path(manifest_path)
    if path is None or manifest is None:
        return address
    return Path(os.path.relpath(path, manifest.parent)).as_posix()
