"""A poster of a training run: loss curves, recall beside chance, and results of a few queries."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import open_read, whole_file
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.demo.training_summary import DIRECTIONS, LOSSES, RANKS, TrainingSummary
from pmd_pipeline.shards.shard_reader import ShardSample, decode_sample, read_member, read_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from PIL.Image import Image

_DARK, _LIGHT, _RED, _GREEN = "#1b2b3a", "#8fb3d9", "#c44e52", "#2a9d5c"
_GREY = "#b8bec4"


@dataclass(frozen=True)
class SearchResult:
    """The result of a text-to-image query.

    Args:
        expected: key of the image whose caption the query is.
        keys: keys of the nearest images, nearest first.
    """

    query: str
    expected: str
    keys: list[str]


def sample_queries(manifest: str, count: int) -> list[tuple[str, str]]:
    """Key and first caption of `count` images of a manifest, evenly spaced in its order."""
    samples = list(_shard_samples(manifest))
    chosen = [samples[number * len(samples) // count] for number in range(count)]
    return [(one.key, json.loads(_member(one, metadata=True))["captions"][0]) for one in chosen]


def image_digests(manifest: str) -> Iterator[str]:
    """The SHA-256 of the fetched bytes of each image of a manifest."""
    for one in _shard_samples(manifest):
        yield str(json.loads(_member(one, metadata=True))["sha256"])


def draw_poster(
    summary: TrainingSummary, results: Sequence[SearchResult], manifest: str, path: str
) -> None:
    """Write a PNG of the loss curves, the recall beside chance, and the results of queries.

    Args:
        summary: losses and recall.
        results: one row of images each.
        manifest: manifest of the images.
        path: of the PNG.

    Raises:
        PmdError: matplotlib is not installed, or `path` cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise PmdError('the poster needs matplotlib: pip install "pmd-flava[plot]"') from error
    figure = Figure(figsize=(14, 5.6 + 2.1 * len(results)), layout="constrained", facecolor="white")
    heights = [5.6, 2.1 * len(results)]
    [[curves], [gallery]] = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    _draw_curves(curves, summary)
    _draw_gallery(gallery, results, _decoded_images(manifest, results))
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def _draw_curves(figure: "SubFigure", summary: TrainingSummary) -> None:
    figure.suptitle(
        f"What FLAVA learned in {summary.steps:,} steps", fontsize=15, color=_DARK, weight="bold"
    )
    panels = list(chain.from_iterable(figure.subplots(2, 4)))
    for axes, name in zip([*panels[:3], *panels[4:7]], LOSSES, strict=True):
        _draw_loss(axes, name, summary)
    _draw_recall(panels[3], summary)
    _draw_bars(panels[7], summary)


def _draw_loss(axes: "Axes", name: str, summary: TrainingSummary) -> None:
    steps, values = summary.losses.get(name, ([], []))
    axes.plot(steps, values, ".", color=_LIGHT, markersize=2.5, alpha=0.6)
    axes.plot(steps, _smooth(values), color=_DARK, linewidth=1.6)
    _label_axes(axes, LOSSES[name], "nats")
    axes.set_ylim(bottom=0)


def _draw_recall(axes: "Axes", summary: TrainingSummary) -> None:
    steps = sorted(summary.recall)
    for (direction, words), colour in zip(DIRECTIONS.items(), (_DARK, _GREEN), strict=True):
        values = [100 * summary.recall[step][f"{direction}_r1"] for step in steps]
        axes.plot(steps, values, "o-", color=colour, label=words, markersize=4)
    chance = 100 * summary.last_evaluation("text_to_image_r1")[1]
    axes.axhline(chance, color=_RED, linestyle="--", linewidth=1.2, label="chance")
    _label_axes(axes, "R@1 on images never trained on", "%")
    axes.legend(fontsize=8, frameon=False)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _draw_bars(axes: "Axes", summary: TrainingSummary) -> None:
    for index, (direction, colour) in enumerate(zip(DIRECTIONS, (_DARK, _GREEN), strict=True)):
        both = [summary.last_evaluation(f"{direction}_r{rank}") for rank in RANKS]
        at = np.arange(len(RANKS)) + 0.4 * index
        bars = axes.bar(at, [100 * value for value, _ in both], width=0.36, color=colour)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=8, color=_DARK)
        axes.hlines(
            [100 * chance for _, chance in both], at - 0.18, at + 0.18, color=_RED, linewidth=1.6
        )
    _label_axes(axes, "Recall at the end, and chance in red", "%")
    axes.set_xticks(np.arange(len(RANKS)) + 0.2, [f"R@{rank}" for rank in RANKS])
    axes.set_xlabel("")


def _draw_gallery(
    figure: "SubFigure", results: Sequence[SearchResult], images: dict[str, "Image"]
) -> None:
    figure.suptitle(
        "Text-to-image search on images never trained on, nearest first",
        fontsize=15,
        color=_DARK,
        weight="bold",
    )
    columns = max(len(one.keys) for one in results)
    widths = [1.5, 1, 0.12, *[1] * columns]
    rows = figure.subplots(len(results), len(widths), width_ratios=widths, squeeze=False)
    for axes in chain.from_iterable(rows):
        axes.axis("off")
    for axes, one in zip(rows, results, strict=True):
        query = fill(one.query, 24)
        axes[0].text(0, 0.5, query, va="center", fontsize=12, color=_DARK, style="italic")
        _draw_image(axes[1], images[one.expected])
        for panel, key in zip(axes[3:], one.keys, strict=False):
            _draw_image(panel, images[key], is_hit=key == one.expected)
    rows[0][1].set_title("its image", fontsize=11, color=_DARK)
    rows[0][3].set_title("results (green: its image)", fontsize=11, color=_GREEN, loc="left")


def _draw_image(axes: "Axes", image: "Image", *, is_hit: bool = False) -> None:
    """Draw an image in the middle of a square, so that rows and columns are aligned."""
    axes.imshow(np.asarray(image))
    width, height = image.size
    radius = 0.53 * max(width, height)
    axes.set_xlim(width / 2 - radius, width / 2 + radius)
    axes.set_ylim(height / 2 + radius, height / 2 - radius)
    corners = [0, width, width, 0, 0], [0, 0, height, height, 0]
    axes.plot(*corners, color=_GREEN if is_hit else _GREY, linewidth=5 if is_hit else 0.8)


def _label_axes(axes: "Axes", title: str, unit: str) -> None:
    axes.set_title(title, fontsize=10, color=_DARK)
    axes.set_xlabel("steps", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: Sequence[float]) -> list[float]:
    """The moving average of the values."""
    radius = len(values) // 40
    return [
        float(np.mean(values[max(0, index - radius) : index + radius + 1]))
        for index in range(len(values))
    ]


def _decoded_images(manifest: str, results: Sequence[SearchResult]) -> dict[str, "Image"]:
    keys = {key for one in results for key in (one.expected, *one.keys)}
    samples = {sample.key: sample for sample in _shard_samples(manifest) if sample.key in keys}
    return {key: decode_sample(samples[key], _member(samples[key])) for key in keys}


def _shard_samples(manifest: str) -> Iterator[ShardSample]:
    for entry in load_manifest(manifest).shards:
        yield from read_samples(located(manifest, entry.path), entry)


def _member(sample: ShardSample, *, metadata: bool = False) -> bytes:
    with open_read(sample.shard) as file:
        return read_member(file, sample, sample.metadata if metadata else sample.image)
