"""Rows of batches: any slots of any step's global batch, as a pure function.

What a step sees depends on the seed, the step and the data alone. So batches are bit-equal for
any number of workers and ranks, and after any resume.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flava_train.batches import Images, Pairs, Texts
from flava_train.codes import same_box
from flava_train.corpus import Corpus, OpenShard, OpenWindow, Place
from flava_train.errors import FlavaError
from flava_train.files import Files, is_local
from flava_train.ledgers import Box
from flava_train.losses import Objective, Shares
from flava_train.masking import (
    PatchMasking,
    TokenMasking,
    chance,
    fixed_width,
    mask_patches,
    mask_tokens,
    token_mask_width,
    word_starts,
)
from flava_train.model import FlavaConfig
from flava_train.order import STREAMS, Order, Turns, draw
from flava_train.pixels import view
from flava_train.shapes import Array, Int, UInt
from flava_train.shards import load_manifest
from flava_train.text import WordPiece, load_wordpiece
from pmd_pipeline.format import Manifest

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
"""The box of a whole image."""

_KINDS = {"pairs": "pairs", "images": "images", "texts": "text"}
"""What a manifest must hold, by stream."""

_ATTEMPTS = 8
"""Captions drawn as a mismatch before the pair is left as it is."""

_AT_ONCE = 256
"""Slots for which shards are kept open together."""


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
class Row:
    """What one slot of a batch holds, for people to read.

    Args:
        key: of the record; of a text, its shard and row.
        source: where it comes from.
        shard: address of the shard.
        text: the caption, or the text; none of an image without captions.
        view: number of the view of the image.
        matched: false if the caption is another image's.
    """

    key: str
    source: str
    shard: str
    text: str | None
    view: int | None = None
    matched: bool = True


@dataclass(frozen=True)
class Part:
    """Some slots of a global batch, with the key of each."""

    rows: Pairs | Images | Texts
    keys: list[str]


@dataclass(frozen=True)
class _Slots:
    """Slots of one step's batch: pairs of the window, and the sample numbers to draw by."""

    stream: str
    corpus: Corpus
    window: OpenWindow
    pairs: Int[Array, " b"]
    numbers: Int[Array, " b"]


@dataclass(frozen=True)
class _Chosen:
    """What was chosen for one slot; the pixels are still in the shard."""

    shard: OpenShard
    sample: int
    view: int
    box: Box
    captions: list[str]
    nth: int


