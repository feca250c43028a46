"""Progress of stages on stderr: bars on a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 10.0
_MIN_RATE_SECONDS = 2.0
"""A rate over less time than this is too noisy to print."""


class Stage:
    """Progress of one stage of one source: the sum of the counts of its tasks.

    Args:
        unit: the count that measures progress (`rows`, `records`).
        total: of `unit`; None where it is unknown.
    """

    def __init__(self, reporter: "Reporter", name: str, unit: str, total: int | None) -> None:
        self._reporter = reporter
        self._name = name
        self._unit = unit
        self._total = total
        self._started = reporter.clock()
        self._before = Counter[str]()
        self._done = Counter[str]()
        self._running: dict[str, Mapping[str, int]] = {}
        self._ended = set[str]()

    def update(self, task: str, counts: Mapping[str, int]) -> None:
        """Set the counts of a running task so far; ignored after the end of the task."""
        if task not in self._ended:
            self._running[task] = counts
            self._reporter.refresh(self)

    def resume_from(self, counts: Mapping[str, int]) -> None:
        """Add the counts of an earlier run: they are progress, but no part of the rate."""
        self._before.update(counts)
        self._reporter.refresh(self)

    def advance(self, task: str, counts: Mapping[str, int]) -> None:
        """Add the final counts of a task, which has ended."""
        self._ended.add(task)
        self._running.pop(task, None)
        self._done.update(counts)
        self._reporter.refresh(self)

    def set_total(self, counts: Mapping[str, int]) -> None:
        """Replace the counts of all tasks by the final counts of the stage."""
        self._ended.update(self._running)
        self._running.clear()
        self._done = Counter(counts)
        self._reporter.refresh(self)

    @property
    def done(self) -> int:
        """Of `unit`, how much is done."""
        return self._sum()[self._unit] + self._before[self._unit]

    def line(self) -> str:
        """One line of text: `120 of 240 records, 31 images/s, 4 pairs failed, 4 s left`."""
        now = self._sum()
        both = now + self._before
        seconds = self._reporter.clock() - self._started
        of = f" of {self._total:,}" if self._total is not None else ""
        parts = [f"{both[self._unit]:,}{of} {self._unit}"]
        if self._unit == "bytes":
            parts = [f"{both[self._unit] / 1e6:,.1f} MB"]
        if seconds > _MIN_RATE_SECONDS and self._unit in now:
            unit = "images" if "images" in now else self._unit
            rate = now[unit] / seconds
            parts.append(f"{rate / 1e6:,.1f} MB/s" if unit == "bytes" else f"{rate:,.0f} {unit}/s")
        if both["failed"]:
            parts.append(f"{both['failed']:,} pairs failed")
        if now["cut"]:
            parts.append("no host answers: waiting for the network")
        if seconds > _MIN_RATE_SECONDS and self._total and now[self._unit]:
            left = (self._total - both[self._unit]) * seconds / now[self._unit]
            parts.append(f"{_format_duration(left)} left")
        return ", ".join(parts)

    @property
    def name(self) -> str:
        """Name of the stage, such as `coco build`."""
        return self._name

    @property
    def total(self) -> int | None:
        """Of `unit`, how much there is to do; None where it is unknown."""
        return self._total

    def _sum(self) -> Counter[str]:
        counts = Counter(self._done)
        for running in self._running.values():
            counts.update(running)
        return counts


class Reporter:
    """Prints the progress of stages to a console.

    Args:
        console: should write to stderr.
        quiet: print warnings only.
        clock: seconds from some start; tests pass their own.
    """

    def __init__(
        self,
        console: Console,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._console = console
        self._quiet = quiet
        self._bars: Progress | None = None
        self._bar: TaskID | None = None
        self._next_line = 0.0

    @contextmanager
    def stage(self, name: str, unit: str, total: int | None = None) -> Iterator[Stage]:
        """Show a stage while the block runs; then print its last line, if it did anything."""
        stage = Stage(self, name, unit, total)
        if self._console.is_terminal and not self._quiet:
            with self._with_bar(stage):
                yield stage
        else:
            self._next_line = self.clock() + _LINE_SECONDS
            yield stage
        if stage.done or total is not None:
            self.say(f"{name}: {stage.line()}")

    def refresh(self, stage: Stage) -> None:
        """Show the state of `stage`, at a rate that can be read."""
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=stage.done, line=stage.line())
        elif not self._console.is_terminal and self.clock() >= self._next_line:
            self._next_line = self.clock() + _LINE_SECONDS
            self.say(f"{stage.name}: {stage.line()}")

    def say(self, text: str) -> None:
        """Print a line, unless the reporter is quiet."""
        if not self._quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Print a line, also if the reporter is quiet."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _with_bar(self, stage: Stage) -> Iterator[None]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}", markup=False),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            self._bars = bars
            self._bar = bars.add_task(stage.name, total=stage.total, line="")
            try:
                yield
            finally:
                self._bars = self._bar = None


def _format_duration(seconds: float) -> str:
    """A duration in its one or two largest units.

    >>> _format_duration(5400)
    '1 h 30 min'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
