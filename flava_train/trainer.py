"""What learns: a model with its optimizer, one step at a time."""

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
from flava_train.data.batches import (
    WIDTHS,
    ImageBatch,
    PairBatch,
    TextBatch,
    micro_batches,
    select_rows,
    to_device,
)
from flava_train.data.loader import RankBatch
from flava_train.data.training_data import TrainingData
from flava_train.evaluation.evaluate import evaluate
from flava_train.model.flava import Flava
from flava_train.objective.step import train_step
from flava_train.run.checkpoint import Best, Progress, save
from flava_train.run.flops import Operations, peak_of
from flava_train.run.metrics import Figures
from flava_train.run.optimizer import learning_rate
from flava_train.run.ranks import Ranks, as_rank_0_has_it, gradient_norm, scale, total
from flava_train.run.run_dir import Stop, write_whole
from pmd_pipeline.contract.errors import PmdError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}

FIRST_LOSS_SCALE = 2.0**16
"""In float16 the loss is scaled as by torch's `GradScaler`: halved when a gradient overflows,
doubled after so many good steps as `LOSS_SCALE_STEPS` says."""
LOSS_SCALE_STEPS = 2000

_FEW = 2
"""Keys that a sentence names."""


class NotFinite(PmdError):
    """A loss or gradient is NaN or infinite; the weights are as they were before the step."""