class Streams:
    """All that a run learns from.

    Args:
        config: where the data is.
        objective: which losses count, which decides what of the data is needed.
        model: sizes of images, grids and vocabularies.
        seed: of the run.
        batch: rows of the global batch.

    Attributes:
        shares: probability of each stream.
        digests: of the manifests, by stream, and of the tokenizer: the versions of all data.
        wordpiece: the tokenizer.
        batch: as given.

    Raises:
        FlavaError: data is missing, or does not fit the model or the objective.
    """

    def __init__(
        self,
        config: DataConfig,
        objective: Objective,
        model: FlavaConfig,
        *,
        seed: int,
        batch: int,
    ) -> None:
        self.config, self.objective, self.model = config, objective, model
        self.seed, self.batch = seed, batch
        self.shares = _shares(config, objective.streams)
        if not config.tokenizer:
            raise FlavaError(
                "data.tokenizer names no tokenizer: `pmd tokenizer` makes a vocab.txt for a dataset"
            )
        self.wordpiece = load_wordpiece(config.tokenizer, config.revision)
        _check_text(config, model, self.wordpiece)
        self.digests = {"tokenizer": self.wordpiece.sha256}
        self._turns = Turns(seed, astuple(self.shares))
        self._files = Files(
            Path(config.cache) if config.cache else None,
            int(config.cache_gib * 2**30),
            verify=config.verify,
        )
        self._corpora = {
            stream: self._corpus(stream) for stream in STREAMS if getattr(self.shares, stream)
        }
        self._patches = patch_masking(model.grid)
        self._tokens = TokenMasking(
            len(self.wordpiece.vocabulary), self.wordpiece.mask, self.wordpiece.specials
        )
        self._starts = word_starts(self.wordpiece.vocabulary)

    def stream(self, step: int) -> str:
        """The stream that the whole batch of `step` comes from: `pairs`, `images` or `texts`."""
        return self._turns.stream(step)

    def rows(self, step: int) -> list[Row]:
        """What every slot of the global batch of `step` holds; no pixels are read."""
        return [
            row
            for start in range(0, self.batch, _AT_ONCE)
            for row in self._rows(self._slots(step, range(self.batch)[start : start + _AT_ONCE]))
        ]

    def part(self, step: int, slots: range) -> Part:
        """The given slots of the global batch of `step`, in host memory."""
        here = self._slots(step, slots)
        if here.stream == "texts":
            return self._texts(here)
        chosen = self._choose(here)
        images = self._images(here, chosen)
        keys = [one.shard.key(one.sample) for one in chosen]
        if here.stream == "images":
            return Part(images, keys)
        texts, matched = self._captions(here, chosen)
        tokens, lengths = self.wordpiece.encode(texts, self.config.caption_tokens)
        hides = self.objective.fuses
        masked = self._masked(tokens, lengths, here.numbers, hides=hides, whole_words=True)
        image_ids = np.array([one.shard.ledger.images[one.sample] for one in chosen])
        pairs = Pairs(
            images,
            masked,
            torch.from_numpy(matched),
            torch.from_numpy(image_ids.view(np.int64)),
            torch.from_numpy(chance(self.seed, here.numbers)),
        )
        return Part(pairs, keys)

    def look_ahead(self) -> None:
        """Open windows in the background before they are needed; for processes that never fork."""
        for corpus in self._corpora.values():
            corpus.ahead = True

    def _corpus(self, stream: str) -> Corpus:
        places: list[Place] = []
        needs_codes = _needs_codes(self.objective, stream)
        digests = []
        for address in self.config.manifests(stream):
            manifest = load_manifest(address)
            _check_manifest(address, manifest, stream, self.model if needs_codes else None)
            codes = manifest.codes if stream != "texts" else None
            places += [
                Place(address, entry, codes, captioned=stream == "pairs")
                for entry in manifest.shards
                if entry.pairs
            ]
            digests.append(manifest.digest)
        self.digests[stream] = "+".join(digests)
        sizes = tuple(place.entry.pairs for place in places)
        if sum(sizes) < self.batch:
            raise FlavaError(
                f"{' and '.join(self.config.manifests(stream))}: {sum(sizes):,} {stream} are "
                f"fewer than one batch of {self.batch:,}; lower `batch`"
            )
        order = Order(
            sizes, self.batch, self.seed, STREAMS.index(stream), self.config.window_shards
        )
        if not is_local(places[0].name):
            num_bytes = sum(place.entry.num_bytes for place in places)
            self._check_cache(places[0].name, num_bytes / order.windows * min(2, order.windows))
        return Corpus(places, order, self._files)

    def _check_cache(self, address: str, needed: float) -> None:
        """Refuse at once what would copy the same shards over and over."""
        if self.config.cache is None:
            raise FlavaError(
                f"{address} is not on this machine: set data.cache to a folder for copies"
            )
        if needed > self._files.max_bytes:
            raise FlavaError(
                f"two windows of shards have {needed / 2**30:.1f} GiB, and the cache "
                f"{self.config.cache_gib:g}: raise data.cache_gib, or lower data.window_shards"
            )

    def _slots(self, step: int, slots: range) -> _Slots:
        stream = self.stream(step)
        corpus = self._corpora[stream]
        window, pairs = corpus.batch(self._turns.before(step))
        here = np.array(slots, np.int64)
        return _Slots(stream, corpus, window, pairs[here], step * self.batch + here)

    def _rows(self, slots: _Slots) -> list[Row]:
        places = slots.corpus.places
        shards = slots.window.locate(slots.pairs)[0].tolist()
        if slots.stream == "texts":
            texts, keys = self._read_texts(slots)
            columns = zip(shards, keys, texts, strict=True)
            return [
                Row(key, places[shard].entry.source, places[shard].name, text)
                for shard, key, text in columns
            ]
        chosen = self._choose(slots)
        captions: Sequence[str | None] = [None] * len(chosen)
        matched = np.ones(len(chosen), bool)
        if slots.stream == "pairs":
            captions, matched = self._captions(slots, chosen)
        return [
            Row(one.shard.key(one.sample), places[shard].entry.source, one.shard.name, text,
                one.view, fits)
            for shard, one, text, fits in zip(
                shards, chosen, captions, matched.tolist(), strict=True
            )
        ]  # fmt: skip

    def _choose(self, slots: _Slots) -> list[_Chosen]:
        """A view for each slot."""
        dice = draw(self.seed, "view", slots.numbers)
        columns = (column.tolist() for column in (*slots.window.locate(slots.pairs), dice))
        return [
            _chosen(slots.corpus.shard(shard, slots.window), sample, nth, die)
            for shard, sample, nth, die in zip(*columns, strict=True)
        ]

    def _images(self, slots: _Slots, chosen: Sequence[_Chosen]) -> Images:
        size, grid = self.model.image_size, self.model.grid
        pixels = np.empty((len(chosen), 3, size, size), np.uint8)
        codes = np.zeros((len(chosen), grid**2), np.int64)
        needs_codes = _needs_codes(self.objective, slots.stream)
        for slot, one in enumerate(chosen):
            pixels[slot] = pixels_of(one.shard, one.sample, one.box, size)
            if needs_codes and one.shard.views:
                codes[slot] = one.shard.views.of(one.sample, one.view)
        masked_at, wanted = codes[:, :0], codes[:, :0]
        if slots.stream == "images" or self.objective.fuses:
            mask = mask_patches(self.seed, slots.numbers, self._patches)
            masked_at, wanted = fixed_width(mask, codes, self._patches.masked)
        return Images(
            torch.from_numpy(pixels), torch.from_numpy(masked_at), torch.from_numpy(wanted)
        )

    def _captions(self, slots: _Slots, chosen: Sequence[_Chosen]) -> tuple[list[str], Array]:
        """The caption of each slot, of some another image's; and which are the image's own."""
        texts = [one.captions[one.nth] for one in chosen]
        matched = np.ones(len(chosen), bool)
        objective = self.objective
        if not objective.itm or objective.itm_negatives != "dataset":
            return texts, matched
        swapped = chance(self.seed, slots.numbers)[:, 0] < objective.itm_rate
        for slot in np.flatnonzero(swapped).tolist():
            other = self._other_caption(slots, slot, chosen[slot])
            if other is not None:
                texts[slot], matched[slot] = other, False
        return texts, matched

    def _other_caption(self, slots: _Slots, slot: int, one: _Chosen) -> str | None:
        """A caption of the window that is not the image's, nor reads like any that is."""
        attempts = slots.numbers[slot] * _ATTEMPTS + np.arange(_ATTEMPTS)
        drawn = draw(self.seed, "swap", attempts) % np.uint64(slots.window.pairs)
        image = one.shard.ledger.images[one.sample]
        own = [self.wordpiece.pieces(caption) for caption in one.captions]
        columns = (column.tolist() for column in slots.window.locate(drawn.astype(np.int64)))
        for shard, sample, nth in zip(*columns, strict=True):
            opened = slots.corpus.shard(shard, slots.window)
            if opened.ledger.images[sample] == image:
                continue
            other: str = opened.record(sample).captions[nth]
            if self.wordpiece.pieces(other) not in own:
                return other
        return None

    def _texts(self, slots: _Slots) -> Part:
        texts, keys = self._read_texts(slots)
        tokens, lengths = self.wordpiece.encode_documents(texts, self.config.text_tokens)
        masked = self._masked(tokens, lengths, slots.numbers, hides=True, whole_words=False)
        return Part(masked, keys)

    def _read_texts(self, slots: _Slots) -> tuple[list[str], list[str]]:
        """The text of each slot, and its key."""
        shards, rows, _ = slots.window.locate(slots.pairs)
        texts, keys = [""] * len(rows), [""] * len(rows)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard).tolist()
            opened = slots.corpus.texts(shard)
            found = opened.texts(rows[here].tolist())
            for slot, text in zip(here, found, strict=True):
                texts[slot], keys[slot] = text, opened.key(int(rows[slot]))
        return texts, keys

    def _masked(
        self,
        tokens: Int[Array, "b l"],
        lengths: Int[Array, " b"],
        numbers: Int[Array, " b"],
        *,
        hides: bool,
        whole_words: bool,
    ) -> Texts:
        """Tokens as written and as masked, if any are to be hidden."""
        seen, masked_at, labels = tokens, tokens[:, :0], tokens[:, :0]
        if hides:
            starts = self._starts if whole_words else None
            seen, hidden = mask_tokens(self.seed, numbers, tokens, self._tokens, starts=starts)
            masked_at, labels = fixed_width(hidden, tokens, token_mask_width(tokens.shape[1]))
        columns = (tokens, seen, lengths, masked_at, labels)
        return Texts(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))


