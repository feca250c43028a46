"""A very small FLAVA, and batches for it."""

import numpy as np
import torch

from flava_train.data.batches import ImageBatch, PairBatch, TextBatch
from flava_train.data.masking import IGNORE
from flava_train.model.flava import PUBLISHED_HEADS, Flava, FlavaConfig, TowerConfig

PATCHES = 16
TINY = FlavaConfig(
    image=TowerConfig(layers=3, width=32, heads=4, hidden=48),
    text=TowerConfig(layers=2, width=32, heads=4, hidden=48),
    multimodal=TowerConfig(layers=1, width=32, heads=2, hidden=40),
    image_size=32,
    patch_size=8,
    image_vocab=67,
    text_vocab=101,
    text_positions=20,
    projection_dim=24,
)


def flava(config=TINY, *, dtype=torch.float64, seed=0, heads=PUBLISHED_HEADS):
    """A model whose parameters are all random: initial zeros and ones would hide mistakes."""
    torch.manual_seed(seed)
    model = Flava(config, heads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.06)
        model.logit_scale.fill_(1.5)
    return model.to(dtype)


def images(count, *, seed=0, dtype=torch.float64, width=6, config=TINY):
    rng = np.random.default_rng((1, seed))
    side = config.image_size
    positions, codes = _masked(rng, np.full(count, config.grid**2), width, config.image_vocab)
    return ImageBatch(
        torch.from_numpy(rng.normal(size=(count, 3, side, side))).to(dtype), positions, codes
    )


def texts(count, *, seed=0, width=3, longest=16, config=TINY, lengths=None):
    rng = np.random.default_rng((2, seed))
    lengths = rng.integers(3, longest + 1, count) if lengths is None else np.array(lengths)
    tokens = rng.integers(1, config.text_vocab, (count, longest))
    tokens[np.arange(longest) >= lengths[:, None]] = 0
    positions, labels = _masked(rng, lengths, width, config.text_vocab)
    masked = tokens.copy()
    for row in range(count):
        for position, label in zip(positions[row], labels[row], strict=True):
            if label != IGNORE:
                masked[row, position] = 5
    return TextBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(masked),
        torch.from_numpy(lengths),
        positions,
        labels,
    )


def pairs(count, *, seed=0, dtype=torch.float64, mismatched=(), config=TINY, lengths=None):
    rng = np.random.default_rng((3, seed))
    matched = torch.ones(count, dtype=torch.bool)
    matched[list(mismatched)] = False
    return PairBatch(
        images(count, seed=seed, dtype=dtype, config=config),
        texts(count, seed=seed, config=config, lengths=lengths),
        matched,
        torch.arange(count),
        torch.from_numpy(rng.random((count, 2)).astype(np.float32)),
    )


def gradients(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def max_difference(one, other):
    """Greatest absolute difference between two sets of tensors with equal names."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def _masked(rng, lengths, width, vocab):
    positions = np.zeros((len(lengths), width), np.int64)
    labels = np.full((len(lengths), width), IGNORE, np.int64)
    for row, length in enumerate(lengths):
        count = rng.integers(1, min(width, length) + 1)
        positions[row, :count] = np.sort(rng.choice(length, count, replace=False))
        labels[row, :count] = rng.integers(1, vocab, count)
    return torch.from_numpy(positions), torch.from_numpy(labels)
