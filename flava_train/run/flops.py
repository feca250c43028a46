"""Operations of a step and of the card: for model FLOPs utilisation (MFU)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flava_train.data.batches import ImageBatch, PairBatch, select_rows
from flava_train.model.flava import Flava, FlavaConfig
from flava_train.objective.losses import Batch, EmbeddingLoss, Loss, predict
from flava_train.objective.objective import Objective
from flava_train.objective.step import STREAMS

PEAKS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
}
"""Dense bfloat16 TFLOP/s by data sheet; the first name that is part of the card's name counts."""

_ROWS = 4
"""Operations are counted on this many rows; what grows with their square is negligible."""


def peak_of(device: torch.device) -> float | None:
    """TFLOP/s of a card; None if it is not in `PEAKS`."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_name(device)
    return next((float(peak) for name, peak in PEAKS.items() if name in card), None)


class FlopCounter:
    """Counts the operations of steps, forward and backward.

    What gradient caching and recomputed activations repeat counts once. Losses of the user's own
    do not count: their code may need values, and here are only shapes.
    """

    def __init__(self, config: FlavaConfig, objective: Objective) -> None:
        self._objective = replace(objective, losses={})
        # only shapes are computed; not on the meta device, which has no autocast
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._fake_mode:
            self._model = Flava(config, self._objective.heads)
        self._per_row: dict[tuple[type, int], float] = {}

    def count(self, batch: Sequence[Batch]) -> float:
        """Operations of a step with these micro-batches."""
        return sum(len(micro_batch) * self._count_row(micro_batch) for micro_batch in batch)

    def _count_row(self, micro_batch: Batch) -> float:
        shape = type(micro_batch), _text_width(micro_batch)
        if not self._entries(micro_batch):
            return 0.0
        if shape not in self._per_row:
            rows = select_rows(micro_batch, torch.arange(min(_ROWS, len(micro_batch))))
            # the counter counts what fused attention computes twice, or does not count it at all
            plain = sdpa_kernel(SDPBackend.MATH)
            with self._fake_mode, plain, FlopCounterMode(display=False) as counter:
                self._loss_sum(rows).backward()
            self._per_row[shape] = counter.get_total_flops() / len(rows)
        return self._per_row[shape]

    def _loss_sum(self, rows: Batch) -> Tensor:
        """Everything that a step computes, except the few logits of the contrastive loss."""
        entries = self._entries(rows)
        sums: list[Tensor] = []
        if any(isinstance(entry, EmbeddingLoss) for entry in entries.values()):
            assert isinstance(rows, PairBatch)
            sums += [
                self._model.embed_images(rows.images.pixels).sum(),
                self._model.embed_texts(rows.texts.tokens, rows.texts.lengths).sum(),
            ]
        for masked in (True, False):
            some = {
                name: entry
                for name, entry in entries.items()
                if isinstance(entry, Loss) and entry.masked == masked
            }
            if some:
                predictions = predict(self._model, rows, some)
                sums += [
                    entry.loss_sum(predictions[name], entry.targets(rows))
                    for name, entry in some.items()
                ]
        return torch.stack(sums).sum()

    def _entries(self, micro_batch: Batch) -> dict[str, Loss | EmbeddingLoss]:
        losses = self._objective.active_losses
        return {
            one.name: one.entry for one in losses if one.entry.stream == STREAMS[type(micro_batch)]
        }


def _text_width(micro_batch: Batch) -> int:
    if isinstance(micro_batch, ImageBatch):
        return 0
    return (micro_batch.texts if isinstance(micro_batch, PairBatch) else micro_batch).tokens.shape[
        1
    ]
