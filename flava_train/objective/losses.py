"""The losses of FLAVA. One entry of `LOSSES` defines a loss with its head, its sum and its count.

A loss is a sum over the global batch divided by a count over the global batch. So neither
micro-batches nor ranks change its value, and a batch without targets gives zero instead of NaN.
`docs/model.md` lists what the paper leaves open.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812  # its name in all of PyTorch's documentation
from torch import Tensor, nn

from flava_train.data.batches import ImageBatch, PairBatch, TextBatch
from flava_train.data.masking import IGNORE
from flava_train.model.flava import PUBLISHED_HEADS, Flava, FlavaConfig, HeadFactory, gather
from flava_train.objective.gather import gather_rows, rank
from flava_train.shapes import Bool, Float, Int, Shaped

Batch = PairBatch | ImageBatch | TextBatch


ENCODERS = {"pairs": ("image", "text", "multimodal"), "images": ("image",), "texts": ("text",)}
"""The encoders that each stream has states of."""


@dataclass(frozen=True)
class LossInputs:
    """What the predictions of one micro-batch are computed from.

    Args:
        model: for a loss that needs a forward pass of its own.
        head: of the loss.
        batch: the micro-batch.
        states: of the encoder at the positions of the loss, after the final normalisation.
    """

    model: Flava
    head: nn.Module | None
    batch: Batch
    states: Float[Tensor, "b m d"] | None


def first_position(batch: Batch, _: FlavaConfig) -> Int[Tensor, "b 1"]:
    """Position of `[CLS]`, or of `[CLS_M]` of the multimodal encoder."""
    tensor = batch.tokens if isinstance(batch, TextBatch) else _images(batch).pixels
    return torch.zeros(len(batch), 1, dtype=torch.int64, device=tensor.device)


def head_of_states(inputs: LossInputs) -> Tensor:
    """What the head computes from the states."""
    assert inputs.head is not None
    predictions: Tensor = inputs.head(inputs.states)
    return predictions


def cross_entropy_sum(
    predictions: Float[Tensor, "*b v"], targets: Int[Tensor, "*b"]
) -> Float[Tensor, ""]:
    """Cross-entropy, summed over all targets but `IGNORE`, in nats."""
    wide = torch.promote_types(predictions.dtype, torch.float32)
    return F.cross_entropy(
        predictions.flatten(0, -2).to(wide),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )


def count_targets(targets: Shaped[Tensor, "..."]) -> Int[Tensor, ""]:
    """Number of targets that are not `IGNORE`."""
    return (targets != IGNORE).sum()


@dataclass(frozen=True)
class Loss:
    """A loss that is computed for each micro-batch by itself.

    Args:
        stream: the batches that it is computed for: `pairs`, `images` or `texts`.
        targets: what is to be predicted, of a batch; `IGNORE` marks what does not count.
        head: makes the module between states and predictions; none where `predict` needs none.
        encoder: whose states the head reads: `image`, `text` or `multimodal`; none where
            `predict` has a forward pass of its own.
        positions: where the states are read, of a batch.
        masked: whether the encoders get masked patches and tokens, and the captions that ITM has
            swapped; otherwise they get images and captions as they are.
        predicts_codes: whether the targets are codes of the image tokenizer.
        predict: computes the predictions.
        loss_sum: sum of the loss over the micro-batch, of predictions and targets.
        count: a whole number, of the targets. The loss is the sum over the global batch divided
            by the count over the global batch.
    """

    stream: Literal["pairs", "images", "texts"]
    targets: Callable[[Any], Tensor]
    head: HeadFactory | None = None
    encoder: Literal["image", "text", "multimodal"] | None = None
    positions: Callable[[Any, FlavaConfig], Tensor] = first_position
    masked: bool = True
    predicts_codes: bool = False
    predict: Callable[[LossInputs], Tensor] = head_of_states
    loss_sum: Callable[[Tensor, Tensor], Tensor] = cross_entropy_sum
    count: Callable[[Tensor], Tensor] = count_targets

    def __post_init__(self) -> None:
        encoders = ENCODERS.get(self.stream)
        if encoders is None:
            raise ValueError(f"there is no stream {self.stream!r}; there are {', '.join(ENCODERS)}")
        if self.encoder is not None and self.encoder not in encoders:
            raise ValueError(
                f"the stream {self.stream} has no encoder {self.encoder!r}; it has "
                f"{', '.join(encoders)}"
            )
        if self.predict is head_of_states and not (self.encoder and self.head):
            raise ValueError("a loss without `predict` needs an encoder and a head")


@dataclass(frozen=True)
class Embeddings:
    """The contrastive embeddings of this rank's pairs.

    Args:
        image: unit vectors.
        text: unit vectors; row i belongs to row i of `image`.
        matched: false for rows that are only negatives of others.
        scale: inverse temperature, already exponentiated.
        bias: of the logits; only models for SigLIP have it.
    """

    image: Float[Tensor, "n d"]
    text: Float[Tensor, "n d"]
    matched: Bool[Tensor, " n"]
    scale: Float[Tensor, " 1"]
    bias: Float[Tensor, " 1"] | None


@dataclass(frozen=True)
class EmbeddingLoss:
    """A loss of the contrastive embeddings of a whole batch of pairs, over all ranks.

    Args:
        loss_sum: this rank's part of the sum over the global batch.
        count: of `matched`; see `Loss`.
    """

    loss_sum: Callable[[Embeddings], Tensor]
    count: Callable[[Tensor], Tensor] = torch.sum
    stream: Literal["pairs"] = "pairs"


def clip_loss_sum(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    matched: Bool[Tensor, " n"],
    scale: Float[Tensor, " 1"],
    *,
    gradients: Literal["global", "local"] = "global",
) -> Float[Tensor, ""]:
    """Mean of image-to-text and text-to-image cross-entropy, summed over matched rows, in nats.

    The columns are the rows of all ranks. Rows of mismatched pairs are columns too, as further
    negatives. Every rank brings as many rows.

    Args:
        image: unit vectors.
        text: unit vectors; row i belongs to row i of `image`.
        matched: false for rows that are columns only.
        scale: inverse temperature, already exponentiated.
        gradients: see `gather_rows`. With `global`, the sum of all ranks' gradients is the
            gradient of the sum over the global batch.
    """
    all_image, all_text = gather_rows(image, text, gradients=gradients)
    targets = contrastive_targets(matched)
    to_text = F.cross_entropy(
        scale * image @ all_text.T, targets, ignore_index=IGNORE, reduction="sum"
    )
    to_image = F.cross_entropy(
        scale * text @ all_image.T, targets, ignore_index=IGNORE, reduction="sum"
    )
    return (to_text + to_image) / 2


def siglip_loss_sum(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    matched: Bool[Tensor, " n"],
    scale: Float[Tensor, " 1"],
    bias: Float[Tensor, " 1"],
) -> Float[Tensor, ""]:
    """SigLIP's loss: binary cross-entropy of each image with each text of all ranks, in nats.

    Row i with text i is positive if they are matched, everything else is negative. The count is
    the number of pairs, as published. Arguments as for `clip_loss_sum`.
    """
    _, all_text = gather_rows(image, text)
    logits = scale * image @ all_text.T + bias  # n all
    column = torch.arange(logits.shape[1], device=image.device)
    own = rank() * len(image) + torch.arange(len(image), device=image.device)
    positive = (column == own[:, None]) & matched[:, None]
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum()


def contrastive_targets(matched: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
    """For each row of this rank, the number of its own text among those of all ranks."""
    own = rank() * len(matched) + torch.arange(len(matched), device=matched.device)
    return torch.where(matched, own, IGNORE)


def _siglip_loss(embeddings: Embeddings) -> Float[Tensor, ""]:
    if embeddings.bias is None:
        raise ValueError("the SigLIP loss needs a model with FlavaConfig(logit_bias=-10.0)")
    both = embeddings.image, embeddings.text
    return siglip_loss_sum(*both, embeddings.matched, embeddings.scale, embeddings.bias)


def _clip_loss(gradients: Literal["global", "local"]) -> EmbeddingLoss:
    return EmbeddingLoss(
        lambda of: clip_loss_sum(of.image, of.text, of.matched, of.scale, gradients=gradients)
    )


CONTRASTIVE_LOSSES = {
    "clip_global": _clip_loss("global"),
    "clip_local": _clip_loss("local"),
    # a mismatched pair is one more negative, so it counts
    "siglip": EmbeddingLoss(_siglip_loss, lambda matched: torch.ones_like(matched).sum()),
}
"""The contrastive losses, of which an objective has one."""


def masked_patches(images: ImageBatch, num_patches: int) -> Bool[Tensor, "b {num_patches}"]:
    """True for the patches that are masked."""
    patch = torch.arange(num_patches, device=images.codes.device)
    hits = (images.masked_positions[..., None] == patch) & (images.codes != IGNORE)[..., None]
    return hits.any(1)


def targets_of_matched(
    targets: Int[Tensor, "b m"], matched: Bool[Tensor, " b"]
) -> Int[Tensor, "b m"]:
    """The targets, with `IGNORE` in place of those of mismatched pairs."""
    return torch.where(matched[:, None], targets, IGNORE)


def _patches_of_pairs(pairs: PairBatch, _: FlavaConfig) -> Int[Tensor, "b m"]:
    return 2 + pairs.images.masked_positions  # after [CLS_M] and [CLS]


def _tokens_of_pairs(pairs: PairBatch, config: FlavaConfig) -> Int[Tensor, "b w"]:
    return 2 + config.grid**2 + pairs.texts.masked_positions  # after [CLS_M], [CLS] and patches


def _head_of_cls(inputs: LossInputs) -> Float[Tensor, "b v"]:
    assert inputs.head is not None
    assert inputs.states is not None
    logits: Tensor = inputs.head(inputs.states[:, 0])
    return logits


LOSSES: dict[str, Loss] = {
    "mmm_image": Loss(
        stream="pairs",
        encoder="multimodal",
        positions=_patches_of_pairs,
        head=PUBLISHED_HEADS["mmm_image"],
        targets=lambda pairs: targets_of_matched(pairs.images.codes, pairs.matched),
        predicts_codes=True,
    ),
    "mmm_text": Loss(
        stream="pairs",
        encoder="multimodal",
        positions=_tokens_of_pairs,
        head=PUBLISHED_HEADS["mmm_text"],
        targets=lambda pairs: targets_of_matched(pairs.texts.labels, pairs.matched),
    ),
    "itm": Loss(
        stream="pairs",
        encoder="multimodal",
        head=PUBLISHED_HEADS["itm"],
        predict=_head_of_cls,
        targets=lambda pairs: pairs.matched.long(),
    ),
    "mim": Loss(
        stream="images",
        encoder="image",
        positions=lambda images, _: 1 + images.masked_positions,
        head=PUBLISHED_HEADS["mim"],
        targets=lambda images: images.codes,
        predicts_codes=True,
    ),
    "mlm": Loss(
        stream="texts",
        encoder="text",
        positions=lambda texts, _: texts.masked_positions,
        head=PUBLISHED_HEADS["mlm"],
        targets=lambda texts: texts.labels,
    ),
}
"""All losses but the contrastive one, by name.

