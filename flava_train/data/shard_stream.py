"""The shards of one stream, opened as its order asks for them."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flava_train.data.file_cache import ExpectedFile, FileCache
from flava_train.data.image_codes import ShardCodes, open_codes
from flava_train.data.ledgers import Ledger, Record, read_image, read_ledger, read_record
from flava_train.data.order import SampleOrder, Window
from flava_train.shapes import Array, Int, UInt
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import located
from pmd_pipeline.contract.models import CodeRules, ShardEntry
from pmd_pipeline.contract.paths import part_name

_OPEN = 128
"""Shards that are kept open at once."""

_KEPT = 2
"""Windows that are kept at once: steps of two may be under way."""


@dataclass(frozen=True)
class ShardLocation:
    """A shard of a manifest.

    Args:
        manifest: its address, which the shard's path is relative to.
        entry: what it says of the shard.
        codes: how the image codes beside it were made, if they are wanted.
        captioned: its images have captions.
    """

    manifest: str
    entry: ShardEntry
    codes: CodeRules | None = None
    captioned: bool = True

    @property
    def name(self) -> str:
        """Of the shard, for errors and explanations."""
        return located(self.manifest, self.entry.path)

    @property
    def files(self) -> dict[str, ExpectedFile]:
        """All files of it that are read."""
        entry = self.entry
        found = {"shard": ExpectedFile(self.name, entry.sha256)}
        if not entry.path.endswith(".parquet"):
            ledger = located(self.manifest, entry.ledger_path)
            found["ledger"] = ExpectedFile(ledger, entry.ledger_sha256)
        if self.codes and entry.codes_sha256:
            codes = located(self.manifest, entry.codes_path)
            found["codes"] = ExpectedFile(codes, entry.codes_sha256)
        return found


class ImageShard:
    """A shard of images, opened.

    Args:
        place: where it is.
        ledger: of its samples.
        files: where files lie.
    """

    def __init__(self, place: ShardLocation, ledger: Ledger, files: FileCache) -> None:
        self.name = place.name
        self.ledger = ledger
        self._captioned = place.captioned
        wanted = place.files
        self._file = files.open(wanted["shard"], lambda path: os.open(path, os.O_RDONLY))
        weakref.finalize(self, os.close, self._file)
        self.views: ShardCodes | None = None
        rules = place.codes
        if rules:
            self.views = files.open(
                wanted["codes"], lambda path: open_codes(path, place.entry, rules)
            )

    def record(self, sample: int) -> Record:
        """The captions of a sample."""
        return read_record(self._file, self.ledger, sample, self.name, captioned=self._captioned)

    def jpeg(self, sample: int) -> bytes:
        """The image of a sample."""
        return read_image(self._file, self.ledger, sample, self.name)

    def size(self, sample: int) -> tuple[int, int]:
        """Width and height of the image of a sample."""
        columns = self.ledger.columns
        return int(columns["width"][sample]), int(columns["height"][sample])

    def key(self, sample: int) -> str:
        """The key of a sample."""
        key: str = self.ledger.keys[sample].decode()
        return key


class TextShard:
    """A shard of texts, opened."""

    def __init__(self, place: ShardLocation, files: FileCache) -> None:
        self.name = place.name
        self._named = f"{place.entry.source}-{part_name(place.entry.part)}"
        try:
            self._file = files.open(place.files["shard"], pq.ParquetFile)
            groups = [self._file.metadata.row_group(n) for n in range(self._file.num_row_groups)]
            self._ends = np.cumsum([group.num_rows for group in groups])
        except pa.ArrowException as error:
            raise self._unfit(str(error)) from error
        if self._file.metadata.num_rows != place.entry.pairs:
            raise self._unfit("it has another number of rows")

    def texts(self, rows: Sequence[int]) -> list[str]:
        """The texts of the given rows."""
        groups: dict[int, list[object]] = {}
        found = []
        for row in rows:
            group = int(np.searchsorted(self._ends, row, side="right"))
            if group not in groups:
                groups[group] = self._group(group)
            text = groups[group][row - (int(self._ends[group - 1]) if group else 0)]
            if not isinstance(text, str):
                raise self._unfit(f"row {row} has no text")
            found.append(text)
        return found

    def key(self, row: int) -> str:
        """What names a row among all shards."""
        return f"{self._named}-{row}"

    def _group(self, group: int) -> list[object]:
        try:
            column = self._file.read_row_group(group, columns=["text"], use_threads=False)["text"]
        except (pa.ArrowException, KeyError, OSError) as error:
            raise self._unfit(str(error)) from error
        texts: list[object] = column.to_pylist()
        return texts

    def _unfit(self, detail: str) -> PmdError:
        reason = detail.partition("\n")[0]
        return PmdError(f"{self.name} is not the shard that its manifest names: {reason}")


@dataclass(frozen=True)
class OpenWindow:
    """A window with the ledgers of its shards.

    Args:
        window: which pairs it has.
        ledgers: of its shards; none of texts.
        dealt: which of its pairs make which batch.
    """

    window: Window
    ledgers: dict[int, Ledger]
    dealt: Int[Array, "k b"]

    @cached_property
    def pairs(self) -> int:
        """In all its pieces."""
        return sum(piece.stop - piece.start for piece in self.window.pieces)

    @cached_property
    def _starts(self) -> Int[Array, " p"]:
        sizes = [piece.stop - piece.start for piece in self.window.pieces]
        return np.cumsum([0, *sizes[:-1]])

    def locate(
        self, pairs: Int[Array, " n"]
    ) -> tuple[Int[Array, " n"], Int[Array, " n"], Int[Array, " n"]]:
        """Shard and sample of pairs of the window, and which of the sample's pairs they are."""
        piece = np.searchsorted(self._starts, pairs, side="right") - 1
        shards = np.array([one.shard for one in self.window.pieces])[piece]
        firsts = np.array([one.start for one in self.window.pieces])[piece]
        samples = pairs - self._starts[piece] + firsts
        nth = np.zeros_like(samples)
        for shard in np.unique(shards) if self.ledgers else ():
            here = shards == shard
            samples[here], nth[here] = self.ledgers[int(shard)].samples(samples[here])
        return shards, samples, nth


