"""What a run is given to learn from: where it is, and that it fits model and objective."""

from dataclasses import dataclass
from pathlib import Path

from flava_train.data.config import DataConfig
from flava_train.data.file_cache import FileCache
from flava_train.data.manifests import load_complete_manifest
from flava_train.data.needs import DataNeeds, StreamShares
from flava_train.data.order import STREAMS, SampleOrder
from flava_train.data.shard_stream import ShardLocation, ShardStream
from flava_train.data.wordpiece import WordPiece, load_wordpiece
from flava_train.model.flava import FlavaConfig
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import is_local
from pmd_pipeline.contract.models import Manifest

_KINDS = {"pairs": "pairs", "images": "images", "texts": "text"}
"""What a manifest must hold, by stream."""


@dataclass(frozen=True)
class DataStreams:
    """All that is given, found to fit.

    Args:
        shares: probability of each stream.
        wordpiece: the tokenizer.
        corpora: by stream, of those with a share.
        digests: the versions of all data: of the manifests, by stream, and of the tokenizer.
    """

    shares: StreamShares
    wordpiece: WordPiece
    corpora: dict[str, ShardStream]
    digests: dict[str, str]


def open_streams(
    config: DataConfig, needs: DataNeeds, model: FlavaConfig, *, seed: int, batch: int
) -> DataStreams:
    """What `config` names; no shard is read yet.

    Raises:
        PmdError: data is missing, or does not fit the model or the objective.
    """
    shares = _shares(config, needs.shares)
    digests, corpora = dict[str, str](), dict[str, ShardStream]()
    for stream in STREAMS:
        if getattr(shares, stream):
            fits = model if stream in needs.codes else None
            places, digests[stream] = _places(config, stream, fits)
            corpora[stream] = _corpus(config, places, stream, seed=seed, batch=batch)
    if not config.tokenizer:
        raise PmdError(
            "data.tokenizer names no tokenizer: `pmd tokenizer` makes a vocab.txt for a dataset"
        )
    wordpiece = load_wordpiece(config.tokenizer, config.revision)  # last: the hub may be slow
    _check_text(config, model, wordpiece)
    return DataStreams(shares, wordpiece, corpora, digests | {"tokenizer": wordpiece.sha256})


def _places(
    config: DataConfig, stream: str, model: FlavaConfig | None
) -> tuple[list[ShardLocation], str]:
    """All shards of a stream, and the digest of its manifests."""
    places: list[ShardLocation] = []
    digests = []
    for address in config.manifests(stream):
        manifest = load_complete_manifest(address)
        _check_manifest(address, manifest, stream, model)
        codes = manifest.codes if _has_codes(manifest) else None
        places += [
            ShardLocation(address, entry, codes, captioned=stream == "pairs")
            for entry in manifest.shards
            if entry.pairs
        ]
        digests.append(manifest.digest)
    return places, "+".join(digests)


def _corpus(
    config: DataConfig, places: list[ShardLocation], stream: str, *, seed: int, batch: int
) -> ShardStream:
    sizes = tuple(place.entry.pairs for place in places)
    if sum(sizes) < batch:
        raise PmdError(
            f"{' and '.join(config.manifests(stream))}: {sum(sizes):,} {stream} are fewer than "
            f"one batch of {batch:,}; lower `batch`"
        )
    order = SampleOrder(sizes, batch, seed, STREAMS.index(stream), config.window_shards)
    away = [place for place in places if "://" in place.name and not is_local(place.name)]
    if away:
        num_bytes = sum(place.entry.num_bytes for place in away)
        _check_cache(config, away[0].name, num_bytes / order.windows * min(2, order.windows))
    files = FileCache(
        Path(config.cache) if config.cache else None,
        int(config.cache_gib * 2**30),
        verify=config.verify,
    )
    return ShardStream(places, order, files)


def _shares(config: DataConfig, wanted: StreamShares) -> StreamShares:
    """The shares of the streams that there is data for."""
    shares = {stream: getattr(wanted, stream) for stream in STREAMS}
    for stream, share in shares.items():
        if share and not config.manifests(stream):
            if not config.renormalise:
                raise PmdError(
                    f"the objective takes {share:.0%} of its steps from {stream}, and "
                    f"data.{stream} names no manifest: name one, or set data.renormalise = true to "
                    "share these steps among the others"
                )
            shares[stream] = 0.0
    total = sum(shares.values())
    if not total:
        raise PmdError("no stream has both a share of the steps and a manifest: set data.pairs")
    return StreamShares(**{stream: share / total for stream, share in shares.items()})


def _check_text(config: DataConfig, model: FlavaConfig, wordpiece: WordPiece) -> None:
    num_pieces = len(wordpiece.vocabulary)
    if num_pieces > model.text_vocab:
        raise PmdError(
            f"{config.tokenizer} has {num_pieces:,} pieces and the model room for "
            f"{model.text_vocab:,}: set model.text_vocab"
        )
    for name in ("caption_tokens", "text_tokens"):
        most = getattr(config, name)
        if not 3 <= most <= model.text_positions and (name == "caption_tokens" or config.texts):
            raise PmdError(
                f"data.{name} is {most}, and the model takes 3 to {model.text_positions} tokens"
            )


def _check_manifest(
    address: str, manifest: Manifest, stream: str, model: FlavaConfig | None
) -> None:
    """Refuse a manifest of another kind; with a model, also one whose codes do not fit it."""
    if manifest.kind != _KINDS[stream]:
        raise PmdError(f"{address} holds {manifest.kind}, and data.{stream} needs other data")
    if model is None:
        return
    rules = manifest.codes
    if rules is None or not _has_codes(manifest):
        raise PmdError(
            f"{address} has no image codes, which the objective needs: run `pmd codes {address}`"
        )
    if rules.grid != model.grid:
        raise PmdError(
            f"{address} has {rules.grid} x {rules.grid} codes an image, and the model "
            f"{model.grid} x {model.grid} patches: run `pmd codes` with another grid, or set "
            "model.patch_size"
        )
    if rules.vocabulary > model.image_vocab:
        raise PmdError(
            f"{address} has codes up to {rules.vocabulary - 1:,}, and the model room for "
            f"{model.image_vocab:,}: set model.image_vocab"
        )


def _has_codes(manifest: Manifest) -> bool:
    return manifest.codes is not None and all(one.codes_sha256 for one in manifest.shards)


def _check_cache(config: DataConfig, address: str, needed: float) -> None:
    """Refuse at once what would copy the same shards over and over."""
    if config.cache is None:
        raise PmdError(f"{address} is not on this machine: set data.cache to a folder for copies")
    if needed > config.cache_gib * 2**30:
        raise PmdError(
            f"two windows of shards have {needed / 2**30:.1f} GiB, and the cache "
            f"{config.cache_gib:g}: raise data.cache_gib, or lower data.window_shards"
        )
