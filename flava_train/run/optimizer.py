"""AdamW as the paper sets it: what is decayed, and how the learning rate goes."""

import math

import torch
from torch import nn

from flava_train.config import OptimizerConfig
from flava_train.run.ranks import is_shared


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of a model, in groups: with and without weight decay.

    The weights of linear layers are decayed. Biases, normalisations, embeddings, positions,
    `[CLS]` and mask tokens and the temperature are not, unless `decay_all`.
    """
    linear = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        decayed = config.decay_all or id(parameter) in linear
        # apart, because a fused update takes no mixture of shared and whole tensors
        groups.setdefault((decayed, is_shared(parameter)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": held, "weight_decay": config.weight_decay if decayed else 0.0}
            for (decayed, _), held in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, of a run of `steps`.

    It rises from `lr / warmup` in the first step to `lr` in the last of the warm-up, and falls
    from there so that it would be `end` in step number `steps`, which is not taken.
    """
    if step < config.warmup:
        return config.lr * ((step + 1) / config.warmup)
    if config.schedule == "constant":
        return config.lr
    peak = max(config.warmup - 1, 0)
    way = (step - peak) / (steps - peak)
    # from both ends, so that neither is missed by a rounding
    left = (1 + math.cos(math.pi * way)) / 2 if config.schedule == "cosine" else 1 - way
    return config.lr * left + config.end * (1 - left)
