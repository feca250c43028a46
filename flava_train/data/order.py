"""The order of samples: pure functions of the seed and the step, numpy only.

The step is the only state. A resumed run, or one with other numbers of ranks and workers, sees the
same samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from flava_train.data.masking import philox
from flava_train.shapes import Array, Int, UInt

STREAMS = ("pairs", "images", "texts")
"""Streams of samples; the batch of a step comes from one of them."""

MIN_WINDOW_BATCHES = 64
"""Least batches in a window, if the epoch has as many. Visual Genome has 50 captions for an image,
COCO and Localized Narratives may add a few, and each should be in a batch of its own."""

_PURPOSES = {
    name: 16 + number
    for number, name in enumerate(
        ("stream", "shards", "rotation", "images", "batches", "crop", "mismatch"),
    )
}
"""Numbers of the counter; none is in `masking.py`, so no two draws share random numbers."""

_BLOCK = 1 << 16
"""Steps whose streams are drawn and counted together."""


def random_bits(
    seed: int, purpose: str, numbers: Int[Array, " n"] | UInt[Array, " n"], extra: int = 0
) -> UInt[Array, " n"]:
    """A random number of 64 bits for each of `numbers`; the same arguments give the same bits.

    Args:
        seed: of the run.
        purpose: draws for different purposes are independent.
        numbers: up to 64 bits each.
        extra: a further number of 32 bits, such as the epoch.
    """
    wide = numbers.astype(np.uint64)
    counter = np.empty((4, len(wide)), np.uint32)
    counter[0] = wide & np.uint64(0xFFFFFFFF)
    counter[1] = wide >> np.uint64(32)
    counter[2] = extra
    counter[3] = _PURPOSES[purpose]
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)).astype(np.uint64)
    bits: Array = (words[0] << np.uint64(32)) | words[1]
    return bits


class StreamSchedule:
    """The stream of each step, and how many earlier steps had the same stream.

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
        """The stream of `step`."""
        return STREAMS[self._block(step // _BLOCK)[step % _BLOCK]]

    def count_before(self, step: int) -> int:
        """The number of steps before `step` that have the same stream."""
        number, offset = divmod(step, _BLOCK)
        while len(self._counts) <= number:
            block = self._block(len(self._counts) - 1)
            self._counts.append(self._counts[-1] + np.bincount(block, minlength=len(STREAMS)))
        block = self._block(number)
        return int(self._counts[number][block[offset]] + (block[:offset] == block[offset]).sum())

    def _block(self, number: int) -> UInt[Array, " n"]:
        return _block_of_streams(self._seed, self._limits, number)


@lru_cache(maxsize=8)
def _block_of_streams(seed: int, limits: tuple[float, ...], block: int) -> UInt[Array, " n"]:
    """Index in `STREAMS` for each step of a block."""
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
    """Consecutive batches of an epoch that are shuffled together, and the pairs in them."""

    epoch: int
    number: int
    batches: int
    ranges: tuple[PairRange, ...]


@dataclass(frozen=True)
class SampleOrder:
    """The order of one stream.

    In each epoch the shards are put in a random circular order, which starts at a random pair and
    is split into windows of whole batches. The rest of the circle, less than one batch, is not
    seen in this epoch. `assign_batches` shuffles the pairs of a window into its batches.

    Args:
        sizes: pairs of each shard.
        batch: pairs of each batch.
        seed: of the run.
        stream: index in `STREAMS`, so that no two streams have the same order.
        window_shards: approximate number of shards in a window; `MIN_WINDOW_BATCHES` may need more.
    """

    sizes: tuple[int, ...]
    batch: int
    seed: int
    stream: int = 0
    window_shards: int = 16

    @property
    def pairs(self) -> int:
        """Pairs of all shards."""
        return sum(self.sizes)

    @property
    def batches(self) -> int:
        """Batches of one epoch."""
        return self.pairs // self.batch

    @property
    def windows(self) -> int:
        """Windows of one epoch."""
        window_batches = round(self.window_shards * self.pairs / len(self.sizes) / self.batch)
        return max(1, self.batches // max(window_batches, MIN_WINDOW_BATCHES))

    def position(self, index: int) -> tuple[int, int, int]:
        """Epoch, window, and batch within the window, of batch number `index` of the stream."""
        epoch, within = divmod(index, self.batches)
        number = ((within + 1) * self.windows - 1) // self.batches
        return epoch, number, within - self._first_batch(number)

    def window(self, epoch: int, number: int) -> Window:
        """Window `number` of an epoch."""
        first, last = self._first_batch(number), self._first_batch(number + 1)
        order, ends = _shard_order(self._seed, epoch, self.sizes)
        bits = random_bits(self._seed, "rotation", np.array([0]), epoch)[0]
        rotation = int(bits % np.uint64(self.pairs))
        start, stop = rotation + first * self.batch, rotation + last * self.batch
        arcs = [(start, min(stop, self.pairs)), (0, stop - self.pairs)]
        if start >= self.pairs:
            arcs = [(start - self.pairs, stop - self.pairs)]
        ranges = [one for low, high in arcs for one in self._ranges(order, ends, low, high)]
        return Window(epoch, number, last - first, tuple(ranges))

    def next_window(self, epoch: int, number: int) -> tuple[int, int]:
        """Epoch and number of the window after this one."""
        return (epoch, number + 1) if number + 1 < self.windows else (epoch + 1, 0)

    def assign_batches(self, window: Window, image_ids: UInt[Array, " n"]) -> Int[Array, "k b"]:
        """The pairs of each batch of the window, as positions in the window's ranges.

        Pairs are grouped by image, images are shuffled, and the pairs are assigned to the batches
        round-robin. An image with c captions in a window of k batches has at most ceil(c / k) of
        them in any batch: one, unless there are more captions than batches.

        Args:
            window: of this order.
            image_ids: 64-bit identifier of each pair's image.
        """
        priority = random_bits(self._seed, "images", image_ids, window.epoch)
        order = np.argsort(priority, kind="stable")
        round_robin = order.reshape(self.batch, window.batches).T
        rows = np.arange(window.batches) + (window.number << 32)
        # else the captions of one image would be in consecutive steps
        shuffled = np.argsort(random_bits(self._seed, "batches", rows, window.epoch), kind="stable")
        batches: Array = round_robin[shuffled]
        return batches

    @property
    def _seed(self) -> int:
        return self.seed ^ self.stream << 62

    def _first_batch(self, window: int) -> int:
        return self.batches * window // self.windows

    def _ranges(
        self, order: Int[Array, " n"], ends: Int[Array, " n"], low: int, high: int
    ) -> Sequence[PairRange]:
        """The pairs `low` to `high` of the circular order, shard by shard."""
        ranges = []
        place = int(np.searchsorted(ends, low, side="right"))
        while low < high:
            shard, end = int(order[place]), int(ends[place])
            begin = end - self.sizes[shard]
            if low < end:
                ranges.append(PairRange(shard, low - begin, min(high, end) - begin))
            low, place = end, place + 1
        return ranges


@lru_cache(maxsize=8)
def _shard_order(
    seed: int, epoch: int, sizes: tuple[int, ...]
) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """The shards in the order of an epoch, and the number of pairs up to the end of each."""
    priority = random_bits(seed, "shards", np.arange(len(sizes)), epoch)
    order = np.argsort(priority, kind="stable")
    return order, np.cumsum(np.array(sizes)[order])
