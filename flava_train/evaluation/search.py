"""Search: the images of a manifest that a trained model finds most similar to a text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flava_train.evaluation.batches import evaluation_batches
from flava_train.evaluation.embedder import Embedder
from flava_train.evaluation.trained_model import TrainedModel
from pmd_pipeline.contract.errors import PmdError


@dataclass(frozen=True)
class SearchHit:
    """An image by the key of its record, and its cosine similarity to the query."""

    key: str
    similarity: float


@torch.no_grad()
def search(
    trained: TrainedModel, manifest: str, queries: Sequence[str], nearest: int
) -> list[list[SearchHit]]:
    """For each query, the most similar images of a manifest in descending order.

    Args:
        trained: the model.
        manifest: of pairs; their captions are not used.
        queries: one text each.
        nearest: images for each query; all, if there are fewer.

    Raises:
        PmdError: the manifest holds no pairs, or a shard does not hold what it states.
    """
    data, section = trained.config.data, trained.config.evaluation
    embedder = Embedder(
        trained.model, trained.wordpiece, data.caption_tokens, section.batch, autocast=None
    )
    keys: list[str] = []
    vectors = []
    for batch in evaluation_batches(
        manifest,
        trained.wordpiece,
        trained.model.config.image_size,
        data.caption_tokens,
        batch=section.batch,
        files=data.file_cache(),
    ):
        keys += batch.keys
        vectors.append(embedder.images(batch.pixels))
    if not keys:
        raise PmdError(f"{manifest} has no images to search")
    similarity = embedder.texts(queries) @ torch.cat(vectors).T  # queries images
    top = similarity.topk(min(nearest, len(keys)))
    return [
        [SearchHit(keys[row], score) for row, score in zip(rows, scores, strict=True)]
        for rows, scores in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