def patch_masking(grid: int) -> PatchMasking:
    """FLAVA's masking of 14 by 14 patches, in proportion on another grid."""
    paper = PatchMasking()
    part = (grid / paper.grid) ** 2
    return replace(
        paper,
        grid=grid,
        masked=max(1, round(paper.masked * part)),
        least=max(1, round(paper.least * part)),
    )


def pixels_of(shard: OpenShard, sample: int, box: Box, size: int) -> UInt[Array, "3 s s"]:
    """The pixels of a view of a sample.

    Raises:
        FlavaError: the shard does not hold the image that its ledger tells of.
    """
    try:
        return view(shard.jpeg(sample), box, size, shard.size(sample))
    except ValueError as error:
        raise FlavaError(
            f"{shard.name}: {shard.key(sample)} is not the image its ledger tells of: {error}"
        ) from error


def _needs_codes(objective: Objective, stream: str) -> bool:
    weights = {"pairs": objective.mmm_image, "images": objective.mim, "texts": 0.0}
    return bool(weights[stream])


def _shares(config: DataConfig, wanted: Shares) -> Shares:
    """The shares of the streams that there is data for."""
    shares = {stream: getattr(wanted, stream) for stream in STREAMS}
    for stream, share in shares.items():
        if share and not config.manifests(stream):
            if not config.renormalise:
                raise FlavaError(
                    f"the objective takes {share:.0%} of its steps from {stream}, and "
                    f"data.{stream} names no manifest: name one, or set data.renormalise = true to "
                    "share these steps among the others"
                )
            shares[stream] = 0.0
    total = sum(shares.values())
    if not total:
        raise FlavaError("no stream has both a share of the steps and a manifest: set data.pairs")
    return Shares(**{stream: share / total for stream, share in shares.items()})


