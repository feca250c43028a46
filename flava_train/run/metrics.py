"""What a run says of itself: a line of JSON for each step, the terminal, and boards if wanted."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.live import Live
from rich.table import Table

from flava_train.config import TrainConfig, as_tables
from flava_train.run.run_dir import write_whole
from pmd_pipeline.contract.errors import PmdError

METRICS = "metrics.jsonl"
LINE_SECONDS = 10.0
"""Between two lines where the terminal is none."""

Figures = Mapping[str, Any]
"""Names and values of one step, or of one evaluation."""


@runtime_checkable  # the tests check every argument
class Board(Protocol):
    """Whoever is shown what steps and evaluations found."""

    def show(self, figures: Figures) -> None:
        """Take it up."""

    def close(self) -> None:
        """Finish."""


class Metrics:
    """Shows figures to all who want them.

    Args:
        run: folder of the run.
        config: as resolved.
        steps: that the run has taken: what was said of later ones goes, for they come again.
        quiet: show nothing on the terminal.
        writes: whether this rank tells anybody anything.
    """

    def __init__(
        self, run: Path, config: TrainConfig, steps: int, *, quiet: bool, writes: bool
    ) -> None:
        self._lines = Lines(run / METRICS, steps) if writes else None
        self._terminal = Terminal(config.steps) if writes and not quiet else None
        found = [self._lines, self._terminal, *(boards(run, config, steps) if writes else ())]
        self._boards: list[Board] = [board for board in found if board]

    def show(self, figures: Figures) -> None:
        """Take up what a step or an evaluation found.

        A step is numbered from 0, as `step`; an evaluation comes `after` so many steps.
        """
        for board in self._boards:
            board.show(figures)

    def say(self, words: str) -> None:
        """Put a sentence on the terminal."""
        if self._terminal:
            self._terminal.say(words)

    def sync(self) -> None:
        """Wait until all lines are on the disk; a checkpoint must not know more than they."""
        if self._lines:
            self._lines.sync()

    def close(self) -> None:
        """Finish with all."""
        with ExitStack() as closing:
            for board in self._boards:
                closing.callback(board.close)


class Lines:
    """A line of JSON for each step and each evaluation, in one file."""

    def __init__(self, path: Path, steps: int) -> None:
        cut(path, steps)
        self._file = path.open("a", encoding="utf-8")

    def show(self, figures: Figures) -> None:
        """Append a line."""
        self._file.write(json.dumps(figures) + "\n")
        self._file.flush()  # so that a killed run has lost nothing

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut(path: Path, steps: int) -> None:
    """Leave in a file of metrics only what the first `steps` steps said, in whole lines."""
    if not path.exists():
        return
    size = 0
    with path.open("rb") as file:
        for line in file:
            try:
                figures = json.loads(line)
            except ValueError:
                break  # torn by a kill
            whole = isinstance(figures, dict) and line.endswith(b"\n")
            if not whole or figures.get("step", -1) >= steps or figures.get("after", 0) > steps:
                break
            size += len(line)
    os.truncate(path, size)


def boards(run: Path, config: TrainConfig, steps: int) -> list[Board]:
    """The boards that are wanted, and there.

    Raises:
        PmdError: Weights & Biases is wanted but not installed.
    """
    found: list[Board] = []
    if config.metrics.tensorboard and find_spec("tensorboard"):
        found.append(TensorBoard(run, steps))
    if config.metrics.wandb:
        if not find_spec("wandb"):
            raise PmdError("metrics.wandb names a project, but wandb is not installed")
        found.append(WandB(run, config))
    return found


class TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, run: Path, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # optional

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=steps)

    def show(self, figures: Figures) -> None:
        """Add a point to each curve."""
        for name, value in numbers(figures).items():
            self._writer.add_scalar(name.replace(".", "/"), value, _when(figures))

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, which a resumed run goes on with."""

    def __init__(self, run: Path, config: TrainConfig) -> None:
        import wandb  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415  # optional

        known = run / "wandb-run.txt"
        name = known.read_text().strip() if known.exists() else None
        self._run = wandb.init(
            project=config.metrics.wandb,
            dir=str(run),
            id=name,
            resume="allow",
            config=as_tables(config),
        )
        write_whole(known, f"{self._run.id}\n".encode())

    def show(self, figures: Figures) -> None:
        """Add a point to each curve."""
        self._run.log(numbers(figures), step=_when(figures))

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Terminal:
    """One table that is drawn anew, or a line now and then where nobody draws."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self._steps = steps
        self._console = console or Console(stderr=True, emoji=False, highlight=False)
        self._latest: dict[str, Any] = {}
        self._spoke = -LINE_SECONDS
        self._began = time.monotonic()
        self._taken = 0
        self._live = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=2, transient=True)
            self._live.start()

    def show(self, figures: Figures) -> None:
        """Draw the latest figures; losses of other streams stay in view."""
        losses = self._latest.get("losses", {}) | figures.get("losses", {})
        self._latest = {**self._latest, **figures, "losses": losses}
        if "step" in figures:
            self._taken += 1
        if "after" in figures:
            self.say(_evaluated(figures))
        elif self._live:
            self._live.update(self._table())
        elif time.monotonic() - self._spoke >= LINE_SECONDS:
            self._spoke = time.monotonic()
            self.say(", ".join(f"{name} {text}" for name, text in self._rows()))

    def say(self, words: str) -> None:
        """Print a sentence above the table."""
        self._console.print(words, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live:
            self._live.stop()
        if self._latest:
            self.say(", ".join(f"{name} {text}" for name, text in self._rows()))

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, text in self._rows():
            table.add_row(name, text)
        return table

    def _rows(self) -> list[tuple[str, str]]:
        latest = self._latest
        done = latest.get("step", -1) + 1
        rows = [("step", f"{done:,} of {self._steps:,}")]
        rows += [(name, f"{value:.4f}") for name, value in latest["losses"].items()]
        for name, form in _SHOWN.items():
            if name in latest:
                rows.append((name.replace("_", " "), form.format(latest[name])))
        if self._taken:
            each = (time.monotonic() - self._began) / self._taken
            rows.append(("left", _duration(each * (self._steps - done))))
        return rows


def numbers(figures: Figures) -> dict[str, float]:
    """All that can be drawn, by dotted names."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float) and name not in {"step", "after"}:
            found[name] = float(value)
    return found


def _when(figures: Figures) -> int:
    step: int = figures["after"] if "after" in figures else figures["step"]
    return step


_SHOWN = {
    "grad_norm": "{:.3f}",
    "lr": "{:.2e}",
    "temperature": "{:.4f}",
    "loss_scale": "{:.0f}",
    "pairs_per_second": "{:,.0f}",
    "waited": "{:.3f} s",
    "mfu": "{:.1%}",
}


def _evaluated(figures: Figures) -> str:
    chance = figures.get("chance", {})
    found = [
        f"{name.replace('_', ' ')} {value:.4f}"
        + (f" (chance {chance[name]:.4f})" if name in chance else "")
        for name, value in figures.items()
        if isinstance(value, float)
    ]
    return f"after {figures['after']:,} steps: {', '.join(found)}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
