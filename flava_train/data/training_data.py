"""Any slots of the global batch of any step, as a pure function.

The content of a batch depends on the seed, the step and the data only. It is bit-equal for any
number of workers and ranks, and after any resume.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

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

_DESCRIBED_SLOTS = 256
"""Slots that are described at a time, which bounds the number of open shards."""


@dataclass(frozen=True)
class SlotDescription:
    """The content of one slot of a batch, to print.

    Args:
        key: of the record; of a text, its shard and row.
        source: name of the source.
        shard: address of the shard.
        text: the caption, or the text; None for an image without captions.
        crop: number of the crop of the image.
        matched: false if the caption is another image's.
    """

    key: str
    source: str
    shard: str
    text: str | None
    crop: int | None = None
    matched: bool = True


@dataclass(frozen=True)
class BatchChunk:
    """Some slots of a global batch, and the key of each."""

    rows: PairBatch | ImageBatch | TextBatch
    keys: list[str]


class TrainingData:
    """All batches of a run.

    Args:
        config: where the data is.
        needs: what the objective needs of the data.
        model: sizes of images, grids and vocabularies.
        seed: of the run.
        batch: rows of the global batch.

    Attributes:
        shares: probability of each stream.
        digests: the versions of all data: of the manifests, by stream, and of the tokenizer.
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
        opened = open_streams(config, needs, model, seed=seed, batch=batch)
        self.shares, self.digests = opened.shares, opened.digests
        self.wordpiece = opened.wordpiece
        self._streams = opened.streams
        self._schedule = StreamSchedule(seed, astuple(self.shares))
        self._patch_masking = PatchMasking.for_grid(model.grid)
        vocabulary = self.wordpiece.vocabulary
        self._token_masking = TokenMasking(
            len(vocabulary), self.wordpiece.mask_id, self.wordpiece.special_ids
        )
        self._word_starts = word_starts(vocabulary)

    def stream(self, step: int) -> str:
        """The stream of the whole batch of `step`: `pairs`, `images` or `texts`."""
        return self._schedule.stream(step)

    def describe(self, step: int) -> list[SlotDescription]:
        """The content of every slot of the global batch of `step`; no pixels are read."""
        slots = range(self.batch)
        return [
            description
            for start in range(0, self.batch, _DESCRIBED_SLOTS)
            for description in self._describe(
                self._slice(step, slots[start : start + _DESCRIBED_SLOTS])
            )
        ]

    def load(self, step: int, slots: range) -> BatchChunk:
        """The given slots of the global batch of `step`, in host memory."""
        part = self._slice(step, slots)
        if part.stream == "texts":
            texts, keys = part.texts()
            encoded = self.wordpiece.encode_documents(texts, self.config.text_tokens)
            rows = self._text_batch(*encoded, part.numbers, masks=True, whole_words=False)
            return BatchChunk(rows, keys)
        crops = part.crops()
        keys = [crop.key for crop in crops]
        images = self._image_batch(part, crops)
        if part.stream == "images":
            return BatchChunk(images, keys)
        captions, matched = part.captions(crops, self.needs.mismatch_rate, self.wordpiece)
        encoded = self.wordpiece.encode(captions, self.config.caption_tokens)
        masks = self.needs.masks_pairs
        # torch has no uint64 arithmetic; the same bits as int64 suffice, only equality counts
        image_ids = np.array([crop.image_id for crop in crops], np.uint64).view(np.int64)
        pairs = PairBatch(
            images,
            self._text_batch(*encoded, part.numbers, masks=masks, whole_words=True),
            torch.from_numpy(matched),
            torch.from_numpy(image_ids),
            torch.from_numpy(draw_uniforms(self.seed, part.numbers)),
        )
        return BatchChunk(pairs, keys)

    def enable_prefetch(self) -> None:
        """Open windows in threads before they are needed; for processes that never fork."""
        for stream in self._streams.values():
            stream.prefetches = True

    def _slice(self, step: int, slots: range) -> BatchSlice:
        name = self.stream(step)
        shards = self._streams[name]
        window, pairs = shards.batch(self._schedule.count_before(step))
        rows = np.array(slots, np.int64)
        return BatchSlice(name, shards, window, pairs[rows], step * self.batch + rows, self.seed)

    def _describe(self, part: BatchSlice) -> list[SlotDescription]:
        shards = part.window.locate(part.pairs)[0].tolist()
        locations = [part.shards.locations[shard] for shard in shards]
        if part.stream == "texts":
            return [
                SlotDescription(key, location.entry.source, location.address, text)
                for location, text, key in zip(locations, *part.texts(), strict=True)
            ]
        crops = part.crops()
        captions: Sequence[str | None] = [None] * len(crops)
        matched = np.ones(len(crops), bool)
        if part.stream == "pairs":
            captions, matched = part.captions(crops, self.needs.mismatch_rate, self.wordpiece)
        return [
            SlotDescription(
                crop.key, location.entry.source, location.address, text, crop.crop, is_matched
            )
            for location, crop, text, is_matched in zip(
                locations, crops, captions, matched.tolist(), strict=True
            )
        ]

    def _image_batch(self, part: BatchSlice, crops: Sequence[ImageCrop]) -> ImageBatch:
        size, grid = self.model.image_size, self.model.grid
        pixels = np.empty((len(crops), 3, size, size), np.uint8)
        codes = np.zeros((len(crops), grid**2), np.int64)
        predicts_codes = part.stream in self.needs.codes
        for slot, crop in enumerate(crops):
            pixels[slot] = crop.pixels(size)
            if predicts_codes and crop.shard.codes:
                codes[slot] = crop.shard.codes.codes_of(crop.sample, crop.crop)
        masked_positions, masked_codes = codes[:, :0], codes[:, :0]
        if part.stream == "images" or self.needs.masks_pairs:
            mask = mask_patches(self.seed, part.numbers, self._patch_masking)
            masked_positions, masked_codes = gather_masked(
                mask, codes, self._patch_masking.num_masked
            )
        columns = (pixels, masked_positions, masked_codes)
        return ImageBatch(*(torch.from_numpy(column) for column in columns))

    def _text_batch(
        self,
        tokens: Int[Array, "b l"],
        lengths: Int[Array, " b"],
        numbers: Int[Array, " b"],
        *,
        masks: bool,
        whole_words: bool,
    ) -> TextBatch:
        """Tokens before and after masking; without masks they are the same."""
        masked, masked_positions, labels = tokens, tokens[:, :0], tokens[:, :0]
        if masks:
            starts = self._word_starts if whole_words else None
            masked, mask = mask_tokens(
                self.seed, numbers, tokens, self._token_masking, starts=starts
            )
            masked_positions, labels = gather_masked(
                mask, tokens, max_masked_tokens(tokens.shape[1])
            )
        columns = (tokens, masked, lengths, masked_positions, labels)
        return TextBatch(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))
