"""What the slots of a batch contain: a crop of an image, a caption, a text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flava_train.data.image_codes import boxes_match
from flava_train.data.masking import draw_uniforms
from flava_train.data.order import random_bits
from flava_train.data.pixels import resized_crop
from flava_train.data.shard_readers import ImageShard
from flava_train.data.shard_stream import OpenWindow, ShardStream
from flava_train.data.wordpiece import WordPiece
from flava_train.shapes import Array, Bool, Int, UInt
from pmd_pipeline.contract.boxes import WHOLE_IMAGE, Box
from pmd_pipeline.contract.errors import PmdError

_MISMATCH_ATTEMPTS = 8
"""Captions drawn as a mismatch before the pair keeps its own."""


@dataclass(frozen=True)
class ImageCrop:
    """A crop of an image with its caption; the pixels are not read yet.

    Args:
        shard: of the image.
        sample: number of the image in the shard.
        crop: number of the crop, as in the image codes: 0 is the whole image.
        box: of the crop.
        captions: all captions of the image.
        caption: index of the slot's caption among them.
    """

    shard: ImageShard
    sample: int
    crop: int
    box: Box
    captions: list[str]
    caption: int

    @property
    def key(self) -> str:
        """The key of the record."""
        return self.shard.key(self.sample)

    @property
    def image_id(self) -> int:
        """Identifier of the image, equal for its copies in other sources."""
        return int(self.shard.ledger.image_ids[self.sample])

    def pixels(self, size: int) -> UInt[Array, "3 {size} {size}"]:
        """Red, green and blue of the crop, resized to a square.

        Raises:
            PmdError: the stored image is not the one that the ledger describes.
        """
        return resized_crop(self.shard.image(self.sample), self.box, size)


@dataclass(frozen=True)
class BatchSlice:
    """Some slots of the global batch of one step.

    Args:
        stream: name of the stream.
        shards: of the stream.
        window: of the batch.
        pairs: positions in the window, one for each slot.
        numbers: sample numbers, from which all random choices are made.
        seed: of the run.
    """

    stream: str
    shards: ShardStream
    window: OpenWindow
    pairs: Int[Array, " b"]
    numbers: Int[Array, " b"]
    seed: int

    def crops(self) -> list[ImageCrop]:
        """The crop of each slot."""
        bits = random_bits(self.seed, "crop", self.numbers).tolist()
        located = self._locate(self.pairs)
        return [
            _choose_crop(shard, sample, caption, choice)
            for (shard, sample, caption), choice in zip(located, bits, strict=True)
        ]

    def captions(
        self, crops: Sequence[ImageCrop], mismatch_rate: float, wordpiece: WordPiece
    ) -> tuple[list[str], Bool[Array, " b"]]:
        """The caption of each slot, and whether it belongs to the image."""
        captions = [one.captions[one.caption] for one in crops]
        matched = np.ones(len(crops), bool)
        mismatched = draw_uniforms(self.seed, self.numbers)[:, 0] < mismatch_rate
        for slot in np.flatnonzero(mismatched).tolist():
            other = self._other_caption(slot, crops[slot], wordpiece)
            if other is not None:
                captions[slot], matched[slot] = other, False
        return captions, matched

    def texts(self) -> tuple[list[str], list[str]]:
        """The text of each slot, and its key."""
        shards, rows, _ = self.window.locate(self.pairs)
        texts, keys = [""] * len(rows), [""] * len(rows)
        for number in np.unique(shards).tolist():
            slots = np.flatnonzero(shards == number).tolist()
            shard = self.shards.text_shard(number)
            for slot, text in zip(slots, shard.texts(rows[slots].tolist()), strict=True):
                texts[slot], keys[slot] = text, shard.key(int(rows[slot]))
        return texts, keys

    def _other_caption(self, slot: int, crop: ImageCrop, wordpiece: WordPiece) -> str | None:
        """A caption of another image in the window, with other tokens than all of this image's."""
        attempts = self.numbers[slot] * _MISMATCH_ATTEMPTS + np.arange(_MISMATCH_ATTEMPTS)
        drawn = random_bits(self.seed, "mismatch", attempts) % np.uint64(self.window.pairs)
        own = [wordpiece.token_ids(caption) for caption in crop.captions]
        for shard, sample, caption in self._locate(drawn.astype(np.int64)):
            if shard.ledger.image_ids[sample] == crop.image_id:
                continue
            other = shard.captions(sample).captions[caption]
            if wordpiece.token_ids(other) not in own:
                return other
        return None

    def _locate(self, pairs: Int[Array, " n"]) -> Iterator[tuple[ImageShard, int, int]]:
        """Shard, sample, and number of the caption, of pairs of the window."""
        columns = (column.tolist() for column in self.window.locate(pairs))
        for shard, sample, caption in zip(*columns, strict=True):
            yield self.shards.image_shard(shard, self.window), sample, caption


def _choose_crop(shard: ImageShard, sample: int, caption: int, choice: int) -> ImageCrop:
    """The region of the caption; where captions have no boxes, the stored crop that `choice` names.

    Args:
        shard: of the image.
        sample: number of the image in the shard.
        caption: number of the caption among the image's.
        choice: random number; the whole image is chosen only if it is the only crop.
    """
    text, codes = shard.captions(sample), shard.codes
    if text.boxes:
        crop, box = 1 + caption, text.boxes[caption]
        if codes:
            stored = codes.box(sample, crop)
            if not boxes_match(stored, box):
                raise PmdError(
                    f"{codes.name} has other boxes than {shard.address}: run `pmd codes` again"
                )
            box = stored
        return ImageCrop(shard, sample, crop, box, text.captions, caption)
    crop, box = 0, WHOLE_IMAGE
    if codes:
        num_crops = codes.num_crops(sample)
        crop = 1 + choice % (num_crops - 1) if num_crops > 1 else 0
        box = codes.box(sample, crop)
    return ImageCrop(shard, sample, crop, box, text.captions, caption)
