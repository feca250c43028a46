"""Rows of batches: any slots of any step's global batch, as a pure function.

What a step sees depends on the seed, the step and the data alone. So batches are bit-equal for
any number of workers and ranks, and after any resume.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch

from flava_train.data.batch_slice import BatchSlice, ImageCrop
from flava_train.data.batches import ImageBatch, PairBatch, TextBatch
from flava_train.data.config import DataConfig
from flava_train.data.masking import (
    PatchMasking,
    TokenMasking,
    draw_uniforms,
    gather_masked,
    mask_patches,
    mask_tokens,
    max_masked_tokens,
    word_starts,
)
from flava_train.data.needs import DataNeeds
from flava_train.data.order import StreamSchedule
from flava_train.data.streams import open_streams
from flava_train.model.flava import FlavaConfig
from flava_train.shapes import Array, Int

_AT_ONCE = 256
"""Slots for which shards are kept open together."""


@dataclass(frozen=True)
class SlotDescription:
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
class BatchChunk:
    """Some slots of a global batch, with the key of each."""

    rows: PairBatch | ImageBatch | TextBatch
    keys: list[str]


class TrainingData:
    """All that a run learns from.

    Args:
        config: where the data is.
        needs: what the objective needs of the data.
        model: sizes of images, grids and vocabularies.
        seed: of the run.
        batch: rows of the global batch.

    Attributes:
        shares: probability of each stream.
        digests: of the manifests, by stream, and of the tokenizer: the versions of all data.
        wordpiece: the tokenizer.
        batch: as given.

    Raises:
        PmdError: data is missing, or does not fit the model or the objective.
    """

    def __init__(
        self,
        config: DataConfig,
        needs: DataNeeds,
        model: FlavaConfig,
        *,
        seed: int,
        batch: int,
    ) -> None:
        self.config, self.needs, self.model = config, needs, model
        self.seed, self.batch = seed, batch
        inputs = open_streams(config, needs, model, seed=seed, batch=batch)
        self.shares, self.digests = inputs.shares, inputs.digests
        self.wordpiece = inputs.wordpiece
        self._corpora = inputs.corpora
        self._turns = StreamSchedule(seed, astuple(self.shares))
        self._patches = patch_masking(model.grid)
        vocabulary = self.wordpiece.vocabulary
        self._tokens = TokenMasking(len(vocabulary), self.wordpiece.mask, self.wordpiece.specials)
        self._starts = word_starts(vocabulary)

    def stream(self, step: int) -> str:
        """The stream that the whole batch of `step` comes from: `pairs`, `images` or `texts`."""
        return self._turns.stream(step)

    def rows(self, step: int) -> list[SlotDescription]:
        """What every slot of the global batch of `step` holds; no pixels are read."""
        return [
            row
            for start in range(0, self.batch, _AT_ONCE)
            for row in self._rows(self._slots(step, range(self.batch)[start : start + _AT_ONCE]))
        ]

    def part(self, step: int, slots: range) -> BatchChunk:
        """The given slots of the global batch of `step`, in host memory."""
        here = self._slots(step, slots)
        if here.stream == "texts":
            texts, keys = here.texts()
            encoded = self.wordpiece.encode_documents(texts, self.config.text_tokens)
            return BatchChunk(
                self._masked(*encoded, here.numbers, hides=True, whole_words=False), keys
            )
        shown = here.shown()
        keys = [one.shard.key(one.sample) for one in shown]
        images = self._images(here, shown)
        if here.stream == "images":
            return BatchChunk(images, keys)
        captions, matched = here.captions(shown, self.needs.mismatch_rate, self.wordpiece)
        encoded = self.wordpiece.encode(captions, self.config.caption_tokens)
        hides = self.needs.masks_pairs
        # 64 bits as they are: only equality counts
        image_ids = np.array([one.image for one in shown], np.uint64).view(np.int64)
        pairs = PairBatch(
            images,
            self._masked(*encoded, here.numbers, hides=hides, whole_words=True),
            torch.from_numpy(matched),
            torch.from_numpy(image_ids),
            torch.from_numpy(draw_uniforms(self.seed, here.numbers)),
        )
        return BatchChunk(pairs, keys)

    def look_ahead(self) -> None:
        """Open windows in the background before they are needed; for processes that never fork."""
        for corpus in self._corpora.values():
            corpus.ahead = True

    def _slots(self, step: int, slots: range) -> BatchSlice:
        stream = self.stream(step)
        corpus = self._corpora[stream]
        window, pairs = corpus.batch(self._turns.before(step))
        here = np.array(slots, np.int64)
        return BatchSlice(stream, corpus, window, pairs[here], step * self.batch + here, self.seed)

    def _rows(self, slots: BatchSlice) -> list[SlotDescription]:
        shards = slots.window.locate(slots.pairs)[0].tolist()
        places = [slots.corpus.places[shard] for shard in shards]
        if slots.stream == "texts":
            columns = zip(places, *slots.texts(), strict=True)
            return [
                SlotDescription(key, place.entry.source, place.name, text)
                for place, text, key in columns
            ]
        shown = slots.shown()
        captions: Sequence[str | None] = [None] * len(shown)
        matched = np.ones(len(shown), bool)
        if slots.stream == "pairs":
            captions, matched = slots.captions(shown, self.needs.mismatch_rate, self.wordpiece)
        return [
            SlotDescription(
                one.shard.key(one.sample), place.entry.source, place.name, text, one.view, fits
            )
            for place, one, text, fits in zip(
                places, shown, captions, matched.tolist(), strict=True
            )
        ]

    def _images(self, slots: BatchSlice, shown: Sequence[ImageCrop]) -> ImageBatch:
        size, grid = self.model.image_size, self.model.grid
        pixels = np.empty((len(shown), 3, size, size), np.uint8)
        codes = np.zeros((len(shown), grid**2), np.int64)
        predicts = slots.stream in self.needs.codes
        for slot, one in enumerate(shown):
            pixels[slot] = one.pixels(size)
            if predicts and one.shard.views:
                codes[slot] = one.shard.views.of(one.sample, one.view)
        masked_positions, wanted = codes[:, :0], codes[:, :0]
        if slots.stream == "images" or self.needs.masks_pairs:
            mask = mask_patches(self.seed, slots.numbers, self._patches)
            masked_positions, wanted = gather_masked(mask, codes, self._patches.masked)
        columns = (pixels, masked_positions, wanted)
        return ImageBatch(*(torch.from_numpy(column) for column in columns))

    def _masked(
        self,
        tokens: Int[Array, "b l"],
        lengths: Int[Array, " b"],
        numbers: Int[Array, " b"],
        *,
        hides: bool,
        whole_words: bool,
    ) -> TextBatch:
        """Tokens as written and as masked, if any are to be hidden."""
        seen, masked_positions, labels = tokens, tokens[:, :0], tokens[:, :0]
        if hides:
            starts = self._starts if whole_words else None
            seen, hidden = mask_tokens(self.seed, numbers, tokens, self._tokens, starts=starts)
            masked_positions, labels = gather_masked(
                hidden, tokens, max_masked_tokens(tokens.shape[1])
            )
        columns = (tokens, seen, lengths, masked_positions, labels)
        return TextBatch(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))


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
