"""What a run is given to learn from: where it is, and that it fits model and objective."""

from dataclasses import dataclass
from pathlib import Path

from flava_train.data.corpus import Corpus, Place
from flava_train.data.files import Files
from flava_train.data.needs import DataNeeds, Shares
from flava_train.data.order import STREAMS, Order
from flava_train.data.shards import load_complete_manifest
from flava_train.data.wordpiece import WordPiece, load_wordpiece
from flava_train.model.flava import FlavaConfig
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import is_local
from pmd_pipeline.contract.models import Manifest

_KINDS = {"pairs": "pairs", "images": "images", "texts": "text"}
"""What a manifest must hold, by stream."""


@dataclass(frozen=True)
class DataConfig:
    """Where the data is, and how it is read.

    Args:
        pairs: manifest of pairs; a path, or an address such as `s3://pmd/manifests/pmd.json`.
        images: manifest of images without captions.
        texts: manifests of texts; more than one are mixed as they are large.
        tokenizer: a `vocab.txt`, a `tokenizer.json`, a folder with either, or an id on the hub.
        revision: the commit on the hub.
        caption_tokens: most tokens of a caption, `[CLS]` and `[SEP]` included.
        text_tokens: the same of a text.
        window_shards: about how many shards are read from at a time.
        cache: folder for copies of shards that are not on this machine.
        cache_gib: of all copies; the least recently used give way.
        workers: processes that load, for each rank.
        verify: compare the sha256 of each shard before it is used.
        renormalise: where a stream has no manifest, share its steps among the others.
    """

    pairs: str | None = None
    images: str | None = None
    texts: tuple[str, ...] = ()
    tokenizer: str = ""
    revision: str | None = None
    caption_tokens: int = 77
    text_tokens: int = 512
    window_shards: int = 16
    cache: str | None = None
    cache_gib: float = 200.0
    workers: int = 2
    verify: bool = True
    renormalise: bool = False

    def manifests(self, stream: str) -> tuple[str, ...]:
        """Addresses of a stream's manifests."""
        if stream == "texts":
            return self.texts
        address = self.pairs if stream == "pairs" else self.images
        return (address,) if address else ()


@dataclass(frozen=True)
class Inputs:
    """All that is given, found to fit.

    Args:
        shares: probability of each stream.
        wordpiece: the tokenizer.
        corpora: by stream, of those with a share.
        digests: the versions of all data: of the manifests, by stream, and of the tokenizer.
    """

    shares: Shares
    wordpiece: WordPiece
    corpora: dict[str, Corpus]
    digests: dict[str, str]


def open_inputs(
    config: DataConfig, needs: DataNeeds, model: FlavaConfig, *, seed: int, batch: int
) -> Inputs:
    """What `config` names; no shard is read yet.

    Raises:
        PmdError: data is missing, or does not fit the model or the objective.
    """
    shares = _shares(config, needs.shares)
    digests, corpora = dict[str, str](), dict[str, Corpus]()
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
    return Inputs(shares, wordpiece, corpora, digests | {"tokenizer": wordpiece.sha256})


def _places(config: DataConfig, stream: str, model: FlavaConfig | None) -> tuple[list[Place], str]:
    """All shards of a stream, and the digest of its manifests."""
    places: list[Place] = []
    digests = []
    for address in config.manifests(stream):
        manifest = load_complete_manifest(address)
        _check_manifest(address, manifest, stream, model)
        codes = manifest.codes if _has_codes(manifest) else None
        places += [
            Place(address, entry, codes, captioned=stream == "pairs")
            for entry in manifest.shards
            if entry.pairs
        ]
        digests.append(manifest.digest)
    return places, "+".join(digests)


def _corpus(
    config: DataConfig, places: list[Place], stream: str, *, seed: int, batch: int
) -> Corpus:
    sizes = tuple(place.entry.pairs for place in places)
    if sum(sizes) < batch:
        raise PmdError(
            f"{' and '.join(config.manifests(stream))}: {sum(sizes):,} {stream} are fewer than "
            f"one batch of {batch:,}; lower `batch`"
        )
    order = Order(sizes, batch, seed, STREAMS.index(stream), config.window_shards)
    away = [place for place in places if "://" in place.name and not is_local(place.name)]
    if away:
        num_bytes = sum(place.entry.num_bytes for place in away)
        _check_cache(config, away[0].name, num_bytes / order.windows * min(2, order.windows))
    files = Files(
        Path(config.cache) if config.cache else None,
        int(config.cache_gib * 2**30),
        verify=config.verify,
    )
    return Corpus(places, order, files)


def _shares(config: DataConfig, wanted: Shares) -> Shares:
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
    return Shares(**{stream: share / total for stream, share in shares.items()})


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
