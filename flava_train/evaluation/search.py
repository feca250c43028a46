"""Held-out images that a trained model finds for words."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flava_train.evaluation.batches import evaluation_batches
from flava_train.evaluation.evaluate import Embedder, file_cache
from flava_train.evaluation.trained_model import TrainedModel
from pmd_pipeline.contract.errors import PmdError


@dataclass(frozen=True)
class SearchHit:
    """A found image by the key of its record, and the cosine between it and the words."""

    key: str
    likeness: float


@torch.no_grad()
def search(
    trained: TrainedModel, manifest: str, queries: Sequence[str], nearest: int
) -> list[list[SearchHit]]:
    """For each query, the images of a manifest that are nearest to it, the nearest first.

    Args:
        trained: the model.
        manifest: of pairs; their captions are not looked at.
        queries: words, in one text each.
        nearest: images for each query, or all if there are fewer.

    Raises:
        PmdError: the manifest has no pairs, or its shards are not what it says.
    """
    data, section = trained.config.data, trained.config.evaluation
    encoder = Embedder(
        trained.model, trained.wordpiece, data.caption_tokens, section.batch, autocast=None
    )
    keys: list[str] = []
    vectors = []
    for one in evaluation_batches(
        manifest,
        trained.wordpiece,
        trained.model.config.image_size,
        data.caption_tokens,
        batch=section.batch,
        files=file_cache(data),
    ):
        keys += one.keys
        vectors.append(encoder.images(one.pixels))
    if not keys:
        raise PmdError(f"{manifest} has no images to search")
    likeness = encoder.texts(queries) @ torch.cat(vectors).T  # queries images
    found = likeness.topk(min(nearest, len(keys)))
    return [
        [SearchHit(keys[number], score) for number, score in zip(numbers, scores, strict=True)]
        for numbers, scores in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
