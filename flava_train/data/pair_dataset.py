"""A map-style torch dataset of the pairs of a manifest, for training code other than ours."""

import operator
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from flava_train.data.file_cache import FileCache
from flava_train.data.manifests import load_complete_manifest
from flava_train.data.pixels import crop_image
from flava_train.data.shard_readers import ImageShard, ShardLocation, load_ledger
from pmd_pipeline.contract.boxes import WHOLE_IMAGE, Box
from pmd_pipeline.contract.errors import PmdError

_MAX_OPEN_SHARDS = 64
"""Each has about 1 MB of ledger in memory."""


class ImageTextPair(NamedTuple):
    """One image, or one region of it, with one caption.

    Args:
        image: RGB, or what `transform` returns.
        caption: text, or what `tokenize` returns.
        key: of the record, 16 hex digits; equal for all captions of an image.
        source: name of the source.
        box: the region that the caption describes, `x0, y0, x1, y1` as fractions of the stored
            image; (0, 0, 1, 1) where it describes the whole image.
    """

    image: Any
    caption: Any
    key: str
    source: str
    box: Box


class PairDataset(Dataset[ImageTextPair]):
    """The pairs of a manifest by index, in the order of its shards.

    Any pair is read directly: the ledger has the byte offsets of its image and captions in the
    tar. Shards are opened when they are first needed, in each process anew, and only the most
    recently used stay open. So the dataset can be pickled and works in workers of a `DataLoader`
    that are forked or spawned.

    The captions of an image have consecutive indices, and so have the pairs of a shard. A sampler
    that mixes far more shards than stay open reads their ledgers again and again; shuffle within
    groups of `shard_ranges` then.

    Args:
        manifest: path or address of a manifest of pairs.
        transform: called with each image.
        tokenize: called with each caption.
        crop: crop an image to the caption's box, rounded outwards to whole pixels. If false, the
            image is whole and `box` says where the region is.
        cache: folder for copies of shards that are not on this machine.
        cache_gib: size limit of all copies; the least recently used are removed.
        verify: compare the SHA-256 of each shard before it is used, at most once a day.

    Attributes:
        digest: of the manifest, the version of the dataset.
        shard_ranges: the indices of each shard.

    Raises:
        PmdError: the manifest cannot be used, lacks parts, or holds no pairs. `dataset[i]` raises
            it too, for a shard that is missing or does not hold what the manifest states.
    """

    def __init__(
        self,
        manifest: str | os.PathLike[str],
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        tokenize: Callable[[str], Any] | None = None,
        crop: bool = True,
        cache: str | os.PathLike[str] | None = None,
        cache_gib: float = 200.0,
        verify: bool = True,
    ) -> None:
        address = os.fspath(manifest)
        loaded = load_complete_manifest(address)
        if loaded.kind != "pairs":
            raise PmdError(f"{address} holds {loaded.kind}, but PairDataset needs pairs")
        self.digest = loaded.digest
        self._locations = [ShardLocation(address, entry) for entry in loaded.shards if entry.pairs]
        ends = np.cumsum([location.entry.pairs for location in self._locations], dtype=int).tolist()
        self.shard_ranges = [range(*limits) for limits in pairwise([0, *ends])]
        self._transform, self._tokenize, self._crop = transform, tokenize, crop
        folder = None if cache is None else Path(cache)
        self._files = FileCache(folder, int(cache_gib * 2**30), verify=verify)
        self._shards: OrderedDict[int, ImageShard] = OrderedDict()

    def __len__(self) -> int:
        """Pairs of the manifest."""
        return self.shard_ranges[-1].stop if self.shard_ranges else 0

    def __getitem__(self, index: SupportsIndex) -> ImageTextPair:
        """The pair at `index`, which counts from the end where it is negative."""
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"pair {number} of {len(self):,}")
        number %= len(self)
        place = bisect_right(self.shard_ranges, number, key=lambda one: one.start) - 1
        shard = self._shard(place)
        in_shard = np.array([number - self.shard_ranges[place].start])
        sample, caption = (int(one[0]) for one in shard.ledger.samples(in_shard))
        text = shard.captions(sample)
        box = text.boxes[caption] if text.boxes else WHOLE_IMAGE
        image: Any = shard.image(sample)
        if self._crop and box != WHOLE_IMAGE:
            image = crop_image(image, box)
        return ImageTextPair(
            image if self._transform is None else self._transform(image),
            text.captions[caption]
            if self._tokenize is None
            else self._tokenize(text.captions[caption]),
            shard.key(sample),
            self._locations[place].entry.source,
            box,
        )

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files, for another process."""
        return self.__dict__ | {"_shards": OrderedDict[Any, Any]()}

    def _shard(self, place: int) -> ImageShard:
        shard = self._shards.get(place)
        if shard is None:
            location = self._locations[place]
            shard = ImageShard(location, load_ledger(location, self._files), self._files)
        self._shards[place] = shard
        self._shards.move_to_end(place)
        if len(self._shards) > _MAX_OPEN_SHARDS:
            self._shards.popitem(last=False)
        return shard
