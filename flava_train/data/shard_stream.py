"""The shards of one stream, opened window by window as the sample order reaches them."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from flava_train.data.file_cache import FileCache
from flava_train.data.ledgers import ShardLedger
from flava_train.data.order import SampleOrder, Window
from flava_train.data.shard_readers import ImageShard, ShardLocation, TextShard, load_ledger
from flava_train.shapes import Array, Int, UInt
from pmd_pipeline.contract.errors import PmdError

_MAX_OPEN_SHARDS = 128
_MAX_OPEN_WINDOWS = 2
"""Steps of two windows may be loaded at the same time."""


@dataclass(frozen=True)
class OpenWindow:
    """A window with the ledgers of its shards.

    Args:
        window: the pairs in it.
        ledgers: by number of the shard; empty for texts.
        batches: pairs of each batch, as positions in the window's ranges.
    """

    window: Window
    ledgers: dict[int, ShardLedger]
    batches: Int[Array, "k b"]

    @cached_property
    def pairs(self) -> int:
        """Pairs of all ranges."""
        return sum(one.stop - one.start for one in self.window.ranges)

    @cached_property
    def _offsets(self) -> Int[Array, " p"]:
        sizes = [one.stop - one.start for one in self.window.ranges]
        return np.cumsum([0, *sizes[:-1]])

    def locate(
        self, pairs: Int[Array, " n"]
    ) -> tuple[Int[Array, " n"], Int[Array, " n"], Int[Array, " n"]]:
        """Shard and sample of pairs of the window, and each pair's number within its sample."""
        numbers = np.searchsorted(self._offsets, pairs, side="right") - 1
        shards = np.array([one.shard for one in self.window.ranges])[numbers]
        starts = np.array([one.start for one in self.window.ranges])[numbers]
        samples = pairs - self._offsets[numbers] + starts
        captions = np.zeros_like(samples)
        for shard in np.unique(shards) if self.ledgers else ():
            rows = shards == shard
            samples[rows], captions[rows] = self.ledgers[int(shard)].samples(samples[rows])
        return shards, samples, captions


class ShardStream:
    """All shards of one stream, and the order of their samples.

    A bounded number of windows and shards is open at a time.

    Args:
        locations: the shards.
        order: of their pairs.
        files: cache through which the files are opened.

    Attributes:
        prefetches: open the next window in a thread before it is needed; not for processes that
            fork.
    """

    def __init__(
        self, locations: Sequence[ShardLocation], order: SampleOrder, files: FileCache
    ) -> None:
        self.locations = list(locations)
        self.order = order
        self.prefetches = False
        self._files = files
        self._windows: OrderedDict[tuple[int, int], OpenWindow] = OrderedDict()
        self._shards: OrderedDict[int, ImageShard | TextShard] = OrderedDict()
        self._prefetching: tuple[tuple[int, int], threading.Thread] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files, for another process."""
        closed = {"_windows": OrderedDict[Any, Any](), "_shards": OrderedDict[Any, Any]()}
        return self.__dict__ | closed | {"_prefetching": None}

    def batch(self, index: int) -> tuple[OpenWindow, Int[Array, " b"]]:
        """Batch number `index` of the stream: its window, and its pairs in that window."""
        epoch, number, row = self.order.position(index)
        window = self._window(epoch, number)
        if self.prefetches and row >= window.window.batches // 4:
            self._prefetch(self.order.next_window(epoch, number))
        return window, window.batches[row]

    def image_shard(self, number: int, window: OpenWindow) -> ImageShard:
        """A shard of the window, opened."""
        shard = self._shards.get(number)
        if not isinstance(shard, ImageShard):
            shard = ImageShard(self.locations[number], window.ledgers[number], self._files)
        self._keep_open(number, shard)
        return shard

    def text_shard(self, number: int) -> TextShard:
        """A shard of texts, opened."""
        shard = self._shards.get(number)
        if not isinstance(shard, TextShard):
            shard = TextShard(self.locations[number], self._files)
        self._keep_open(number, shard)
        return shard

    def _keep_open(self, number: int, shard: ImageShard | TextShard) -> None:
        self._shards[number] = shard
        self._shards.move_to_end(number)
        if len(self._shards) > _MAX_OPEN_SHARDS:
            self._shards.popitem(last=False)  # it is closed when its last reader drops it

    def _window(self, epoch: int, number: int) -> OpenWindow:
        name = epoch, number
        if name not in self._windows and self._prefetching and self._prefetching[0] == name:
            self._prefetching[1].join()
        if name not in self._windows:
            self._windows[name] = self._open_window(epoch, number)
        self._windows.move_to_end(name)
        while len(self._windows) > _MAX_OPEN_WINDOWS:
            self._windows.popitem(last=False)
        return self._windows[name]

    def _open_window(self, epoch: int, number: int) -> OpenWindow:
        window = self.order.window(epoch, number)
        shards = sorted({one.shard for one in window.ranges})
        self._files.prefetch([file for shard in shards for file in self.locations[shard].files])
        ledgers = {
            shard: load_ledger(self.locations[shard], self._files)
            for shard in shards
            if self.locations[shard].ledger
        }
        image_ids = np.concatenate(
            [
                ledgers[one.shard].image_ids_of_pairs(one.start, one.stop) if ledgers else
                _distinct_ids(one.shard, one.start, one.stop)
                for one in window.ranges
            ]
        )  # fmt: skip
        return OpenWindow(window, ledgers, self.order.assign_batches(window, image_ids))

    def _prefetch(self, name: tuple[int, int]) -> None:
        """Open a window in a thread, before it is needed."""
        if name in self._windows or (self._prefetching and self._prefetching[0] == name):
            return

        def prefetch() -> None:
            try:
                window = self._open_window(*name)
            except PmdError:
                return  # `_window` meets the same error, in the thread that can report it
            self._windows[name] = window

        thread = threading.Thread(target=prefetch, daemon=True)
        self._prefetching = name, thread
        thread.start()


def _distinct_ids(shard: int, start: int, stop: int) -> UInt[Array, " n"]:
    """A different identifier for each text, since every one may share a batch with any other."""
    return np.arange(start, stop, dtype=np.uint64) + np.uint64(shard << 32)
