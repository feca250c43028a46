"""One training step: the losses and the exact gradient of the whole global batch.

A batch consists of micro-batches that fit the device. The contrastive loss needs all rows at once.
With more than one micro-batch its gradient is computed by gradient caching (Gao et al.,
arXiv:2101.06983): embed all micro-batches without a graph, compute the gradient of the loss at the
embeddings, then embed each micro-batch again and backpropagate its part of that gradient.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from flava_train.data.batches import ImageBatch, PairBatch, TextBatch
from flava_train.model.flava import SCALE_RANGE, Flava
from flava_train.objective.gather import gather_rows, is_distributed
from flava_train.objective.losses import (
    Batch,
    EmbeddingLoss,
    Embeddings,
    Loss,
    contrastive_targets,
    predict,
)
from flava_train.objective.metrics import LossOutputs, MetricSums
from flava_train.objective.objective import Objective
from flava_train.shapes import Float, Int

BUCKET = 2**25
"""Numbers of gradients that are exchanged at once: 128 MiB in float32."""

STREAMS: dict[type, str] = {PairBatch: "pairs", ImageBatch: "images", TextBatch: "texts"}


def train_step(
    model: Flava,
    batch: Sequence[Batch],
    objective: Objective,
    *,
    autocast: torch.dtype | None = None,
    loss_scale: Float[Tensor, ""] | None = None,
    metrics: MetricSums | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Set `.grad` to the gradient of the global batch; return this rank's part of the losses.

    Earlier gradients are discarded. Where `torch.distributed` is initialised, every rank calls
    this with batches of the same kind and number of rows, cut into any micro-batches; all get the
    same gradient, so the model needs no DDP. `ranks.shard` may have sharded it. The sum of a loss
    over the ranks is its mean over the global batch, in nats and before weighting. Nothing here
    waits for the device.

    Args:
        model: with the heads of the objective; its `logit_scale` is clamped to its range first.
        batch: this rank's micro-batches, all of one kind, on the model's device.
        objective: the losses. A batch for which none counts leaves no gradient.
        autocast: bfloat16 or float16 for matrix products.
        loss_scale: factor of all gradients, against underflow in float16;
            `scaler.scale(torch.ones((), device=device))` gives it without waiting.
        metrics: measures the outputs of each loss.
    """
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.logit_scale.clamp_(*SCALE_RANGE)
    losses = _Step(model, objective, autocast, loss_scale, metrics).run(batch)
    _sum_over_ranks(parameter.grad for parameter in model.parameters())
    return losses


