"""Losses as users write them, one of each kind."""

from dataclasses import replace

import torch
from torch import nn

from flava_train.objective.losses import EmbeddingLoss, Loss
from flava_train.objective.objective import LoadedLoss


def has_many_tokens(pairs):
    return (pairs.texts.lengths > 8).long()[:, None]


def squared_error(predictions, targets):
    return ((predictions - targets) ** 2).sum()


def lengths(texts):
    return texts.lengths[:, None, None].to(torch.get_default_dtype())


def quarter_turns(images):
    return torch.arange(len(images), device=images.pixels.device) % 4


def turned(inputs):
    """Logits of how often each image was turned, from a forward pass of its own."""
    images = inputs.batch
    turns = quarter_turns(images)
    pixels = torch.stack(
        [
            torch.rot90(image, int(turn), (1, 2))
            for image, turn in zip(images.pixels, turns, strict=True)
        ]
    )
    encoder = inputs.model.image
    return inputs.head(encoder.norm(encoder(pixels))[:, 0])


ENTRIES = {
    "masked_length": Loss(
        stream="pairs",
        encoder="image",
        head=lambda config: nn.Linear(config.image.width, 2),
        targets=has_many_tokens,
    ),
    "plain_length": Loss(
        stream="pairs",
        encoder="multimodal",
        masked=False,
        head=lambda config: nn.Linear(config.multimodal.width, 2),
        targets=has_many_tokens,
    ),
    "text_length": Loss(
        stream="texts",
        encoder="text",
        head=lambda config: nn.Linear(config.text.width, 1),
        targets=lengths,
        loss_sum=squared_error,
    ),
    "rotation": Loss(
        stream="images",
        head=lambda config: nn.Linear(config.image.width, 4),
        predict=turned,
        targets=quarter_turns,
    ),
    "distance": EmbeddingLoss(lambda of: (of.image - of.text)[of.matched].square().sum()),
}

USER_LOSSES = {
    name: LoadedLoss(f"user_losses:{name}", float(weight), entry=entry)
    for weight, (name, entry) in enumerate(ENTRIES.items(), 1)
}


def with_user_losses(objective):
    return replace(objective, losses=USER_LOSSES)
