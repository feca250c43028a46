"""Zero-shot retrieval: recall at 1, 5 and 10, with ties counted by their expectation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flava_train.evaluation.result import EvaluationResult
from flava_train.shapes import Float, Int

RECALL_AT = (1, 5, 10)

_QUERIES_AT_ONCE = 512
"""Queries whose similarities are in memory at a time."""


def retrieval_recall(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], image_rows: Int[Tensor, " m"]
) -> EvaluationResult:
    """Recall at 1, 5 and 10, in both directions, as in the CLIP papers.

    A caption has one correct image; an image has several correct captions, of which one must be
    among the first. Candidates of equal similarity are counted as if in random order: each query
    contributes the probability that a correct one is among the first. A model that gives all
    candidates the same similarity so gets the recall of random guessing.

    Args:
        images: unit vectors.
        texts: unit vectors.
        image_rows: row of `images` that each text belongs to.
    """
    order = torch.argsort(image_rows, stable=True)
    counts = torch.bincount(image_rows, minlength=len(images))
    captions = order.split(counts.tolist())
    captioned = torch.arange(len(images), device=images.device)[counts > 0].tolist()
    metrics, chance = {}, {}
    for name, queries, candidates, targets in (
        ("text_to_image", texts, images, list(image_rows[:, None])),
        ("image_to_text", images[counts > 0], texts, [captions[image] for image in captioned]),
    ):
        recalls = _expected_recall(queries, candidates, targets)
        # vectors of no numbers have equal similarity
        guesses = _expected_recall(queries[:, :0], candidates[:, :0], targets)
        for rank, recall, guess in zip(RECALL_AT, recalls, guesses, strict=True):
            metrics[f"{name}_r{rank}"], chance[f"{name}_r{rank}"] = recall, guess
    return EvaluationResult(metrics, chance)


def _expected_recall(
    queries: Float[Tensor, "q d"], candidates: Float[Tensor, "k d"], targets: Sequence[Tensor]
) -> list[float]:
    """Mean probability that a target of a query is among the first, for each of `RECALL_AT`."""
    most_targets = max(len(target) for target in targets)
    padded = torch.full((len(targets), most_targets), -1, device=queries.device)
    for row, target in enumerate(targets):
        padded[row, : len(target)] = target
    sums = torch.zeros(len(RECALL_AT), dtype=torch.float64)
    for rows in torch.arange(len(queries), device=queries.device).split(_QUERIES_AT_ONCE):
        similarity = queries[rows] @ candidates.T  # rows k
        of_targets = similarity.gather(1, padded[rows].clamp_min(0))
        of_targets = of_targets.masked_fill(padded[rows] < 0, -math.inf)
        best = of_targets.max(1, keepdim=True).values
        num_above = (similarity > best).sum(1)
        num_tied = (similarity == best).sum(1)
        num_tied_targets = (of_targets == best).sum(1)
        sums += _sum_of_probabilities(
            num_above.double().cpu(), num_tied.double().cpu(), num_tied_targets.double().cpu()
        )
    return (sums / len(queries)).tolist()


def _sum_of_probabilities(
    num_above: Float[Tensor, " q"],
    num_tied: Float[Tensor, " q"],
    num_tied_targets: Float[Tensor, " q"],
) -> Float[Tensor, " ranks"]:
    """Sum over queries of the probability that a target is among the first.

    `num_above` candidates come first; then `num_tied` ones in random order, some of them targets.
    """
    missed = torch.ones_like(num_above)  # probability that no place so far has a target
    sums = []
    for place in range(max(RECALL_AT)):
        num_drawn = place - num_above  # tied candidates in the places before this one
        is_tied = (num_drawn >= 0) & (num_drawn < num_tied)
        num_others = (num_tied - num_tied_targets - num_drawn).clamp_min(0)
        miss = num_others / (num_tied - num_drawn).clamp_min(1)
        missed = torch.where(is_tied, missed * miss, missed)
        if place + 1 in RECALL_AT:
            sums.append((1 - missed).sum())
    return torch.stack(sums)
