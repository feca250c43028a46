"""One training step: losses and the gradient of the whole global batch, exactly.

A batch comes as micro-batches that fit the device. The contrastive loss needs all rows at once;
with more than one micro-batch its gradient is computed by gradient caching (Gao et al.,
arXiv:2101.06983): embed everything without a graph, take the loss's gradient at the embeddings,
then embed each micro-batch again and send its share of that gradient down.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from flava_train.data.batches import ImageBatch, PairBatch, TextBatch
from flava_train.data.masking import IGNORE
from flava_train.model.flava import SCALE_RANGE, Flava
from flava_train.objective.losses import (
    Objective,
    contrastive_sum,
    is_distributed,
    masked_image_sum,
    masked_pair_sums,
    masked_text_sum,
    only_matched,
    sigmoid_sum,
)
from flava_train.shapes import Bool, Float, Int

BUCKET = 2**25
"""Gradients exchanged at once: 128 MiB in float32."""

_Kind = TypeVar("_Kind", PairBatch, ImageBatch, TextBatch)


def train_step(
    model: Flava,
    batch: Sequence[PairBatch | ImageBatch | TextBatch],
    objective: Objective,
    *,
    autocast: torch.dtype | None = None,
    loss_scale: Float[Tensor, ""] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Fill `.grad` with the gradient of the global batch; return this rank's share of the losses.

    Old gradients are forgotten. Where `torch.distributed` is initialised, every rank calls this
    with the same kind and number of rows, cut into micro-batches as it likes; all end up with
    the same gradient, so the model needs no DDP around it; `ranks.shard` may have shared it
    out. A loss, summed over the ranks, is the mean over the global batch, in nats and before
    weighting. Nothing here waits for the device.

    Args:
        model: its `logit_scale` is brought back into its range first.
        batch: this rank's micro-batches, all of one kind, on the model's device.
        objective: which losses count. A batch to which it gives no weight leaves no gradient.
        autocast: bfloat16 or float16 for matrix products.
        loss_scale: multiplies all gradients, so that float16 holds them;
            `scaler.scale(torch.ones((), device=device))` gives it without waiting.
    """
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.logit_scale.clamp_(*SCALE_RANGE)
    step = _Step(model, objective, autocast, loss_scale)
    if isinstance(batch[0], PairBatch):
        losses = step.of_pairs(_all_of(PairBatch, batch))
    elif isinstance(batch[0], ImageBatch):
        losses = step.of_images(_all_of(ImageBatch, batch))
    else:
        losses = step.of_texts(_all_of(TextBatch, batch))
    _sum_over_ranks(parameter.grad for parameter in model.parameters())
    return losses


def with_negatives(
    pairs: PairBatch, likeness: Float[Tensor, "b b"] | None, objective: Objective
) -> PairBatch:
    """The pairs as the multimodal encoder sees them: some with another caption of the same batch.

    Never a caption of the same image, nor one that reads the same; where no other is left, the
    pair stays. Captions of a micro-batch have about one length, so length betrays nothing. Where
    ITM has no weight nothing is swapped: it would only take pairs from the other losses.

    Args:
        pairs: a micro-batch.
        likeness: logits of image i with text j, for `hard` negatives.
        objective: says how many, and how they are drawn.
    """
    if not objective.itm or objective.itm_negatives == "dataset":
        return pairs
    texts = pairs.texts
    same_text = (texts.tokens[:, None] == texts.tokens).all(2)
    same = same_text | (pairs.image_ids[:, None] == pairs.image_ids)  # b b
    logits = torch.zeros(same.shape, device=same.device) if likeness is None else likeness.float()
    mass = logits.masked_fill(same, torch.finfo(logits.dtype).min).softmax(1).cumsum(1)
    drawn = (mass <= pairs.uniforms[:, 1:] * mass[:, -1:]).sum(1).clamp(max=len(pairs) - 1)
    usable = ~same.gather(1, drawn[:, None])[:, 0]
    swap = pairs.matched & usable & (pairs.uniforms[:, 0] < objective.itm_rate)
    source = torch.where(swap, drawn, torch.arange(len(pairs), device=drawn.device))
    # the unmasked tokens stay: contrast is between true pairs
    swapped = replace(
        texts, masked_tokens=texts.masked_tokens[source], lengths=texts.lengths[source]
    )
    return replace(pairs, texts=swapped, matched=pairs.matched & ~swap)


