"""Held-out images with all their captions, in the order of their manifest."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from flava_train.data.batch_slice import ImageCrop
from flava_train.data.file_cache import FileCache
from flava_train.data.manifests import load_complete_manifest
from flava_train.data.shard_readers import ImageShard, ShardLocation, load_ledger
from flava_train.data.wordpiece import WordPiece
from flava_train.shapes import Int, UInt
from pmd_pipeline.contract.boxes import WHOLE_IMAGE
from pmd_pipeline.contract.errors import PmdError


@dataclass(frozen=True)
class EvaluationBatch:
    """Some images with all their captions.

    Args:
        pixels: of whole images; of regions, if the captions have boxes.
        tokens: of all captions of these images.
        lengths: tokens in each row.
        image_rows: the image of each caption, counted over the whole manifest.
        keys: of the images' records.
    """

    pixels: UInt[Tensor, "n 3 size size"]
    tokens: Int[Tensor, "m l"]
    lengths: Int[Tensor, " m"]
    image_rows: Int[Tensor, " m"]
    keys: list[str]


def evaluation_batches(
    manifest: str,
    wordpiece: WordPiece,
    image_size: int,
    caption_tokens: int,
    *,
    batch: int = 256,
    files: FileCache | None = None,
) -> Iterator[EvaluationBatch]:
    """All images of a manifest, `batch` at a time, in its order.

    Raises:
        PmdError: the manifest holds no pairs, or a shard does not hold what it states.
    """
    files = files or FileCache()
    loaded = load_complete_manifest(manifest)
    if loaded.kind != "pairs":
        raise PmdError(f"{manifest} holds {loaded.kind}, but evaluation needs pairs")
    crops = _crops([ShardLocation(manifest, entry) for entry in loaded.shards], files)
    first = 0
    while rows := list(islice(crops, batch)):
        tokens, lengths = wordpiece.encode(
            [caption for crop in rows for caption in crop.captions], caption_tokens
        )
        counts = [len(crop.captions) for crop in rows]
        pixels = np.stack([crop.pixels(image_size) for crop in rows])
        yield EvaluationBatch(
            torch.from_numpy(pixels),
            torch.from_numpy(tokens),
            torch.from_numpy(lengths),
            torch.from_numpy(np.repeat(np.arange(first, first + len(rows)), counts)),
            [crop.key for crop in rows],
        )
        first += len(rows)


def _crops(locations: list[ShardLocation], files: FileCache) -> Iterator[ImageCrop]:
    """Each image with its captions; an image with boxes gives a crop with one caption per box."""
    for location in locations:
        shard = ImageShard(location, load_ledger(location, files), files)
        for sample in range(location.entry.images):
            text = shard.captions(sample)
            if text.boxes is None:
                yield ImageCrop(shard, sample, 0, WHOLE_IMAGE, text.captions, 0)
                continue
            for number, box in enumerate(text.boxes):
                yield ImageCrop(shard, sample, 1 + number, box, [text.captions[number]], 0)