def _check_text(config: DataConfig, model: FlavaConfig, wordpiece: WordPiece) -> None:
    num_pieces = len(wordpiece.vocabulary)
    if num_pieces > model.text_vocab:
        raise FlavaError(
            f"{config.tokenizer} has {num_pieces:,} pieces and the model room for "
            f"{model.text_vocab:,}: set model.text_vocab"
        )
    for name in ("caption_tokens", "text_tokens"):
        most = getattr(config, name)
        if not 3 <= most <= model.text_positions and (name == "caption_tokens" or config.texts):
            raise FlavaError(
                f"data.{name} is {most}, and the model takes 3 to {model.text_positions} tokens"
            )


def _check_manifest(
    address: str, manifest: Manifest, stream: str, model: FlavaConfig | None
) -> None:
    """Refuse a manifest of another kind; with a model, also one whose codes do not fit it."""
    if manifest.kind != _KINDS[stream]:
        raise FlavaError(f"{address} holds {manifest.kind}, and data.{stream} needs other data")
    if model is None:
        return
    rules = manifest.codes
    if rules is None or any(one.codes_sha256 is None for one in manifest.shards):
        raise FlavaError(
            f"{address} has no image codes, which the objective needs: run `pmd codes {address}`"
        )
    if rules.grid != model.grid:
        raise FlavaError(
            f"{address} has {rules.grid} x {rules.grid} codes an image, and the model "
            f"{model.grid} x {model.grid} patches: run `pmd codes` with another grid, or set "
            "model.patch_size"
        )
    if rules.vocabulary > model.image_vocab:
        raise FlavaError(
            f"{address} has codes up to {rules.vocabulary - 1:,}, and the model room for "
            f"{model.image_vocab:,}: set model.image_vocab"
        )


def _chosen(shard: OpenShard, sample: int, nth: int, die: int) -> _Chosen:
    """One of the drawn views of a sample; of an image with boxes, the view of the caption."""
    record, views = shard.record(sample), shard.views
    if record.boxes:
        number, box = 1 + nth, record.boxes[nth]
        if views:
            stored = views.box(sample, number)
            if not same_box(stored, box):
                raise FlavaError(
                    f"{views.name} has other boxes than {shard.name}: run `pmd codes` again"
                )
            box = stored
        return _Chosen(shard, sample, number, box, record.captions, nth)
    number, box = 0, WHOLE
    if views:
        count = views.count(sample)
        number = 1 + die % (count - 1) if count > 1 else 0
        box = views.box(sample, number)
    return _Chosen(shard, sample, number, box, record.captions, nth)
