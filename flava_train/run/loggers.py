"""Where metrics go: a line of JSON for each step, the terminal, TensorBoard, Weights & Biases."""

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
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import write_whole

METRICS = "metrics.jsonl"
LINE_SECONDS = 10.0
"""Time between two lines on stderr where it is no terminal."""

Metrics = Mapping[str, Any]
"""Values by name, of one step or of one evaluation. A step has its number, from 0, as `step`; an
evaluation has the number of steps before it as `after`."""


@runtime_checkable  # the tests check every argument
class Logger(Protocol):
    """A destination of metrics."""

    def log(self, metrics: Metrics) -> None:
        """Record the metrics of one step or evaluation."""

    def close(self) -> None:
        """Write what is buffered, and finish."""


class RunLogger:
    """Logs metrics to all destinations of a run.

    Args:
        run: folder of the run.
        config: as resolved.
        steps: steps that the run has taken. What was logged of later steps is removed, because
            the run takes them again.
        quiet: nothing on the terminal.
        is_main: false on ranks that log nothing.
    """

    def __init__(
        self, run: Path, config: TrainConfig, steps: int, *, quiet: bool, is_main: bool
    ) -> None:
        self._lines = JsonLines(run / METRICS, steps) if is_main else None
        self._terminal = Terminal(config.steps) if is_main and not quiet else None
        external = external_loggers(run, config, steps) if is_main else ()
        loggers = [self._lines, self._terminal, *external]
        self._loggers: list[Logger] = [logger for logger in loggers if logger]

    def log(self, metrics: Metrics) -> None:
        """Record the metrics of one step or evaluation."""
        for logger in self._loggers:
            logger.log(metrics)

    def print(self, sentence: str) -> None:
        """Print a sentence on the terminal."""
        if self._terminal:
            self._terminal.print(sentence)

    def sync(self) -> None:
        """Wait until all lines are on the disk: no checkpoint may have more steps than they."""
        if self._lines:
            self._lines.sync()

    def close(self) -> None:
        """Finish with all destinations."""
        with ExitStack() as closing:
            for logger in self._loggers:
                closing.callback(logger.close)


class JsonLines:
    """A file with a line of JSON for each step and each evaluation."""

    def __init__(self, path: Path, steps: int) -> None:
        truncate_metrics(path, steps)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        """Append a line."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()  # so that a killed process loses nothing

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def truncate_metrics(path: Path, steps: int) -> None:
    """Keep only the whole lines of the first `steps` steps in a file of metrics."""
    if not path.exists():
        return
    size = 0
    with path.open("rb") as file:
        for line in file:
            try:
                metrics = json.loads(line)
            except ValueError:
                break  # the process was killed while it wrote this line
            whole = isinstance(metrics, dict) and line.endswith(b"\n")
            if not whole or metrics.get("step", -1) >= steps or metrics.get("after", 0) > steps:
                break
            size += len(line)
    os.truncate(path, size)


def external_loggers(run: Path, config: TrainConfig, steps: int) -> list[Logger]:
    """TensorBoard and Weights & Biases, as configured.

    Raises:
        PmdError: Weights & Biases is configured but not installed.
    """
    loggers: list[Logger] = []
    if config.metrics.tensorboard and find_spec("tensorboard"):
        loggers.append(TensorBoard(run, steps))
    if config.metrics.wandb:
        if not find_spec("wandb"):
            raise PmdError("metrics.wandb names a project, but wandb is not installed")
        loggers.append(WeightsAndBiases(run, config))
    return loggers


class TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, run: Path, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # optional

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=steps)

    def log(self, metrics: Metrics) -> None:
        """Add a point to each curve."""
        for name, value in flat_numbers(metrics).items():
            self._writer.add_scalar(name.replace(".", "/"), value, _step_of(metrics))

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run continues."""

    def __init__(self, run: Path, config: TrainConfig) -> None:
        import wandb  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415  # optional

        id_file = run / "wandb-run.txt"
        run_id = id_file.read_text().strip() if id_file.exists() else None
        self._run = wandb.init(
            project=config.metrics.wandb,
            dir=str(run),
            id=run_id,
            resume="allow",
            config=as_tables(config),
        )
        write_whole(str(id_file), f"{self._run.id}\n".encode())

    def log(self, metrics: Metrics) -> None:
        """Add a point to each curve."""
        self._run.log(flat_numbers(metrics), step=_step_of(metrics))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Terminal:
    """A table of the latest metrics on a terminal; elsewhere a line every few seconds."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self._steps = steps
        self._console = console or Console(stderr=True, emoji=False, highlight=False)
        self._latest: dict[str, Any] = {}
        self._printed = -LINE_SECONDS
        self._began = time.monotonic()
        self._taken = 0
        self._live = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=2, transient=True)
            self._live.start()

    def log(self, metrics: Metrics) -> None:
        """Update the table; losses of other streams remain in it."""
        latest = {**self._latest, **metrics}
        for group in _GROUPS:
            latest[group] = self._latest.get(group, {}) | metrics.get(group, {})
        self._latest = latest
        if "step" in metrics:
            self._taken += 1
        if "after" in metrics:
            self.print(_evaluation_line(metrics))
        elif self._live:
            self._live.update(self._table())
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            self.print(self._line())

    def print(self, sentence: str) -> None:
        """Print a sentence above the table."""
        self._console.print(sentence, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Print the last state."""
        if self._live:
            self._live.stop()
        if self._latest:
            self.print(self._line())

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, value in self._cells():
            table.add_row(name, value)
        return table

    def _line(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._cells())

    def _cells(self) -> list[tuple[str, str]]:
        latest = self._latest
        done = latest.get("step", -1) + 1
        cells = [("step", f"{done:,} of {self._steps:,}")]
        for group in _GROUPS:
            cells += [(name, f"{value:.4f}") for name, value in latest[group].items()]
        for name, form in _FORMATS.items():
            if name in latest:
                cells.append((name.replace("_", " "), form.format(latest[name])))
        if self._taken:
            seconds = (time.monotonic() - self._began) / self._taken
            cells.append(("left", _duration(seconds * (self._steps - done))))
        return cells


def flat_numbers(metrics: Metrics) -> dict[str, float]:
    """All numbers but those of steps, by dotted names."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            inner = flat_numbers(value)
            numbers |= {f"{name}.{key}": number for key, number in inner.items()}
        elif isinstance(value, int | float) and name not in {"step", "after"}:
            numbers[name] = float(value)
    return numbers


def _step_of(metrics: Metrics) -> int:
    step: int = metrics["after"] if "after" in metrics else metrics["step"]
    return step


_GROUPS = ("losses", "metrics")
"""Values of one stream each, which the terminal shows together."""

_FORMATS = {
    "grad_norm": "{:.3f}",
    "lr": "{:.2e}",
    "temperature": "{:.4f}",
    "loss_scale": "{:.0f}",
    "pairs_per_second": "{:,.0f}",
    "data_wait_seconds": "{:.3f}",
    "mfu": "{:.1%}",
}


def _evaluation_line(metrics: Metrics) -> str:
    chance = metrics.get("chance", {})
    parts = [
        f"{name.replace('_', ' ')} {value:.4f}"
        + (f" (chance {chance[name]:.4f})" if name in chance else "")
        for name, value in metrics.items()
        if isinstance(value, float)
    ]
    return f"after {metrics['after']:,} steps: {', '.join(parts)}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