def with_negatives(
    pairs: PairBatch, similarity: Float[Tensor, "b b"] | None, objective: Objective
) -> PairBatch:
    """The pairs of the masked pass: some have another caption of the same micro-batch.

    Never a caption of the same image, nor one with the same tokens; a pair without any other
    caption keeps its own. Captions of a micro-batch have about the same length, so that the length
    does not give the mismatch away. Without ITM nothing is swapped, since the other losses get no
    targets from a swapped pair.

    Args:
        pairs: a micro-batch.
        similarity: logits of image i with text j, for `hard` negatives.
        objective: with the rate and the kind of negatives.
    """
    if not objective.itm or objective.itm_negatives == "dataset":
        return pairs
    texts = pairs.texts
    same_text = (texts.tokens[:, None] == texts.tokens).all(2)
    same = same_text | (pairs.image_ids[:, None] == pairs.image_ids)  # b b
    logits = torch.zeros(same.shape, device=same.device) if similarity is None else similarity
    logits = logits.float()
    mass = logits.masked_fill(same, torch.finfo(logits.dtype).min).softmax(1).cumsum(1)
    drawn = (mass <= pairs.uniforms[:, 1:] * mass[:, -1:]).sum(1).clamp(max=len(pairs) - 1)
    usable = ~same.gather(1, drawn[:, None])[:, 0]
    swap = pairs.matched & usable & (pairs.uniforms[:, 0] < objective.itm_rate)
    source = torch.where(swap, drawn, torch.arange(len(pairs), device=drawn.device))
    # the unmasked tokens stay: the contrastive loss is computed of the true pairs
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
    metrics: MetricSums | None

    def run(self, batch: Sequence[Batch]) -> dict[str, Float[Tensor, ""]]:
        """Losses of embeddings over the whole batch, then the others micro-batch by micro-batch."""
        active = [
            loss for loss in self.objective.active_losses if loss.entry.stream == _stream(batch)
        ]
        of_embeddings = {
            loss.name: loss.entry for loss in active if isinstance(loss.entry, EmbeddingLoss)
        }
        of_states = {loss.name: loss.entry for loss in active if isinstance(loss.entry, Loss)}
        if not active:
            return {}
        pairs = [micro_batch for micro_batch in batch if isinstance(micro_batch, PairBatch)]
        hard = bool(pairs and self.objective.itm) and self.objective.itm_negatives == "hard"
        embedded: list[tuple[Tensor, Tensor]] = []
        if of_embeddings or hard:
            # of a single micro-batch the graph is kept; otherwise it is computed again
            with torch.set_grad_enabled(bool(of_embeddings) and len(batch) == 1):
                embedded = [self._embed(micro_batch) for micro_batch in pairs]
        swapped = [
            with_negatives(
                micro_batch, self._similarity(*embedded[i]) if hard else None, self.objective
            )
            for i, micro_batch in enumerate(pairs)
        ]
        inputs = {True: swapped or batch, False: batch}  # by whether they are masked
        counts = _global(
            {
                name: [loss.count(micro_batch.matched) for micro_batch in pairs]
                for name, loss in of_embeddings.items()
            }
            | {
                name: [loss.count(loss.targets(micro_batch)) for micro_batch in inputs[loss.masked]]
                for name, loss in of_states.items()
            }
        )
        losses: dict[str, Tensor] = {}
        if of_embeddings:
            losses |= self._whole_batch(pairs, embedded, of_embeddings, counts)
        for masked in (True, False):
            some = {name: loss for name, loss in of_states.items() if loss.masked == masked}
            if some:
                losses |= self._micro_batches(inputs[masked], some, counts)
        return losses

    def _whole_batch(
        self,
        batch: Sequence[PairBatch],
        embedded: Sequence[tuple[Tensor, Tensor]],
        entries: Mapping[str, EmbeddingLoss],
        counts: Mapping[str, Int[Tensor, ""]],
    ) -> dict[str, Float[Tensor, ""]]:
        """Gradient of losses of embeddings, through the embeddings of all micro-batches."""
        image = torch.cat([image for image, _ in embedded])
        text = torch.cat([text for _, text in embedded])
        cached = not image.requires_grad
        if cached:
            image.requires_grad_()
            text.requires_grad_()
        matched = torch.cat([micro_batch.matched for micro_batch in batch])
        scale = self.model.logit_scale.exp()
        inputs = Embeddings(image, text, matched, scale, self.model.logit_bias)
        losses = {name: entry.loss_sum(inputs) / counts[name] for name, entry in entries.items()}
        self._backward(losses)
        if self.metrics is not None:
            self._measure_embeddings(batch, image.detach(), text.detach(), list(entries))
        if cached:
            sizes = [len(micro_batch) for micro_batch in batch]
            assert image.grad is not None
            assert text.grad is not None
            gradients = zip(image.grad.split(sizes), text.grad.split(sizes), strict=True)
            for micro_batch, gradient in zip(batch, gradients, strict=True):
                torch.autograd.backward(self._embed(micro_batch), gradient)  # scaled already
        return {name: loss.detach() for name, loss in losses.items()}

    def _micro_batches(
        self, batch: Sequence[Batch], entries: Mapping[str, Loss], counts: Mapping[str, Tensor]
    ) -> dict[str, Float[Tensor, ""]]:
        """Gradient of losses of states, one micro-batch at a time."""
        losses: dict[str, Tensor] = {}
        for micro_batch in batch:
            with self._precision():
                predictions = predict(self.model, micro_batch, entries)
                targets = {name: entry.targets(micro_batch) for name, entry in entries.items()}
                parts = {
                    name: entry.loss_sum(predictions[name], targets[name]) / counts[name]
                    for name, entry in entries.items()
                }
            self._backward(parts)
            for name, part in parts.items():
                losses[name] = losses.get(name, 0) + part.detach()
                if self.metrics is not None:
                    outputs = predictions[name].detach(), targets[name]
                    self.metrics.add(LossOutputs(name, micro_batch, *outputs))
        return losses

    def _measure_embeddings(
        self,
        batch: Sequence[PairBatch],
        image: Float[Tensor, "n d"],
        text: Float[Tensor, "n d"],
        names: Sequence[str],
    ) -> None:
        assert self.metrics is not None
        sizes = [len(micro_batch) for micro_batch in batch]
        similarity = image @ gather_rows(image, text)[1].T  # n all
        targets = contrastive_targets(torch.cat([micro_batch.matched for micro_batch in batch]))
        for rows in zip(batch, similarity.split(sizes), targets.split(sizes), strict=True):
            for name in names:
                self.metrics.add(LossOutputs(name, *rows))

    def _embed(self, pairs: PairBatch) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        with self._precision():
            image = self.model.embed_images(pairs.images.pixels)
            text = self.model.embed_texts(pairs.texts.tokens, pairs.texts.lengths)
        return image, text

    def _similarity(
        self, image: Float[Tensor, "b d"], text: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b b"]:
        return (self.model.logit_scale.exp() * image @ text.T).detach()

    def _backward(self, losses: Mapping[str, Float[Tensor, ""]]) -> None:
        """Add the gradient of the weighted sum of some losses."""
        weights = {loss.name: loss.weight for loss in self.objective.active_losses}
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        (total if self.loss_scale is None else total * self.loss_scale).backward()

    def _precision(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.model.logit_scale.device.type, self.autocast)


def _stream(batch: Sequence[Batch]) -> str:
    kind = type(batch[0])
    if any(type(micro_batch) is not kind for micro_batch in batch):
        raise TypeError(f"a batch that begins with {kind.__name__} holds other kinds too")
    return STREAMS[kind]


def _global(counts: Mapping[str, list[Int[Tensor, ""]]]) -> dict[str, Int[Tensor, ""]]:
    """Counts over all ranks, at least 1, so that a batch without targets has a loss of 0."""
    total = torch.stack([torch.stack(parts).sum() for parts in counts.values()])
    if is_distributed():
        dist.all_reduce(total)
    return dict(zip(counts, total.clamp_min(1).unbind(), strict=True))


def _sum_over_ranks(gradients: Iterable[Tensor | None]) -> None:
    """Replace each gradient by its sum over the ranks, one bucket at a time."""
    if not is_distributed():
        return
    bucket: list[Tensor] = []
    for gradient in gradients:
        if gradient is None:  # on every rank, since all take the same kind of batch
            continue
        if isinstance(gradient, DTensor):  # FSDP2 has summed and sharded these already
            continue
        if bucket and sum(one.numel() for one in bucket) + gradient.numel() > BUCKET:
            _exchange(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _exchange(bucket)


def _exchange(gradients: Sequence[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    sums = flat.split([gradient.numel() for gradient in gradients])
    for gradient, total in zip(gradients, sums, strict=True):
        gradient.copy_(total.view_as(gradient))
