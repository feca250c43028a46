"""The shards that a manifest names: whether all are there, before a single step is taken."""

from dataclasses import dataclass
from pathlib import Path

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import size_of
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.contract.models import Manifest


@dataclass(frozen=True)
class SourceSummary:
    """What there is of one source."""

    source: str
    pairs: int
    images: int
    shards: int
    num_bytes: int


def load_complete_manifest(path: str | Path) -> Manifest:
    """The manifest at a path or an address, if no part is missing.

    Raises:
        PmdError: it cannot be trusted, see `load_manifest`, or lacks parts.
    """
    manifest = load_manifest(str(path))
    if manifest.missing:
        source, parts = next(iter(manifest.missing.items()))
        raise PmdError(f"{path} lacks {len(parts)} parts of {source}: run `pmd build` again")
    return manifest


def check_manifest(path: str | Path) -> tuple[Manifest, list[SourceSummary]]:
    """The manifest at `path` and what there is of each source, every shard being there.

    Sizes are compared, contents are not read.

    Raises:
        PmdError: the manifest is not to be trusted, or a shard or ledger is missing or of
            another size.
    """
    manifest = load_complete_manifest(path)
    found: dict[str, list[int]] = {}
    for shard in manifest.shards:
        tar = located(str(path), shard.path)
        if size_of(tar) != shard.num_bytes:
            raise PmdError(f"{tar} is not the shard that {path} names: run `pmd build` again")
        if size_of(located(str(path), shard.ledger_path)) is None:
            raise PmdError(f"{tar} has no ledger beside it: run `pmd build` again")
        counts = found.setdefault(shard.source, [0, 0, 0, 0])
        for place, more in enumerate((shard.pairs, shard.images, 1, shard.num_bytes)):
            counts[place] += more
    return manifest, [SourceSummary(source, *counts) for source, counts in sorted(found.items())]
