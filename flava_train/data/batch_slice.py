"""What each slot of a batch shows: a view of an image, a caption, a text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flava_train.data.image_codes import boxes_match
from flava_train.data.masking import draw_uniforms
from flava_train.data.order import random_bits
from flava_train.data.pixels import crop_pixels
from flava_train.data.shard_stream import ImageShard, OpenWindow, ShardStream
from flava_train.data.wordpiece import WordPiece
from flava_train.shapes import Array, Bool, Int, UInt
from pmd_pipeline.contract.boxes import WHOLE_IMAGE, Box
from pmd_pipeline.contract.errors import PmdError

"""The box of a whole image."""

_ATTEMPTS = 8
"""Captions drawn as a mismatch before the pair is left as it is."""


@dataclass(frozen=True)
class ImageCrop:
    """The view of an image that a slot shows; its pixels are still in the shard.

    Args:
        shard: that holds the image.
        sample: number of the image there.
        view: number of the view.
        box: of the view.
        captions: all that the image has.
        nth: which of them is the slot's.
    """

    shard: ImageShard
    sample: int
    view: int
    box: Box
    captions: list[str]
    nth: int

    @property
    def image(self) -> int:
        """The number that names the image, the same for its copies in other sources."""
        return int(self.shard.ledger.images[self.sample])

    def pixels(self, size: int) -> UInt[Array, "3 {size} {size}"]:
        """Red, green and blue.

        Raises:
            PmdError: the shard does not hold the image that its ledger tells of.
        """
        shard, sample = self.shard, self.sample
        try:
            return crop_pixels(shard.jpeg(sample), self.box, size, shard.size(sample))
        except ValueError as error:
            raise PmdError(
                f"{shard.name}: {shard.key(sample)} is not the image its ledger tells of: {error}"
            ) from error


@dataclass(frozen=True)
class BatchSlice:
    """Some slots of the global batch of one step.

    Args:
        stream: that the batch comes from.
        corpus: of the stream.
        window: that the batch lies in.
        pairs: of the window, one for each slot.
        numbers: the sample numbers, by which all is drawn.
        seed: of the run.
    """

    stream: str
    corpus: ShardStream
    window: OpenWindow
    pairs: Int[Array, " b"]
    numbers: Int[Array, " b"]
    seed: int

    def shown(self) -> list[ImageCrop]:
        """A view for each slot."""
        dice = random_bits(self.seed, "view", self.numbers).tolist()
        places = self._located(self.pairs)
        return [
            _shown(shard, sample, nth, die)
            for (shard, sample, nth), die in zip(places, dice, strict=True)
        ]

    def captions(
        self, shown: Sequence[ImageCrop], mismatch_rate: float, wordpiece: WordPiece
    ) -> tuple[list[str], Bool[Array, " b"]]:
        """The caption of each slot, of some another image's; and which are the image's own."""
        texts = [one.captions[one.nth] for one in shown]
        matched = np.ones(len(shown), bool)
        swapped = draw_uniforms(self.seed, self.numbers)[:, 0] < mismatch_rate
        for slot in np.flatnonzero(swapped).tolist():
            other = self._other_caption(slot, shown[slot], wordpiece)
            if other is not None:
                texts[slot], matched[slot] = other, False
        return texts, matched

    def texts(self) -> tuple[list[str], list[str]]:
        """The text of each slot, and its key."""
        shards, rows, _ = self.window.locate(self.pairs)
        texts, keys = [""] * len(rows), [""] * len(rows)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard).tolist()
            opened = self.corpus.texts(shard)
            found = opened.texts(rows[here].tolist())
            for slot, text in zip(here, found, strict=True):
                texts[slot], keys[slot] = text, opened.key(int(rows[slot]))
        return texts, keys

    def _other_caption(self, slot: int, one: ImageCrop, wordpiece: WordPiece) -> str | None:
        """A caption of the window that is not the image's, nor reads like any that is."""
        attempts = self.numbers[slot] * _ATTEMPTS + np.arange(_ATTEMPTS)
        drawn = random_bits(self.seed, "swap", attempts) % np.uint64(self.window.pairs)
        own = [wordpiece.pieces(caption) for caption in one.captions]
        for shard, sample, nth in self._located(drawn.astype(np.int64)):
            if shard.ledger.images[sample] == one.image:
                continue
            other = shard.record(sample).captions[nth]
            if wordpiece.pieces(other) not in own:
                return other
        return None

    def _located(self, pairs: Int[Array, " n"]) -> Iterator[tuple[ImageShard, int, int]]:
        """Shard, sample, and which of the sample's captions, of pairs of the window."""
        columns = (column.tolist() for column in self.window.locate(pairs))
        for shard, sample, nth in zip(*columns, strict=True):
            yield self.corpus.shard(shard, self.window), sample, nth


def _shown(shard: ImageShard, sample: int, nth: int, die: int) -> ImageCrop:
    """One of the drawn views of a sample; of an image with boxes, the view of the caption."""
    record, views = shard.record(sample), shard.views
    if record.boxes:
        number, box = 1 + nth, record.boxes[nth]
        if views:
            stored = views.box(sample, number)
            if not boxes_match(stored, box):
                raise PmdError(
                    f"{views.name} has other boxes than {shard.name}: run `pmd codes` again"
                )
            box = stored
        return ImageCrop(shard, sample, number, box, record.captions, nth)
    number, box = 0, WHOLE_IMAGE
    if views:
        count = views.count(sample)
        number = 1 + die % (count - 1) if count > 1 else 0
        box = views.box(sample, number)
    return ImageCrop(shard, sample, number, box, record.captions, nth)
