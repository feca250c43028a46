"""Held-out images with all their captions, in the order of their manifest, for evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from flava_train.data.batch_slice import ImageCrop
from flava_train.data.file_cache import FileCache
from flava_train.data.manifests import load_complete_manifest
from flava_train.data.shard_stream import ImageShard, ShardLocation, load_ledger
from flava_train.data.wordpiece import WordPiece
from flava_train.shapes import Int, UInt
from pmd_pipeline.contract.boxes import WHOLE_IMAGE
from pmd_pipeline.contract.errors import PmdError


@dataclass(frozen=True)
class EvaluationBatch:
    """Some images with all their captions.

    Args:
        pixels: of the whole images; of regions, where captions have boxes.
        tokens: of all captions of these images.
        lengths: tokens in each row.
        image_numbers: the image of each caption; images are counted over the whole manifest.
        keys: of the images' records.
    """

    pixels: UInt[Tensor, "n 3 size size"]
    tokens: Int[Tensor, "m l"]
    lengths: Int[Tensor, " m"]
    image_numbers: Int[Tensor, " m"]
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
        PmdError: the manifest holds no pairs, or its shards are not what it says.
    """
    files = files or FileCache()
    loaded = load_complete_manifest(manifest)
    if loaded.kind != "pairs":
        raise PmdError(f"{manifest} holds {loaded.kind}, and evaluation needs pairs")
    images = _images([ShardLocation(manifest, entry) for entry in loaded.shards], files)
    number = 0
    while rows := list(islice(images, batch)):
        tokens, lengths = wordpiece.encode(
            [text for one in rows for text in one.captions], caption_tokens
        )
        counts = [len(one.captions) for one in rows]
        pixels = np.stack([one.pixels(image_size) for one in rows])
        yield EvaluationBatch(
            torch.from_numpy(pixels),
            torch.from_numpy(tokens),
            torch.from_numpy(lengths),
            torch.from_numpy(np.repeat(np.arange(number, number + len(rows)), counts)),
            [one.shard.key(one.sample) for one in rows],
        )
        number += len(rows)


def _images(places: list[ShardLocation], files: FileCache) -> Iterator[ImageCrop]:
    """Every image with its captions; an image with boxes is as many regions, of one each."""
    for place in places:
        shard = ImageShard(place, load_ledger(place, files), files)
        for sample in range(place.entry.images):
            record = shard.record(sample)
            if record.boxes is None:
                yield ImageCrop(shard, sample, 0, WHOLE_IMAGE, record.captions, 0)
                continue
            for nth, box in enumerate(record.boxes):
                yield ImageCrop(shard, sample, 1 + nth, box, [record.captions[nth]], 0)
