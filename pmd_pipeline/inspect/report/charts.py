"""Histograms as coordinates of bars, ticks and markers, in the units of their SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pmd_pipeline.inspect.stats import percentile

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 38, 346, 10, 160
"""Size of the SVG, and the edges of the plot area in it."""

MAX_BARS = 60
SIDES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ASPECT_RATIOS = {0.25: "1:4", 0.5: "1:2", 1.0: "1:1", 2.0: "2:1", 4.0: "4:1"}
_STEPS = (1, 2, 5, 10, 20, 25, 50)
_PER_OCTAVE = 4


@dataclass(frozen=True)
class Bar:
    """One bar; `label` states its range and its share."""

    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Tick:
    """A label on an axis."""

    position: float
    text: str


@dataclass(frozen=True)
class Marker:
    """A vertical line; `kind` is its class in the style sheet."""

    position: float
    kind: str


@dataclass(frozen=True)
class Histogram:
    """A histogram ready to be drawn; `summary` is a sentence for readers who cannot see it."""

    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    markers: list[Marker]
    unit: str
    summary: str


def lengths_chart(words: Mapping[int, int], paper: float | None) -> Histogram | None:
    """Shares of captions by length in words; the last bar includes all longer ones."""
    pairs = sum(words.values())
    if not pairs:
        return None
    mean = sum(length * count for length, count in words.items()) / pairs
    longest = min(max(words), 2 * (percentile(words, 95) or 0))
    most = max(10, longest, round(1.3 * (paper or 0)))
    step = -(-most // MAX_BARS)
    bins = [0] * (most // step + 1)
    for length, count in words.items():
        bins[min(length, most) // step] += count
    names = [_length_range(number * step, step) for number in range(len(bins))]
    names[-1] = f"{(len(bins) - 1) * step} words and more"
    span = len(bins) * step  # a length of n words covers the interval from n to n + 1
    by = _tick_step(span)
    markers = [Marker(_x(min(mean + 0.5, span) / span), "mean")]
    if paper is not None:
        markers.append(Marker(_x((paper + 0.5) / span), "paper"))
    beside = "" if paper is None else f" (paper {paper:.1f})"
    return _histogram(
        [count / pairs for count in bins],
        names,
        [Tick(_x((at + 0.5) / span), str(at)) for at in range(0, most + 1, by)],
        markers,
        "words",
        f"Lengths: mean {mean:.1f} words{beside}, longest {max(words):,}.",
    )


def sides_chart(shorter: npt.NDArray[np.int64]) -> Histogram | None:
    """Shares of images by shorter side in pixels, on a logarithmic axis."""
    if not len(shorter):
        return None
    low, high = np.log2(SIDES[0]), np.log2(SIDES[-1])
    edges = np.linspace(low, high, round((high - low) * _PER_OCTAVE) + 1)
    names = [f"{round(2**a):,} to {round(2**b):,} pixels" for a, b in pairwise(edges)]
    return _histogram(
        _shares(np.log2(np.maximum(shorter, 1)), edges),
        names,
        [Tick(_x((np.log2(side) - low) / (high - low)), str(side)) for side in SIDES[::2]],
        [],
        "pixels of the shorter side",
        f"Shorter sides as fetched: half have {int(np.median(shorter)):,} pixels or less, the "
        f"smallest {int(shorter.min()):,}, the largest {int(shorter.max()):,}.",
    )


def aspect_ratios_chart(ratios: npt.NDArray[np.float64]) -> Histogram | None:
    """Shares of images by width / height, on a logarithmic axis."""
    if not len(ratios):
        return None
    edges = np.linspace(-2, 2, 4 * 2 * _PER_OCTAVE + 1) - 1 / (4 * _PER_OCTAVE)
    edges = np.append(edges, 2 + 1 / (4 * _PER_OCTAVE))
    names = [f"{2**a:.2f} to {2**b:.2f} times as wide as high" for a, b in pairwise(edges)]
    low, span = edges[0], edges[-1] - edges[0]
    portrait, landscape = float((ratios < 1).mean()), float((ratios > 1).mean())
    return _histogram(
        _shares(np.log2(ratios), edges),
        names,
        [Tick(_x((np.log2(at) - low) / span), text) for at, text in ASPECT_RATIOS.items()],
        [],
        "width : height",
        f"Shapes: {landscape:.0%} wider than high, {portrait:.0%} higher than wide.",
    )


def _histogram(
    shares: Sequence[float],
    names: Sequence[str],
    x_ticks: list[Tick],
    markers: list[Marker],
    unit: str,
    summary: str,
) -> Histogram:
    top = max(shares)
    by = next((step for step in _STEPS if 100 * top / step <= 4), _STEPS[-1])
    highest = max(100 * top, by)
    width = (RIGHT - LEFT) / len(shares)
    bars = [
        Bar(
            x=round(LEFT + number * width, 2),
            y=round(BOTTOM - (BOTTOM - TOP) * 100 * share / highest, 2),
            width=round(max(width - 1, width * 0.8), 2),
            height=round((BOTTOM - TOP) * 100 * share / highest, 2),
            label=f"{name}: {share:.1%}",
        )
        for number, (share, name) in enumerate(zip(shares, names, strict=True))
        if share
    ]
    y_ticks = [
        Tick(round(BOTTOM - (BOTTOM - TOP) * at / highest, 2), f"{at}%")
        for at in range(0, int(highest) + 1, by)
    ]
    return Histogram(bars, x_ticks, y_ticks, markers, unit, summary)


def _shares(values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]) -> list[float]:
    """Share of the values between each two edges; the first and the last include those outside."""
    inside = np.clip(values, edges[0], edges[-1])
    counts, _ = np.histogram(inside, edges)
    return [float(count) for count in counts / len(values)]


def _x(share: float) -> float:
    return round(float(LEFT + (RIGHT - LEFT) * share), 2)


def _tick_step(span: int) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if span / step <= 8)


def _length_range(first: int, step: int) -> str:
    return f"{first} words" if step == 1 else f"{first} to {first + step - 1} words"
