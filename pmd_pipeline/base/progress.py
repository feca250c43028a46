"""What a person sees while stages run: bars on a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
        """Hear a running task's counts so far; what comes after its end is late and ignored."""
        if task not in self._ended:
            self._running[task] = counts
            self._reporter.refresh(self)

    def resume_from(self, counts: Mapping[str, int]) -> None:
        """Count what an earlier run has done: it is progress, but no speed."""
        self._before.update(counts)
        self._reporter.refresh(self)

    def advance(self, task: str, counts: Mapping[str, int]) -> None:
        """Count what a task has done in all."""
        self._ended.add(task)
        self._running.pop(task, None)
        self._done.update(counts)
        self._reporter.refresh(self)

    def set_total(self, counts: Mapping[str, int]) -> None:
        """Count what the stage has done in all, in place of what its tasks have told."""
        self._ended.update(self._running)
        self._running.clear()
        self._done = Counter(counts)
        self._reporter.refresh(self)

    @property
    def done(self) -> int:
        """How much of `unit` is done."""
        return self._sum()[self._unit] + self._before[self._unit]

    def line(self) -> str:
        """The state in words: `120 of 240 records, 31 images/s, 4 pairs failed, 4 s left`."""
        now = self._sum()
        both = now + self._before
        seconds = self._reporter.clock() - self._started
        of = f" of {self._total:,}" if self._total is not None else ""
        words = [f"{both[self._unit]:,}{of} {self._unit}"]
        if self._unit == "bytes":
            words = [f"{both[self._unit] / 1e6:,.1f} MB"]
        if seconds > _SETTLED_SECONDS and self._unit in now:
            what = "images" if "images" in now else self._unit
            rate = now[what] / seconds
            words.append(f"{rate / 1e6:,.1f} MB/s" if what == "bytes" else f"{rate:,.0f} {what}/s")
        if both["failed"]:
            words.append(f"{both['failed']:,} pairs failed")
        if now["cut"]:
            words.append("nobody answers: waiting for the network")
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


class Reporter:
    """Where stages are shown: `console`, which should be that of stderr.

    Args:
        clock: seconds from some start; tests put their own here.
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
        """Show one stage while the block runs; at its end, say what it did if it did anything."""
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
        """Show the state of `stage`, not more often than somebody can read."""
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=stage.done, line=stage.line())
        elif not self._console.is_terminal and self.clock() >= self._next_line:
            self._next_line = self.clock() + _LINE_SECONDS
            self.say(f"{stage.name}: {stage.line()}")

    def say(self, words: str) -> None:
        """Print a line, as it is."""
        if not self._quiet:
            self.warn(words)

    def warn(self, words: str) -> None:
        """Print a line also where no progress is shown: the result is not what was expected."""
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
