"""AdamW with the paper's weight decay, and the schedule of the learning rate."""

import math

import torch
from torch import nn

from flava_train.config import OptimizerConfig
from flava_train.run.ranks import is_sharded


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of a model, with parameter groups with and without weight decay.

    The weights of linear layers have weight decay. Biases, normalisations, embeddings, positions,
    `[CLS]` and mask tokens and the temperature have none, unless `decay_all`.
    """
    linear = {id(part.weight) for part in model.modules() if isinstance(part, nn.Linear)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        decayed = config.decay_all or id(parameter) in linear
        # a fused update takes no mixture of sharded and whole tensors
        groups.setdefault((decayed, is_sharded(parameter)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0}
            for (decayed, _), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, of a run of `steps`.

    It increases from `lr / warmup` in the first step to `lr` in the last step of the warm-up. From
    there it decreases so that step number `steps`, after the last of the run, would have `end`.
    """
    if step < config.warmup:
        return config.lr * ((step + 1) / config.warmup)
    if config.schedule == "constant":
        return config.lr
    peak = max(config.warmup - 1, 0)
    progress = (step - peak) / (steps - peak)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    share = cosine if config.schedule == "cosine" else 1 - progress
    # a weighted mean, so that rounding misses neither end
    return config.lr * share + config.end * (1 - share)
