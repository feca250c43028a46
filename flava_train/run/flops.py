"""How many operations a step is, and how many the card could do: for the share that it does."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flava_train.data.batches import ImageBatch, PairBatch, TextBatch, select_rows
from flava_train.model.flava import Flava, FlavaConfig
from flava_train.objective.losses import (
    Objective,
    masked_image_sum,
    masked_pair_sums,
    masked_text_sum,
)

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
"""Dense bfloat16 TFLOP/s by the makers' data sheets; the first name that fits counts."""

_ROWS = 4
"""Operations are counted on so many rows; what grows with their square is negligible."""


def peak_of(device: torch.device) -> float | None:
    """TFLOP/s of a card that we know."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_name(device)
    return next((float(peak) for name, peak in PEAKS.items() if name in card), None)


class Operations:
    """Counts the operations of steps, forward and backward; what caching repeats counts once."""

    def __init__(self, config: FlavaConfig, objective: Objective) -> None:
        self.objective = objective
        # only shapes are computed; fake rather than meta, for which there is no autocast
        self._shapes = FakeTensorMode(allow_non_fake_inputs=True)
        with self._shapes:
            self._model = Flava(config)
        self._each: dict[tuple[type, int], float] = {}

    def of(self, pieces: Sequence[PairBatch | ImageBatch | TextBatch]) -> float:
        """Operations of a step that consists of these micro-batches."""
        return sum(len(piece) * self._of_row(piece) for piece in pieces)

    def _of_row(self, piece: PairBatch | ImageBatch | TextBatch) -> float:
        shape = type(piece), _width(piece)
        if shape not in self._each:
            rows = select_rows(piece, torch.arange(min(_ROWS, len(piece))))
            # the plain attention: fused ones are counted with what they compute again
            plain = sdpa_kernel(SDPBackend.MATH)
            with self._shapes, plain, FlopCounterMode(display=False) as counter:
                self._sum(rows).backward()
            self._each[shape] = counter.get_total_flops() / len(rows)
        return self._each[shape]

    def _sum(self, rows: PairBatch | ImageBatch | TextBatch) -> Tensor:
        """What a step computes, but for the logits of the contrast, which are next to nothing."""
        model, objective = self._model, self.objective
        if isinstance(rows, ImageBatch):
            return masked_image_sum(model, rows)
        if isinstance(rows, TextBatch):
            return masked_text_sum(model, rows)
        sums: list[Tensor] = []
        if objective.contrastive:
            sums += [
                model.embed_images(rows.images.pixels).sum(),
                model.embed_texts(rows.texts.tokens, rows.texts.lengths).sum(),
            ]
        if objective.fuses:
            sums += masked_pair_sums(model, rows, objective).values()
        return torch.stack(sums).sum()


def _width(piece: PairBatch | ImageBatch | TextBatch) -> int:
    if isinstance(piece, ImageBatch):
        return 0
    return (piece.texts if isinstance(piece, PairBatch) else piece).tokens.shape[1]
