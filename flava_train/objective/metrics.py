"""Metrics of training steps: a sum and a count for each micro-batch, added up over all ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flava_train.objective.losses import LOSSES, Batch, count_targets
from flava_train.shapes import Float


@dataclass(frozen=True)
class LossOutputs:
    """What a step has computed for one loss and one micro-batch.

    Args:
        loss: its name.
        batch: the micro-batch.
        predictions: of the loss, without gradient. Of a contrastive loss: similarities (cosines)
            of the micro-batch's images with the texts of all ranks.
        targets: of the loss. Of a contrastive loss: for each image, the number of its text among
            those of all ranks; `IGNORE` where the pair is mismatched.
    """

    loss: str
    batch: Batch
    predictions: Tensor
    targets: Tensor


StepMetric = Callable[[LossOutputs], tuple[Tensor, Tensor] | None]
"""Sum and count of a metric, which is their quotient over the global batch; None for losses that
the metric does not measure. It is called once for each loss and micro-batch."""


def accuracy(loss: str) -> StepMetric:
    """Share of targets of a loss that have the highest prediction."""

    def measure(outputs: LossOutputs) -> tuple[Tensor, Tensor] | None:
        if outputs.loss != loss:
            return None
        correct = outputs.predictions.argmax(-1) == outputs.targets  # never `IGNORE`
        return correct.sum(), count_targets(outputs.targets)

    return measure


STEP_METRICS: dict[str, StepMetric] = {
    f"{loss}_accuracy": accuracy(loss) for loss in ("contrastive", *LOSSES)
}
"""Metrics by name. That of the contrastive loss is image-to-text recall at 1 in the batch."""


class MetricSums:
    """Sums and counts of metrics over the micro-batches of one step, on one rank.

    Args:
        metrics: by name.
        device: of the step.
    """

    def __init__(self, metrics: Mapping[str, StepMetric], device: torch.device) -> None:
        self.metrics = metrics
        self._sums = torch.zeros(2 * len(metrics), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, outputs: LossOutputs) -> None:
        """Measure one loss of one micro-batch."""
        for number, metric in enumerate(self.metrics.values()):
            measured = metric(outputs)
            if measured is not None:
                for place, value in enumerate(measured):
                    self._sums[2 * number + place] += value

    @property
    def sums(self) -> Float[Tensor, " n"]:
        """Sum and count of each metric in turn; to be added up over the ranks."""
        return self._sums

    def values(self, sums: list[float]) -> dict[str, float]:
        """Metrics from sums over the ranks; without those that this step did not measure."""
        pairs = zip(self.metrics, sums[::2], sums[1::2], strict=True)
        return {name: total / count for name, total, count in pairs if count}