@dataclass
class Learner:
    """The state of a run; `progress`, the model and the optimizer change with each step."""

    config: TrainConfig
    streams: TrainingData
    ranks: Ranks
    model: Flava
    optimizer: torch.optim.Optimizer
    progress: Progress

    def learn(self, batch: RankBatch, stop: Stop) -> tuple[Figures, bool]:
        """Take one step; what it found, and whether any rank was told to stop.

        Raises:
            NotFinite: a loss or gradient is not finite. Nothing was changed.
        """
        began = time.perf_counter()
        figures: dict[str, Any] = {"step": batch.step, "stream": batch.stream}
        if batch.step in self.config.skip:
            self._advance()
            return figures | {"skipped": True}, bool(self._agreed([], stop)[-1])
        rate = learning_rate(self.config.optimizer, batch.step, self.config.steps)
        pieces = cut(batch.rows, self.config.micro, self._widths)
        losses = train_step(
            self.model,
            [to_device(piece, self.ranks.device) for piece in pieces],
            self.config.objective,
            autocast=AUTOCAST[self.config.compute.precision],
            loss_scale=self._loss_scale(),
        )
        *found, norm, temperature, stopping = self._agreed(list(losses.values()), stop)
        named = dict(zip(losses, found, strict=True))
        updated = self._update(batch, rate, named, norm)
        self._advance()
        seconds = batch.wait_seconds + time.perf_counter() - began
        figures |= {
            "losses": named,
            "grad_norm": norm,
            "lr": rate,
            "temperature": temperature,
            "pairs_per_second": self.config.batch / seconds,
            "waited": batch.wait_seconds,
        }
        if self.config.compute.precision == "fp16":
            figures |= {"loss_scale": self.progress.loss_scale, "updated": updated}
        if self._peak is not None:
            figures["mfu"] = self._operations.of(pieces) / seconds / self._peak
        return figures, bool(stopping)

    def evaluate(self) -> tuple[Figures, bool]:
        """What an evaluation finds, and whether the model is the best so far."""
        config = self.config.evaluation
        found = evaluate(
            self.model,
            self.streams.wordpiece,
            config,
            caption_tokens=self.config.data.caption_tokens,
            files=self.config.data.file_cache(),
            autocast=AUTOCAST[self.config.compute.precision],
        )
        if not found.metrics:
            return {}, False
        # saving is for all ranks together, and their last digits may differ
        value = as_rank_0_has_it(found.metrics[config.metric], self.ranks.device)
        best = self.progress.best
        improved = best is None or best.metric != config.metric or value > best.value
        if improved:
            now = Best(metric=config.metric, value=value, steps=self.progress.steps)
            self.progress = self.progress.model_copy(update={"best": now})
        return {"after": self.progress.steps, **found.as_json()}, improved

    def save(self, run: Path) -> None:
        """Write a checkpoint."""
        save(run, self.progress, self.model, self.optimizer, keep=self.config.checkpoint.keep)

    def _agreed(self, losses: Sequence[torch.Tensor], stop: Stop) -> list[float]:
        """Losses of the global batch, norm and temperature, and how many ranks were to stop.

        This waits for the device, once.
        """
        device = self.ranks.device
        told = torch.tensor(float(stop.signal is not None), device=device)
        summed = total(torch.stack([*losses, told]).double())
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = gradient_norm(gradients, device) / self.progress.loss_scale
        temperature = self.model.logit_scale.detach()[0].neg().exp()
        found = torch.stack([*summed[:-1], norm.double(), temperature.double(), summed[-1]])
        return list(found.tolist())

    def _update(self, batch: RankBatch, rate: float, losses: dict[str, float], norm: float) -> bool:
        """Change the weights, unless float16 has overflown; whether it has not."""
        half = self.config.compute.precision == "fp16"
        overflown = half and self.progress.loss_scale > 1 and not math.isfinite(norm)
        bad = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if bad or not (math.isfinite(norm) or overflown):
            self._refuse(batch, bad or ["grad_norm"], losses)
        if overflown:
            self._rescale(self.progress.loss_scale / 2)
            return False
        factor = 1 / self.progress.loss_scale
        clip = self.config.optimizer.clip
        if clip is not None and norm > clip:
            factor *= clip / norm
        if factor != 1:
            scale([p.grad for p in self.model.parameters() if p.grad is not None], factor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if half:
            good = self.progress.good_steps + 1
            self.progress = self.progress.model_copy(update={"good_steps": good})
            if good == LOSS_SCALE_STEPS:
                self._rescale(self.progress.loss_scale * 2)
        return True

    def _refuse(self, batch: RankBatch, bad: Sequence[str], losses: dict[str, float]) -> None:
        """Name what the step saw.

        Raises:
            NotFinite: always.
        """
        keys = [row.key for row in self.streams.describe(batch.step)]
        some = ", ".join(keys if len(keys) <= _FEW else [*keys[:_FEW], "..."])
        path = Path(self.config.out) / f"not-finite-{batch.step}.json"
        if self.ranks.writes:
            seen = {"step": batch.step, "stream": batch.stream, "losses": losses, "keys": keys}
            write_whole(path, (json.dumps(seen, indent=2) + "\n").encode())
        raise NotFinite(
            f"step {batch.step}: {' and '.join(bad)} of {batch.stream} {some} not finite; "
            f"all keys are in {path}; nothing of it was learnt: go on with a lower "
            f"optimizer.lr, or pass over it with --set 'skip=[{batch.step}]'"
        )

    def _advance(self) -> None:
        self.progress = self.progress.model_copy(update={"steps": self.progress.steps + 1})

    def _rescale(self, loss_scale: float) -> None:
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
        """Operations per second of the device, if known."""
        peak = self.config.metrics.peak or peak_of(self.ranks.device)
        return None if peak is None else peak * 1e12

    @cached_property
    def _operations(self) -> Operations:
        return Operations(self.config.model, self.config.objective)


def cut(
    rows: PairBatch | ImageBatch | TextBatch, size: int, widths: Sequence[int]
) -> Sequence[PairBatch | ImageBatch | TextBatch]:
    """Micro-batches of `size` rows; pairs sorted by the length of their captions."""
    if isinstance(rows, PairBatch):
        return micro_batches(rows, size, widths=widths)
    return [select_rows(rows, piece) for piece in torch.arange(len(rows)).split(size)]


def caption_widths(config: TrainConfig) -> tuple[int, ...]:
    """Widths of captions that get compiled: few, the last of which holds the longest."""
    longest = config.data.caption_tokens
    if not config.model.mm_pad_mask:
        return (longest,)
    widest = min(-(-longest // 8) * 8, config.model.text_positions)  # fast shapes, if there is room
    return (*(width for width in WIDTHS if width < longest), widest)