@dataclass(frozen=True)
class _Step:
    """The arguments of one `train_step`."""

    model: Flava
    objective: Objective
    autocast: torch.dtype | None
    loss_scale: Float[Tensor, ""] | None

    def of_images(self, batch: Sequence[ImageBatch]) -> dict[str, Float[Tensor, ""]]:
        """MIM."""
        if not self.objective.mim:
            return {}
        counts = _global({"mim": [_num_labels(piece.codes) for piece in batch]})
        return self._descend(
            batch, lambda piece: {"mim": masked_image_sum(self.model, piece)}, counts
        )

    def of_texts(self, batch: Sequence[TextBatch]) -> dict[str, Float[Tensor, ""]]:
        """MLM."""
        if not self.objective.mlm:
            return {}
        counts = _global({"mlm": [_num_labels(piece.labels) for piece in batch]})
        return self._descend(
            batch, lambda piece: {"mlm": masked_text_sum(self.model, piece)}, counts
        )

    def of_pairs(self, batch: Sequence[PairBatch]) -> dict[str, Float[Tensor, ""]]:
        """Contrast over the whole batch, then the masked losses over each micro-batch."""
        objective = self.objective
        contrasts, fuses = bool(objective.contrastive), objective.fuses
        hard = bool(objective.itm) and objective.itm_negatives == "hard"
        cached = len(batch) > 1 or not contrasts
        embedded: list[tuple[Tensor, Tensor]] = []
        if contrasts or hard:
            with torch.set_grad_enabled(not cached):
                embedded = [self._embed(piece) for piece in batch]
        fused = [
            with_negatives(piece, self._likeness(*embedded[i]) if hard else None, objective)
            for i, piece in enumerate(batch)
        ]
        counts = _global(
            {
                "contrastive": [self._num_contrasted(piece) for piece in batch],
                "mmm_image": [_num_labels(_matched(piece.images.codes, piece)) for piece in fused],
                "mmm_text": [_num_labels(_matched(piece.texts.labels, piece)) for piece in fused],
                "itm": [torch.ones_like(piece.matched).sum() for piece in fused],
            }
        )
        losses = {}
        if contrasts:
            losses["contrastive"] = self._contrast(batch, embedded, counts["contrastive"])
        if fuses:
            losses |= self._descend(
                fused, lambda piece: masked_pair_sums(self.model, piece, objective), counts
            )
        return losses

    def _contrast(
        self,
        batch: Sequence[PairBatch],
        embedded: Sequence[tuple[Tensor, Tensor]],
        count: Int[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """Gradient of the contrastive loss, through the embeddings of all micro-batches."""
        image = torch.cat([image for image, _ in embedded])
        text = torch.cat([text for _, text in embedded])
        cached = not image.requires_grad
        if cached:
            image.requires_grad_()
            text.requires_grad_()
        matched = torch.cat([piece.matched for piece in batch])
        loss = self._contrast_sum(image, text, matched) / count
        self._backward(self.objective.contrastive * loss)
        if cached:
            sizes = [len(piece) for piece in batch]
            assert image.grad is not None
            assert text.grad is not None
            gradients = zip(image.grad.split(sizes), text.grad.split(sizes), strict=True)
            for piece, (of_image, of_text) in zip(batch, gradients, strict=True):
                again = self._embed(piece)
                torch.autograd.backward(again, (of_image, of_text))  # scaled already
        return loss.detach()

    def _contrast_sum(
        self, image: Float[Tensor, "n d"], text: Float[Tensor, "n d"], matched: Bool[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        scale, bias = self.model.logit_scale.exp(), self.model.logit_bias
        if self.objective.contrast != "siglip":
            return contrastive_sum(image, text, matched, scale, through=self.objective.contrast)
        if bias is None:
            raise ValueError("SigLIP's loss needs a model with FlavaConfig(logit_bias=-10.0)")
        return sigmoid_sum(image, text, matched, scale, bias)

    def _num_contrasted(self, pairs: PairBatch) -> Int[Tensor, ""]:
        if self.objective.contrast == "siglip":  # a mismatched pair is one more question
            return torch.ones_like(pairs.matched).sum()
        return pairs.matched.sum()

    def _descend(
        self,
        batch: Sequence[_Kind],
        sums: Callable[[_Kind], dict[str, Tensor]],
        counts: dict[str, Tensor],
    ) -> dict[str, Float[Tensor, ""]]:
        """Gradient of weighted losses, one micro-batch at a time."""
        losses: dict[str, Tensor] = {}
        for piece in batch:
            with self._precision():
                shares = {name: total / counts[name] for name, total in sums(piece).items()}
            weighted = [getattr(self.objective, name) * share for name, share in shares.items()]
            self._backward(torch.stack(weighted).sum())
            for name, share in shares.items():
                losses[name] = losses.get(name, 0) + share.detach()
        return losses

    def _embed(self, pairs: PairBatch) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        with self._precision():
            image = self.model.embed_images(pairs.images.pixels)
            text = self.model.embed_texts(pairs.texts.tokens, pairs.texts.lengths)
        return image, text

    def _likeness(
        self, image: Float[Tensor, "b d"], text: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b b"]:
        return (self.model.logit_scale.exp() * image @ text.T).detach()

    def _backward(self, loss: Float[Tensor, ""]) -> None:
        (loss if self.loss_scale is None else loss * self.loss_scale).backward()

    def _precision(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.model.logit_scale.device.type, self.autocast)


def _all_of(kind: type[_Kind], batch: Sequence[PairBatch | ImageBatch | TextBatch]) -> list[_Kind]:
    same = [piece for piece in batch if isinstance(piece, kind)]
    if len(same) < len(batch):
        raise TypeError(f"a batch that begins with {kind.__name__} holds other kinds too")
    return same


def _matched(labels: Int[Tensor, "b m"], pairs: PairBatch) -> Int[Tensor, "b m"]:
    return only_matched(labels, pairs.matched)


def _num_labels(labels: Int[Tensor, "b m"]) -> Int[Tensor, ""]:
    return (labels != IGNORE).sum()


def _global(counts: dict[str, list[Int[Tensor, ""]]]) -> dict[str, Int[Tensor, ""]]:
    """Counts over all ranks, at least 1, so that nothing to predict is no loss."""
    total = torch.stack([torch.stack(pieces).sum() for pieces in counts.values()])
    if is_distributed():
        dist.all_reduce(total)
    return dict(zip(counts, total.clamp_min(1).unbind(), strict=True))


def _sum_over_ranks(gradients: Iterable[Tensor | None]) -> None:
    """Replace each gradient by the sum over the ranks, a bucket at a time."""
    if not is_distributed():
        return
    bucket: list[Tensor] = []
    for gradient in gradients:
        if gradient is None:  # on every rank, since all take the same kind of batch
            continue
        if isinstance(gradient, DTensor):  # FSDP2 has added these up, and shared them out
            continue
        if bucket and sum(held.numel() for held in bucket) + gradient.numel() > BUCKET:
            _exchange(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _exchange(bucket)


def _exchange(gradients: Sequence[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))
