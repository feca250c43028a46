"""Summary of a training run, from its metrics: losses, and recall beside chance."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from pmd_pipeline.contract.errors import PmdError

LOSSES = {
    "contrastive": "contrastive",
    "mmm_image": "masked patches of pairs (MMM)",
    "mmm_text": "masked words of pairs (MMM)",
    "itm": "image-text matching (ITM)",
    "mim": "masked patches of images alone (MIM)",
    "mlm": "masked words of texts alone (MLM)",
}
"""The losses of FLAVA, by their names in metrics."""

DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text"}
RANKS = (1, 5, 10)

_AVERAGED_STEPS = 20
"""First and last steps over which a loss is averaged; fewer in short runs."""


@dataclass
class TrainingSummary:
    """The metrics of a run.

    Args:
        steps: steps of the run.
        losses: numbers of the steps that had the loss, and its values, by name.
        recall: metrics of each evaluation by steps: values by name, such as `text_to_image_r1`,
            and under `chance` those of random guessing.
    """

    steps: int = 0
    losses: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    recall: dict[int, dict[str, Any]] = field(default_factory=dict)

    def first_and_last(self, loss: str) -> tuple[float, float]:
        """The mean of a loss over its first steps, and over its last steps."""
        values = self.losses[loss][1]
        count = max(1, min(_AVERAGED_STEPS, len(values) // 3))
        return float(np.mean(values[:count])), float(np.mean(values[-count:]))

    def last_evaluation(self, name: str) -> tuple[float, float]:
        """A metric of the last evaluation, and its value for random guessing."""
        evaluation = self.recall[max(self.recall)]
        return float(evaluation[name]), float(evaluation["chance"][name])

    def shortfalls(self, times: float) -> list[str]:
        """A sentence for each metric that shows that the model has not learned enough.

        Args:
            times: times chance that R@1 must reach.
        """
        sentences = []
        for name in LOSSES:
            if name not in self.losses:
                sentences.append(f"no step had the loss {name}")
            elif self.first_and_last(name)[1] >= self.first_and_last(name)[0]:
                sentences.append(
                    "the loss {} went from {:.2f} to {:.2f}".format(
                        name, *self.first_and_last(name)
                    )
                )
        for direction, words in DIRECTIONS.items():
            value, chance = self.last_evaluation(f"{direction}_r1")
            if value < times * chance:
                sentences.append(
                    f"R@1 {words} is {value / chance:.1f} times chance, not {times:.0f}"
                )
        return sentences


def read_summary(metrics: Path) -> TrainingSummary:
    """The summary of a file of metrics.

    Raises:
        PmdError: the file cannot be read, or has no evaluation.
    """
    summary = TrainingSummary()
    try:
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise PmdError(f"{metrics} cannot be read ({error}): train again") from error
    for line in lines:
        if "after" in line:
            summary.recall[line["after"]] = line
        for name, value in line.get("losses", {}).items():
            steps, values = summary.losses.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)
        summary.steps = max(summary.steps, line.get("step", -1) + 1)
    if not summary.recall:
        raise PmdError(f"{metrics} has no evaluation: let flava-train run to its end")
    return summary


def summary_tables(summary: TrainingSummary) -> list[Table]:
    """Recall beside chance, and the losses at both ends of the run."""
    recall = _new_table(
        "what was learned, on images never trained on", "direction", "R@1", "chance"
    )
    for column in ("times chance", *(f"R@{rank}" for rank in RANKS[1:])):
        recall.add_column(column, justify="right")
    for direction, words in DIRECTIONS.items():
        value, chance = summary.last_evaluation(f"{direction}_r1")
        others = [summary.last_evaluation(f"{direction}_r{rank}")[0] for rank in RANKS[1:]]
        recall.add_row(
            words,
            f"{value:.1%}",
            f"{chance:.1%}",
            f"{value / chance:.0f}",
            *map("{:.0%}".format, others),
        )
    losses = _new_table(
        f"losses in nats, {summary.steps:,} steps", "loss", "first steps", "last steps"
    )
    for name in summary.losses:
        losses.add_row(LOSSES.get(name, name), *map("{:.2f}".format, summary.first_and_last(name)))
    return [recall, losses]


def _new_table(title: str, first: str, *others: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
    )
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