class ShardStream:
    """All shards of one stream, and the order in which they are seen.

    Args:
        places: the shards.
        order: of their pairs.
        files: where their files lie.
    """

    def __init__(
        self, places: Sequence[ShardLocation], order: SampleOrder, files: FileCache
    ) -> None:
        self.places = list(places)
        self.order = order
        self.ahead = False
        self._files = files
        self._windows: OrderedDict[tuple[int, int], OpenWindow] = OrderedDict()
        self._opened: OrderedDict[int, ImageShard | TextShard] = OrderedDict()
        self._coming: tuple[tuple[int, int], threading.Thread] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: nothing opened."""
        closed = {"_windows": OrderedDict[Any, Any](), "_opened": OrderedDict[Any, Any]()}
        return self.__dict__ | closed | {"_coming": None}

    def batch(self, index: int) -> tuple[OpenWindow, Int[Array, " b"]]:
        """Batch number `index` of the stream: its window, and its pairs there."""
        epoch, number, row = self.order.place(index)
        window = self._window(epoch, number)
        if self.ahead and row >= window.window.batches // 4:
            self._prepare(self.order.after(epoch, number))
        return window, window.dealt[row]

    def shard(self, number: int, window: OpenWindow) -> ImageShard:
        """A shard of the window, opened."""
        found = self._opened.get(number)
        if not isinstance(found, ImageShard):
            found = ImageShard(self.places[number], window.ledgers[number], self._files)
        self._keep(number, found)
        return found

    def texts(self, number: int) -> TextShard:
        """A shard of texts, opened."""
        found = self._opened.get(number)
        if not isinstance(found, TextShard):
            found = TextShard(self.places[number], self._files)
        self._keep(number, found)
        return found

    def _keep(self, number: int, shard: ImageShard | TextShard) -> None:
        self._opened[number] = shard
        self._opened.move_to_end(number)
        if len(self._opened) > _OPEN:
            self._opened.popitem(last=False)  # whoever still reads from it keeps it open

    def _window(self, epoch: int, number: int) -> OpenWindow:
        name = epoch, number
        if name not in self._windows and self._coming and self._coming[0] == name:
            self._coming[1].join()
        if name not in self._windows:
            self._windows[name] = self._open(epoch, number)
        self._windows.move_to_end(name)
        while len(self._windows) > _KEPT:
            self._windows.popitem(last=False)
        return self._windows[name]

    def _open(self, epoch: int, number: int) -> OpenWindow:
        window = self.order.window(epoch, number)
        shards = sorted({piece.shard for piece in window.pieces})
        self._files.fetch([one for shard in shards for one in self.places[shard].files.values()])
        ledgers = {
            number: load_ledger(self.places[number], self._files)
            for number in shards
            if "ledger" in self.places[number].files
        }
        images = np.concatenate(
            [
                ledgers[one.shard].images_of(one.start, one.stop) if ledgers else
                _distinct(one.shard, one.start, one.stop)
                for one in window.pieces
            ]
        )  # fmt: skip
        return OpenWindow(window, ledgers, self.order.deal(window, images))

    def _prepare(self, name: tuple[int, int]) -> None:
        """Open a window in the background, before it is needed."""
        if name in self._windows or (self._coming and self._coming[0] == name):
            return

        def prepare() -> None:
            try:
                window = self._open(*name)
            except PmdError:
                return  # whoever needs the window finds out again, and can say so
            self._windows[name] = window

        thread = threading.Thread(target=prepare, daemon=True)
        self._coming = name, thread
        thread.start()


def load_ledger(place: ShardLocation, files: FileCache) -> Ledger:
    """The ledger of a shard of images."""

    def read(path: Path) -> Ledger:
        with path.open("rb") as file:
            return read_ledger(file, place.entry)

    return files.open(place.files["ledger"], read)


def _distinct(shard: int, start: int, stop: int) -> UInt[Array, " n"]:
    """A number for each text, since no two belong together."""
    return np.arange(start, stop, dtype=np.uint64) + np.uint64(shard << 32)
