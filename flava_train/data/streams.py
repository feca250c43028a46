"""The streams of a run, opened and checked against the model and the objective."""

from dataclasses import dataclass

from flava_train.data.config import DataConfig
from flava_train.data.manifests import load_complete_manifest
from flava_train.data.needs import DataNeeds, StreamShares
from flava_train.data.order import STREAMS, SampleOrder
from flava_train.data.shard_readers import ShardLocation
from flava_train.data.shard_stream import ShardStream
from flava_train.data.wordpiece import WordPiece, load_wordpiece
from flava_train.model.flava import FlavaConfig
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import is_local
from pmd_pipeline.contract.models import Manifest

_KINDS = {"pairs": "pairs", "images": "images", "texts": "text"}
"""The kind of manifest that each stream needs."""


@dataclass(frozen=True)
class DataStreams:
    """All data of a run.

    Args:
        shares: probability of each stream.
        wordpiece: the tokenizer.
        streams: by name, of those with a share.
        digests: the versions of all data: of the manifests, by stream, and of the tokenizer.
    """

    shares: StreamShares
    wordpiece: WordPiece
    streams: dict[str, ShardStream]
    digests: dict[str, str]


def open_streams(
    config: DataConfig, needs: DataNeeds, model: FlavaConfig, *, seed: int, batch: int
) -> DataStreams:
    """The data that `config` names; manifests and the tokenizer are read, shards are not.

    Raises:
        PmdError: data is missing, or does not fit the model or the objective.
    """
    shares = _available_shares(config, needs.shares)
    digests, streams = dict[str, str](), dict[str, ShardStream]()
    for name in STREAMS:
        if getattr(shares, name):
            predicted = model if name in needs.codes else None
            locations, digests[name] = _shard_locations(config, name, predicted)
            streams[name] = _shard_stream(config, locations, name, seed=seed, batch=batch)
    if not config.tokenizer:
        raise PmdError("data.tokenizer is not set: `pmd tokenizer` makes a vocab.txt for a dataset")
    # after the manifests, since the hub may be slow
    wordpiece = load_wordpiece(config.tokenizer, config.revision)
    _check_tokenizer(config, model, wordpiece)
    return DataStreams(shares, wordpiece, streams, digests | {"tokenizer": wordpiece.sha256})


def _available_shares(config: DataConfig, requested: StreamShares) -> StreamShares:
    """The requested shares, limited to streams that have a manifest."""
    shares = {stream: getattr(requested, stream) for stream in STREAMS}
    for stream, share in shares.items():
        if share and not config.manifests(stream):
            if not config.renormalise:
                raise PmdError(
                    f"the objective takes {share:.0%} of its steps from {stream}, but "
                    f"data.{stream} names no manifest: name one, or set data.renormalise = true to "
                    "share these steps among the other streams"
                )
            shares[stream] = 0.0
    total = sum(shares.values())
    if not total:
        raise PmdError("no stream has both a share of the steps and a manifest: set data.pairs")
    return StreamShares(**{stream: share / total for stream, share in shares.items()})


def _shard_locations(
    config: DataConfig, stream: str, model: FlavaConfig | None
) -> tuple[list[ShardLocation], str]:
    """All shards of a stream, and the digest of its manifests."""
    locations: list[ShardLocation] = []
    digests = []
    for address in config.manifests(stream):
        manifest = load_complete_manifest(address)
        _check_kind_and_codes(address, manifest, stream, model)
        rules = manifest.codes if _has_codes(manifest) else None
        locations += [
            ShardLocation(address, entry, rules, captioned=stream == "pairs")
            for entry in manifest.shards
            if entry.pairs
        ]
        digests.append(manifest.digest)
    return locations, "+".join(digests)


def _shard_stream(
    config: DataConfig, locations: list[ShardLocation], stream: str, *, seed: int, batch: int
) -> ShardStream:
    sizes = tuple(location.entry.pairs for location in locations)
    if sum(sizes) < batch:
        raise PmdError(
            f"{' and '.join(config.manifests(stream))}: {sum(sizes):,} {stream} are fewer than "
            f"one batch of {batch:,}; lower `batch`"
        )
    order = SampleOrder(sizes, batch, seed, STREAMS.index(stream), config.window_shards)
    remote = [one for one in locations if "://" in one.address and not is_local(one.address)]
    if remote:
        num_bytes = sum(location.entry.num_bytes for location in remote)
        _check_cache(config, remote[0].address, num_bytes / order.windows * min(2, order.windows))
    return ShardStream(locations, order, config.file_cache())


def _check_kind_and_codes(
    address: str, manifest: Manifest, stream: str, model: FlavaConfig | None
) -> None:
    """Check the kind of a manifest; with a model, also that it can predict the image codes."""
    if manifest.kind != _KINDS[stream]:
        raise PmdError(
            f"{address} holds {manifest.kind}, but data.{stream} needs a manifest of "
            f"{_KINDS[stream]}"
        )
    if model is None:
        return
    rules = manifest.codes
    if rules is None or not _has_codes(manifest):
        raise PmdError(
            f"{address} has no image codes, which the objective needs: run `pmd codes {address}`"
        )
    if rules.grid != model.grid:
        raise PmdError(
            f"{address} has {rules.grid} x {rules.grid} codes per image, but the model "
            f"{model.grid} x {model.grid} patches: run `pmd codes` with another grid, or set "
            "model.patch_size"
        )
    if rules.vocabulary > model.image_vocab:
        raise PmdError(
            f"{address} has codes up to {rules.vocabulary - 1:,}, but the model predicts only "
            f"{model.image_vocab:,}: set model.image_vocab"
        )


def _has_codes(manifest: Manifest) -> bool:
    return manifest.codes is not None and all(one.codes_sha256 for one in manifest.shards)


def _check_cache(config: DataConfig, address: str, num_bytes: float) -> None:
    """Refuse a cache that cannot hold the `num_bytes` in use: shards would be copied repeatedly."""
    if config.cache is None:
        raise PmdError(f"{address} is not on this machine: set data.cache to a folder for copies")
    if num_bytes > config.cache_gib * 2**30:
        raise PmdError(
            f"two windows of shards have {num_bytes / 2**30:.1f} GiB, but the cache only "
            f"{config.cache_gib:g}: raise data.cache_gib, or lower data.window_shards"
        )


def _check_tokenizer(config: DataConfig, model: FlavaConfig, wordpiece: WordPiece) -> None:
    num_tokens = len(wordpiece.vocabulary)
    if num_tokens > model.text_vocab:
        raise PmdError(
            f"{config.tokenizer} has {num_tokens:,} tokens, but the model only "
            f"{model.text_vocab:,}: set model.text_vocab"
        )
    for name in ("caption_tokens", "text_tokens"):
        length = getattr(config, name)
        is_used = name == "caption_tokens" or config.texts
        if is_used and not 3 <= length <= model.text_positions:
            raise PmdError(
                f"data.{name} is {length}, but the model takes 3 to {model.text_positions} tokens"
            )
