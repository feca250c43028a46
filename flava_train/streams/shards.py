"""The shards that a manifest names: whether all are there, before a single step is taken."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from flava_train.errors import FlavaError
from flava_train.streams.files import located, read_bytes, size_of
from pmd_pipeline.format import FORMAT, Manifest


@dataclass(frozen=True)
class Stock:
    """What there is of one source."""

    source: str
    pairs: int
    images: int
    shards: int
    num_bytes: int


def load_manifest(path: str | Path) -> Manifest:
    """The manifest at a path or an address, unchanged since it was written.

    Raises:
        FlavaError: it is not there, is no manifest of this version, was changed, or lacks parts.
    """
    content = read_bytes(str(path))
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise FlavaError(f"{path} is no manifest of this version; build it again") from error
    if manifest.format != FORMAT:
        raise FlavaError(
            f"{path} is of format {manifest.format}, this version has {FORMAT}: build it again"
        )
    if manifest.digest != manifest.computed_digest():
        raise FlavaError(f"{path} was changed: its digest is not that of its content")
    if manifest.missing:
        source, parts = next(iter(manifest.missing.items()))
        raise FlavaError(f"{path} lacks {len(parts)} parts of {source}: run `pmd build` again")
    return manifest


def stock(path: str | Path) -> tuple[Manifest, list[Stock]]:
    """The manifest at `path` and what there is of each source, every shard being there.

    Sizes are compared, contents are not read.

    Raises:
        FlavaError: the manifest is not to be trusted, or a shard or ledger is missing or of
            another size.
    """
    manifest = load_manifest(path)
    found: dict[str, list[int]] = {}
    for shard in manifest.shards:
        tar = located(str(path), shard.path)
        if size_of(tar) != shard.num_bytes:
            raise FlavaError(f"{tar} is not the shard that {path} names: run `pmd build` again")
        if size_of(located(str(path), shard.ledger_path)) is None:
            raise FlavaError(f"{tar} has no ledger beside it: run `pmd build` again")
        counts = found.setdefault(shard.source, [0, 0, 0, 0])
        for place, more in enumerate((shard.pairs, shard.images, 1, shard.num_bytes)):
            counts[place] += more
    return manifest, [Stock(source, *counts) for source, counts in sorted(found.items())]
