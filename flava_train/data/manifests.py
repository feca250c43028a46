"""Manifests as the trainer needs them: no part missing, every shard in its place."""

from dataclasses import dataclass
from pathlib import Path

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import size_of
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.contract.models import Manifest, ShardEntry


@dataclass(frozen=True)
class SourceSummary:
    """Totals over the shards of one source."""

    source: str
    pairs: int
    images: int
    shards: int
    num_bytes: int


def load_complete_manifest(path: str | Path) -> Manifest:
    """The manifest at a path or an address.

    Raises:
        PmdError: as for `load_manifest`, or parts are missing.
    """
    manifest = load_manifest(str(path))
    if manifest.missing:
        source, parts = next(iter(manifest.missing.items()))
        raise PmdError(f"{path} lacks {len(parts)} parts of {source}: run `pmd build` again")
    return manifest


def check_manifest(path: str | Path) -> tuple[Manifest, list[SourceSummary]]:
    """The manifest at `path` and totals by source, after a check that every shard exists.

    Sizes are compared; contents are not read.

    Raises:
        PmdError: as for `load_complete_manifest`, or a shard or ledger is missing, or a shard has
            another size.
    """
    manifest = load_complete_manifest(path)
    shards: dict[str, list[ShardEntry]] = {}
    for shard in manifest.shards:
        tar = located(str(path), shard.path)
        if size_of(tar) != shard.num_bytes:
            raise PmdError(f"{tar} is not the shard that {path} names: run `pmd build` again")
        if size_of(located(str(path), shard.ledger_path)) is None:
            raise PmdError(f"{tar} has no ledger beside it: run `pmd build` again")
        shards.setdefault(shard.source, []).append(shard)
    return manifest, [
        SourceSummary(
            source,
            pairs=sum(shard.pairs for shard in shards[source]),
            images=sum(shard.images for shard in shards[source]),
            shards=len(shards[source]),
            num_bytes=sum(shard.num_bytes for shard in shards[source]),
        )
        for source in sorted(shards)
    ]