Those of FLAVA have a weight in `Objective`; any other needs only an entry here, and is used as
`[objective.losses.<name>]`.

The multimodal losses share one pass in which both sides are masked; ITM reads it too, as in both
public ports. Mismatched pairs have no targets for masked modelling.
"""


def predict(model: Flava, batch: Batch, losses: Mapping[str, Loss]) -> dict[str, Tensor]:
    """Predictions of some losses for a micro-batch, from one pass through the encoders.

    Args:
        model: with the heads of the losses.
        batch: of the losses' stream.
        losses: by name; all of one stream, with equal `masked`.
    """
    states = _states(model, batch, losses)
    return {
        name: loss.predict(
            LossInputs(model, model.head(name) if loss.head else None, batch, states.get(name))
        )
        for name, loss in losses.items()
    }


def _states(model: Flava, batch: Batch, losses: Mapping[str, Loss]) -> dict[str, Tensor]:
    """Normalised states for each loss that reads an encoder."""
    readers: dict[str, list[str]] = {}
    for name, loss in losses.items():
        if loss.encoder:
            readers.setdefault(loss.encoder, []).append(name)
    read = {
        name: loss.positions(batch, model.config) for name, loss in losses.items() if loss.encoder
    }
    positions = {
        encoder: torch.cat([read[name] for name in names], dim=1)
        for encoder, names in readers.items()
    }
    masked = next(iter(losses.values())).masked
    states: dict[str, Tensor] = {}
    for encoder, joined in _encode(model, batch, positions, masked=masked).items():
        parts = joined.split([read[name].shape[1] for name in readers[encoder]], dim=1)
        # after the split, so that heads get whole tensors of one layout, whatever the width
        norm = model.get_submodule(f"{encoder}.norm")
        states |= zip(readers[encoder], map(norm, parts), strict=True)
    return states


def _encode(
    model: Flava, batch: Batch, positions: Mapping[str, Tensor], *, masked: bool
) -> dict[str, Tensor]:
    """States at some positions of some encoders, before the final normalisation."""
    fused = "multimodal" in positions  # it reads all states of both sides
    states: dict[str, Tensor] = {}
    if fused or "image" in positions:
        images = _images(batch)
        patch_mask = masked_patches(images, model.config.grid**2) if masked else None
        read = None if fused else positions["image"]
        states["image"] = model.image(images.pixels, patch_mask, read)
    if fused or "text" in positions:
        texts = _texts(batch)
        tokens = texts.masked_tokens if masked else texts.tokens
        read = None if fused else positions["text"]
        states["text"] = model.text(tokens, texts.lengths, read)
    if fused:
        lengths = _texts(batch).lengths
        states["multimodal"] = model.multimodal(
            states["image"], states["text"], lengths, positions["multimodal"]
        )
        for side in positions.keys() & {"image", "text"}:
            states[side] = gather(states[side], positions[side])
    return {encoder: states[encoder] for encoder in positions}


def _images(batch: Batch) -> ImageBatch:
    images = batch.images if isinstance(batch, PairBatch) else batch
    assert isinstance(images, ImageBatch), "texts have no image"
    return images


def _texts(batch: Batch) -> TextBatch:
    texts = batch.texts if isinstance(batch, PairBatch) else batch
    assert isinstance(texts, TextBatch), "images alone have no text"
    return texts
