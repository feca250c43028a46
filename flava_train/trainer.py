"""The trainer: a model with its optimizer, one step at a time."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flava_train.config import TrainConfig
from flava_train.data.batches import WIDTHS, PairBatch, micro_batches, select_rows, to_device
from flava_train.data.loader import RankBatch
from flava_train.data.training_data import TrainingData
from flava_train.evaluation.evaluate import evaluate
from flava_train.model.flava import Flava
from flava_train.objective.losses import Batch
from flava_train.objective.metrics import MetricSums, StepMetric
from flava_train.objective.objective import Objective
from flava_train.objective.step import train_step
from flava_train.run.checkpoint import Best, Progress, save
from flava_train.run.flops import FlopCounter, peak_of
from flava_train.run.loggers import Metrics
from flava_train.run.optimizer import learning_rate
from flava_train.run.ranks import (
    Ranks,
    broadcast_from_rank_0,
    gradient_norm,
    scale_gradients,
    sum_over_ranks,
)
from flava_train.run.run_dir import StopRequest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import write_whole

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}

FIRST_LOSS_SCALE = 2.0**16
"""Loss scale of float16 at the beginning. As in torch's `GradScaler`, it is halved when a gradient
overflows, and doubled after `LOSS_SCALE_STEPS` steps without overflow."""
LOSS_SCALE_STEPS = 2000

_MAX_KEYS = 2
"""Most keys in an error message."""


class NotFinite(PmdError):
    """A loss or gradient is NaN or infinite; the weights are as they were before the step."""


@dataclass(frozen=True)
class _StepTotals:
    """Totals of one step over all ranks."""

    losses: dict[str, float]
    metrics: dict[str, float]
    grad_norm: float
    temperature: float
    stopping: bool


@dataclass
class Trainer:
    """The state of a run; `progress`, the model and the optimizer change with each step."""

    config: TrainConfig
    objective: Objective
    step_metrics: dict[str, StepMetric]
    data: TrainingData
    ranks: Ranks
    model: Flava
    optimizer: torch.optim.Optimizer
    progress: Progress

    def train_step(self, batch: RankBatch, stop: StopRequest) -> tuple[Metrics, bool]:
        """Take one step; its metrics, and whether any rank was requested to stop.

        Raises:
            NotFinite: a loss or gradient is not finite. Nothing was changed.
        """
        began = time.perf_counter()
        metrics: dict[str, Any] = {"step": batch.step, "stream": batch.stream}
        sums = MetricSums(self.step_metrics, self.ranks.device)
        if batch.step in self.config.skip_steps:
            self._count_step()
            return metrics | {"skipped": True}, self._reduce({}, sums, stop).stopping
        rate = learning_rate(self.config.optimizer, batch.step, self.config.steps)
        batches = split_batch(batch.rows, self.config.micro_batch_size, self._widths)
        losses = train_step(
            self.model,
            [to_device(one, self.ranks.device) for one in batches],
            self.objective,
            autocast=AUTOCAST[self.config.compute.precision],
            loss_scale=self._loss_scale(),
            metrics=sums if self.step_metrics else None,
        )
        totals = self._reduce(losses, sums, stop)
        updated = self._update(batch, rate, totals)
        self._count_step()
        seconds = batch.wait_seconds + time.perf_counter() - began
        metrics |= {
            "losses": totals.losses,
            "grad_norm": totals.grad_norm,
            "lr": rate,
            "temperature": totals.temperature,
            "pairs_per_second": self.config.batch / seconds,
            "data_wait_seconds": batch.wait_seconds,
        }
        if totals.metrics:
            metrics["metrics"] = totals.metrics
        if self.config.compute.precision == "fp16":
            metrics |= {"loss_scale": self.progress.loss_scale, "updated": updated}
        if self._peak is not None:
            metrics["mfu"] = self._flops.count(batches) / seconds / self._peak
        return metrics, totals.stopping

    def evaluate(self) -> tuple[Metrics, bool]:
        """The metrics of an evaluation, and whether the model is the best so far."""
        config = self.config.evaluation
        result = evaluate(
            self.model,
            self.data.wordpiece,
            config,
            caption_tokens=self.config.data.caption_tokens,
            files=self.config.data.file_cache(),
            autocast=AUTOCAST[self.config.compute.precision],
        )
        if not result.metrics:
            return {}, False
        # all ranks save together, and the last digits of their values may differ
        value = broadcast_from_rank_0(result.metrics[config.metric], self.ranks.device)
        best = self.progress.best
        improved = best is None or best.metric != config.metric or value > best.value
        if improved:
            now = Best(metric=config.metric, value=value, steps=self.progress.steps)
            self.progress = self.progress.model_copy(update={"best": now})
        return {"after": self.progress.steps, **result.as_json()}, improved

    def save(self, run: Path) -> None:
        """Write a checkpoint."""
        keep = self.config.checkpoint.keep_checkpoints
        save(run, self.progress, self.model, self.optimizer, keep=keep)

    def _reduce(
        self, losses: dict[str, torch.Tensor], sums: MetricSums, stop: StopRequest
    ) -> _StepTotals:
        """Reduce a step over all ranks. This waits for the device, once."""
        device = self.ranks.device
        stop_flag = torch.tensor([stop.signal is not None], dtype=torch.float64, device=device)
        values = [loss.double()[None] for loss in losses.values()]
        totals = sum_over_ranks(torch.cat([*values, sums.sums, stop_flag]))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = gradient_norm(gradients, device) / self.progress.loss_scale
        heat = self.model.logit_scale.detach()[0].neg().exp()
        numbers = torch.cat([totals, torch.stack([norm.double(), heat.double()])]).tolist()
        *sums_over_ranks, num_stopping, grad_norm, temperature = numbers
        return _StepTotals(
            losses=dict(zip(losses, sums_over_ranks, strict=False)),
            metrics=sums.values(sums_over_ranks[len(losses) :]),
            grad_norm=grad_norm,
            temperature=temperature,
            stopping=num_stopping > 0,
        )

    def _update(self, batch: RankBatch, rate: float, totals: _StepTotals) -> bool:
        """Change the weights, unless float16 has overflowed; whether they have changed."""
        half = self.config.compute.precision == "fp16"
        norm = totals.grad_norm
        overflow = half and self.progress.loss_scale > 1 and not math.isfinite(norm)
        bad = [name for name, loss in totals.losses.items() if not math.isfinite(loss)]
        if bad or not (math.isfinite(norm) or overflow):
            self._raise_not_finite(batch, bad or ["grad_norm"], totals.losses)
        if overflow:
            self._set_loss_scale(self.progress.loss_scale / 2)
            return False
        factor = 1 / self.progress.loss_scale
        limit = self.config.optimizer.grad_clip_norm
        if limit is not None and norm > limit:
            factor *= limit / norm
        if factor != 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            scale_gradients(gradients, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if half:
            good = self.progress.good_steps + 1
            self.progress = self.progress.model_copy(update={"good_steps": good})
            if good == LOSS_SCALE_STEPS:
                self._set_loss_scale(self.progress.loss_scale * 2)
        return True

    def _raise_not_finite(
        self, batch: RankBatch, bad: Sequence[str], losses: dict[str, float]
    ) -> None:
        """Write the keys of the batch to a file.

        Raises:
            NotFinite: always.
        """
        keys = [slot.key for slot in self.data.describe(batch.step)]
        some = ", ".join(keys if len(keys) <= _MAX_KEYS else [*keys[:_MAX_KEYS], "..."])
        path = Path(self.config.out) / f"not-finite-{batch.step}.json"
        if self.ranks.is_main:
            content = {"step": batch.step, "stream": batch.stream, "losses": losses, "keys": keys}
            write_whole(str(path), (json.dumps(content, indent=2) + "\n").encode())
        raise NotFinite(
            f"step {batch.step}: {' and '.join(bad)} of {batch.stream} {some} not finite; "
            f"all keys are in {path}; the weights were not changed: resume with a lower "
            f"optimizer.lr, or without this step by --set 'skip_steps=[{batch.step}]'"
        )

    def _count_step(self) -> None:
        self.progress = self.progress.model_copy(update={"steps": self.progress.steps + 1})

    def _set_loss_scale(self, loss_scale: float) -> None:
        self.progress = self.progress.model_copy(update={"loss_scale": loss_scale, "good_steps": 0})

    def _loss_scale(self) -> torch.Tensor | None:
        if self.config.compute.precision != "fp16":
            return None
        return torch.tensor(self.progress.loss_scale, device=self.ranks.device)

    @cached_property
    def _widths(self) -> tuple[int, ...]:
        return caption_widths(self.config)

    @cached_property
    def _peak(self) -> float | None:
        """Operations per second of the device; None if unknown."""
        peak = self.config.metrics.peak or peak_of(self.ranks.device)
        return None if peak is None else peak * 1e12

    @cached_property
    def _flops(self) -> FlopCounter:
        return FlopCounter(self.config.model, self.objective)


def split_batch(rows: Batch, size: int, widths: Sequence[int]) -> Sequence[Batch]:
    """Micro-batches of `size` rows; pairs are sorted by the length of their captions."""
    if isinstance(rows, PairBatch):
        return micro_batches(rows, size, widths=widths)
    return [select_rows(rows, numbers) for numbers in torch.arange(len(rows)).split(size)]


def caption_widths(config: TrainConfig) -> tuple[int, ...]:
    """Widths of captions that are compiled; the last holds the longest caption."""
    longest = config.data.caption_tokens
    if not config.model.mm_pad_mask:
        return (longest,)
    widest = min(-(-longest // 8) * 8, config.model.text_positions)  # multiples of 8 are faster
    return (*(width for width in WIDTHS if width < longest), widest)
