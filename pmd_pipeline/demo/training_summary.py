"""What a run of the trainer has learned, by its metrics: losses, and recall beside chance."""

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

_ENDS = 20
"""Steps at either end of a run over which a loss is averaged; fewer in short runs."""


@dataclass
class Learned:
    """What the lines of a run's metrics say.

    Args:
        steps: that the run has taken.
        losses: of each step that had the loss, and the numbers of these steps, by name.
        recall: what each evaluation found, by steps taken: figures by name, such as
            `text_to_image_r1`, and under `chance` what guessing finds.
    """

    steps: int = 0
    losses: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    recall: dict[int, dict[str, Any]] = field(default_factory=dict)

    def ends(self, loss: str) -> tuple[float, float]:
        """The mean of a loss over its first steps and over its last."""
        values = self.losses[loss][1]
        count = max(1, min(_ENDS, len(values) // 3))
        return float(np.mean(values[:count])), float(np.mean(values[-count:]))

    def last(self, name: str) -> tuple[float, float]:
        """A figure of the last evaluation, and what guessing gives."""
        found = self.recall[max(self.recall)]
        return float(found[name]), float(found["chance"][name])

    def missed(self, times: float) -> list[str]:
        """A sentence for each thing that a run which has learned would have."""
        found = []
        for name in LOSSES:
            if name not in self.losses:
                found.append(f"no step had the loss {name}")
            elif self.ends(name)[1] >= self.ends(name)[0]:
                found.append(
                    "the loss {} went from {:.2f} to {:.2f}".format(name, *self.ends(name))
                )
        for direction, words in DIRECTIONS.items():
            value, chance = self.last(f"{direction}_r1")
            if value < times * chance:
                found.append(f"R@1 {words} is {value / chance:.1f} times chance, not {times:.0f}")
        return found


def read_learned(metrics: Path) -> Learned:
    """What the metrics of a run say.

    Raises:
        PmdError: there are none, or no evaluation is among them.
    """
    learned = Learned()
    try:
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise PmdError(f"{metrics} cannot be read ({error}): train again") from error
    for line in lines:
        if "after" in line:
            learned.recall[line["after"]] = line
        for name, value in line.get("losses", {}).items():
            steps, values = learned.losses.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)
        learned.steps = max(learned.steps, line.get("step", -1) + 1)
    if not learned.recall:
        raise PmdError(f"{metrics} tells of no evaluation: let flava-train end")
    return learned


def as_tables(learned: Learned) -> list[Table]:
    """Recall beside chance, and the losses at both ends of the run."""
    recall = _table("what was learned, on images never trained on", "direction", "R@1", "chance")
    for column in ("times chance", *(f"R@{rank}" for rank in RANKS[1:])):
        recall.add_column(column, justify="right")
    for direction, words in DIRECTIONS.items():
        value, chance = learned.last(f"{direction}_r1")
        others = [learned.last(f"{direction}_r{rank}")[0] for rank in RANKS[1:]]
        recall.add_row(
            words,
            f"{value:.1%}",
            f"{chance:.1%}",
            f"{value / chance:.0f}",
            *map("{:.0%}".format, others),
        )
    losses = _table(f"losses in nats, {learned.steps:,} steps", "loss", "first steps", "last steps")
    for name in learned.losses:
        losses.add_row(LOSSES.get(name, name), *map("{:.2f}".format, learned.ends(name)))
    return [recall, losses]


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
    )
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
