"""In what order samples are seen: pure functions of the seed and the step, numpy only.

No state is kept but the step, so a run that is resumed, or spread over other ranks and workers,
sees what it would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from flava_train.data.masking import philox
from flava_train.shapes import Array, Int, UInt

STREAMS = ("pairs", "images", "texts")
"""What a step may take its batch from."""

MIN_WINDOW_BATCHES = 64
"""A window has at least so many batches, where the epoch has: Visual Genome has 50 captions of an
image, COCO and Localized Narratives may add a few, and each is to find a batch of its own."""

_PURPOSES = {
    name: 16 + number
    for number, name in enumerate(
        ("stream", "shards", "turn", "images", "batches", "view", "swap"),
    )
}
"""Apart from those of `masking.py`, so that no two draws share their numbers."""

_BLOCK = 1 << 16


def random_bits(
    seed: int, purpose: str, numbers: Int[Array, " n"] | UInt[Array, " n"], more: int = 0
) -> UInt[Array, " n"]:
    """A random number of 64 bits for each of `numbers`, again and again the same.

    Args:
        seed: of the run.
        purpose: draws for two purposes have nothing in common.
        numbers: up to 64 bits each.
        more: a further number of 32 bits that tells draws apart.
    """
    wide = numbers.astype(np.uint64)
    counter = np.empty((4, len(wide)), np.uint32)
    counter[0] = wide & np.uint64(0xFFFFFFFF)
    counter[1] = wide >> np.uint64(32)
    counter[2] = more
    counter[3] = _PURPOSES[purpose]
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)).astype(np.uint64)
    drawn: Array = (words[0] << np.uint64(32)) | words[1]
    return drawn


class StreamSchedule:
    """Which stream each step takes, and how often that stream was taken before.

    Args:
        seed: of the run.
        shares: probabilities of `STREAMS`, in their order.
    """

    def __init__(self, seed: int, shares: Sequence[float]) -> None:
        self._seed = seed
        limits = np.cumsum(shares)
        self._limits = tuple(limits / limits[-1])
        self._counts = [np.zeros(len(STREAMS), np.int64)]  # before each block

    def stream(self, step: int) -> str:
        """The stream that `step` takes."""
        return STREAMS[self._taken(step // _BLOCK)[step % _BLOCK]]

    def before(self, step: int) -> int:
        """Steps before `step` that took the stream that it takes."""
        number, place = divmod(step, _BLOCK)
        while len(self._counts) <= number:
            block = self._taken(len(self._counts) - 1)
            self._counts.append(self._counts[-1] + np.bincount(block, minlength=len(STREAMS)))
        block = self._taken(number)
        return int(self._counts[number][block[place]] + (block[:place] == block[place]).sum())

    def _taken(self, block: int) -> UInt[Array, " n"]:
        return _streams_taken(self._seed, self._limits, block)


@lru_cache(maxsize=8)
def _streams_taken(seed: int, limits: tuple[float, ...], block: int) -> UInt[Array, " n"]:
    """Numbers of the streams that the steps of a block take."""
    steps = np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.uint64)
    uniform = (random_bits(seed, "stream", steps) >> np.uint64(11)) * 2.0**-53  # below 1, exactly
    return np.searchsorted(limits, uniform, side="right").astype(np.uint8)


@dataclass(frozen=True)
class PairRange:
    """Pairs `start` to `stop` of one shard, in the order of its ledger."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """A stretch of an epoch, of which every batch has its pairs from the same few shards."""

    epoch: int
    number: int
    batches: int
    pieces: tuple[PairRange, ...]


@dataclass(frozen=True)
class SampleOrder:
    """The order of one stream.

    In each epoch the shards stand in a new circle, which is cut open at any pair, and from there
    into windows of whole batches. What is left before the cut, less than one batch, is not seen
    in this epoch. `deal` says which pairs of a window make which batch.

    Args:
        sizes: pairs of each shard.
        batch: pairs of each batch.
        seed: of the run.
        stream: number of the stream, so that no two streams are ordered alike.
        window_shards: approximate number of shards in a window; `MIN_WINDOW_BATCHES` may need more.
    """

    sizes: tuple[int, ...]
    batch: int
    seed: int
    stream: int = 0
    window_shards: int = 16

    @property
    def pairs(self) -> int:
        """Of all shards."""
        return sum(self.sizes)

    @property
    def batches(self) -> int:
        """Of one epoch."""
        return self.pairs // self.batch

    @property
    def windows(self) -> int:
        """Of one epoch."""
        wanted = round(self.window_shards * self.pairs / len(self.sizes) / self.batch)
        return max(1, self.batches // max(wanted, MIN_WINDOW_BATCHES))

    def place(self, index: int) -> tuple[int, int, int]:
        """Epoch, window, and batch within it, of the stream's batch number `index`."""
        epoch, within = divmod(index, self.batches)
        number = ((within + 1) * self.windows - 1) // self.batches
        return epoch, number, within - self._first(number)

    def window(self, epoch: int, number: int) -> Window:
        """Which pairs a window has."""
        first, last = self._first(number), self._first(number + 1)
        order, ends = _circle(self._seed, epoch, self.sizes)
        cut = int(random_bits(self._seed, "turn", np.array([0]), epoch)[0] % np.uint64(self.pairs))
        start, stop = cut + first * self.batch, cut + last * self.batch
        stretches = [(start, min(stop, self.pairs)), (0, stop - self.pairs)]
        if start >= self.pairs:
            stretches = [(start - self.pairs, stop - self.pairs)]
        pieces = [
            piece for low, high in stretches for piece in self._pieces(order, ends, low, high)
        ]
        return Window(epoch, number, last - first, tuple(pieces))

    def after(self, epoch: int, number: int) -> tuple[int, int]:
        """Epoch and number of the next window."""
        return (epoch, number + 1) if number + 1 < self.windows else (epoch + 1, 0)

    def deal(self, window: Window, images: UInt[Array, " n"]) -> Int[Array, "k b"]:
        """Which pairs of the window, counted over its pieces, make which of its batches.

        Pairs are grouped by image, images stand in random order, and pairs are dealt to the
        batches in turn. So an image with c captions in a window of k batches has at most
        ceil(c / k) in any batch: none meets another unless there are more captions than batches.

        Args:
            window: of this order.
            images: of each pair, a number of 64 bits that names its image.
        """
        places = random_bits(self._seed, "images", images, window.epoch)
        order = np.argsort(places, kind="stable")
        hands = order.reshape(self.batch, window.batches).T
        rows = np.arange(window.batches) + (window.number << 32)
        turns = np.argsort(random_bits(self._seed, "batches", rows, window.epoch), kind="stable")
        dealt: Array = hands[turns]  # else the captions of one image would come step by step
        return dealt

    @property
    def _seed(self) -> int:
        return self.seed ^ self.stream << 62

    def _first(self, window: int) -> int:
        return self.batches * window // self.windows

    def _pieces(
        self, order: Int[Array, " n"], ends: Int[Array, " n"], low: int, high: int
    ) -> Sequence[PairRange]:
        """The pairs `low` to `high` of the circle, shard by shard."""
        pieces = []
        place = int(np.searchsorted(ends, low, side="right"))
        while low < high:
            shard, end = int(order[place]), int(ends[place])
            begin = end - self.sizes[shard]
            if low < end:
                pieces.append(PairRange(shard, low - begin, min(high, end) - begin))
            low, place = end, place + 1
        return pieces


@lru_cache(maxsize=8)
def _circle(
    seed: int, epoch: int, sizes: tuple[int, ...]
) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """The shards in the order of an epoch, and where each ends."""
    order = np.argsort(random_bits(seed, "shards", np.arange(len(sizes)), epoch), kind="stable")
    return order, np.cumsum(np.array(sizes)[order])
