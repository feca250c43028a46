"""What a person sees while stages run: bars on a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_LINE_SECONDS = 10.0
_SETTLED_SECONDS = 2.0
"""A rate from less time than this says nothing."""


class Stage:
    """One stage of one source on show: hears the ticks of its tasks and adds them up.

    Args:
        total: how much of `unit` there is to do; None where nobody knows.
        unit: the count that measures progress (`rows`, `records`).
    """

    def __init__(self, show: "Show", name: str, unit: str, total: int | None) -> None:
        self._show = show
        self._name = name
        self._unit = unit
        self._total = total
        self._started = time.monotonic()
        self._before = Counter[str]()
        self._done = Counter[str]()
        self._running: dict[str, Mapping[str, int]] = {}

    def watch(self, task: str, counts: Mapping[str, int]) -> None:
        """Hear a running task's counts so far."""
        self._running[task] = counts
        self._show.refresh(self)

    def found(self, counts: Mapping[str, int]) -> None:
        """Count what an earlier run has done: it is progress, but no speed."""
        self._before.update(counts)
        self._show.refresh(self)

    def finished(self, task: str, counts: Mapping[str, int]) -> None:
        """Count what a task has done in all."""
        self._running.pop(task, None)
        self._done.update(counts)
        self._show.refresh(self)

    @property
    def done(self) -> int:
        """How much of `unit` is done."""
        return self._sum()[self._unit] + self._before[self._unit]

    def line(self) -> str:
        """The state in words, such as `120 of 240 records, 31 images/s, 4 failed, 4 s left`."""
        now = self._sum()
        both = now + self._before
        seconds = time.monotonic() - self._started
        of = f" of {self._total:,}" if self._total is not None else ""
        words = [f"{both[self._unit]:,}{of} {self._unit}"]
        if seconds > _SETTLED_SECONDS:
            what = "images" if "images" in now else self._unit
            words.append(f"{now[what] / seconds:,.0f} {what}/s")
        if both["failed"]:
            words.append(f"{both['failed']:,} pairs failed")
        if seconds > _SETTLED_SECONDS and self._total and now[self._unit]:
            left = (self._total - both[self._unit]) * seconds / now[self._unit]
            words.append(f"{_duration(left)} left")
        return ", ".join(words)

    @property
    def name(self) -> str:
        """What the stage is called, such as `coco build`."""
        return self._name

    @property
    def total(self) -> int | None:
        """How much of `unit` there is to do."""
        return self._total

    def _sum(self) -> Counter[str]:
        counts = Counter(self._done)
        for running in self._running.values():
            counts.update(running)
        return counts


class Show:
    """Where stages are shown: `console`, which should be that of stderr."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._bars: Progress | None = None
        self._bar: TaskID | None = None
        self._next_line = 0.0

    @contextmanager
    def stage(self, name: str, unit: str, total: int | None = None) -> Iterator[Stage]:
        """Show one stage while the block runs."""
        stage = Stage(self, name, unit, total)
        if self._quiet:
            yield stage
        elif self._console.is_terminal:
            with self._with_bar(stage):
                yield stage
            self.say(f"{name}: {stage.line()}")
        else:
            self._next_line = time.monotonic() + _LINE_SECONDS
            yield stage
            self.say(f"{name}: {stage.line()}")

    def refresh(self, stage: Stage) -> None:
        """Show the state of `stage`, not more often than somebody can read."""
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=stage.done, line=stage.line())
        elif not self._quiet and not self._console.is_terminal:
            now = time.monotonic()
            if now >= self._next_line:
                self._next_line = now + _LINE_SECONDS
                self.say(f"{stage.name}: {stage.line()}")

    def say(self, words: str) -> None:
        """Print a line, as it is."""
        if not self._quiet:
            self._console.print(words, markup=False, highlight=False, soft_wrap=True)

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


def _duration(seconds: float) -> str:
    """A time to wait in the largest unit that says it well.

    >>> _duration(5400)
    '1 h 30 min'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
