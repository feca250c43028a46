"""Caption lengths and counts of a manifest, beside those of the paper."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from pmd_pipeline import sources
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import whole_file
from pmd_pipeline.contract.models import Manifest
from pmd_pipeline.dataset.manifest import repeated_images
from pmd_pipeline.sources.upstream.held_out import KARPATHY_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PERCENTILES = (5, 50, 95)

PAPER_WORDS = 12.1
"""Mean caption length of all nine sources in FLAVA's table of PMD; the mean of its rows is 12.2."""


_COUNTED = {
    "pairs": ("pairs", "caption"),
    "images": ("images", "caption"),
    "text": ("documents", "document"),
}
"""Names of what is counted and of the text whose words are counted, by kind of manifest."""


@dataclass(frozen=True)
class Lengths:
    """One row: pairs kept, dropped and failed, images, and lengths of kept captions in words.

    For images alone the pairs are images; for texts alone they are documents, and `tokens` includes
    [CLS] and [SEP]. `paper_*` are the columns of FLAVA's table of PMD, None for other sources;
    `difference` is `words_mean` minus the paper's.
    """

    dataset: str
    pairs: int
    paper_pairs: int | None
    images: int
    unique_images: int
    words_mean: float | None
    paper_words: float | None
    difference: float | None
    words_p5: int | None
    words_p50: int | None
    words_p95: int | None
    words_max: int | None
    dropped: int
    failed: int
    sequences: int | None = None
    tokens: int | None = None


def lengths(manifest: Manifest) -> list[Lengths]:
    """A row per source in the order of the paper's table, and their total if there are several."""
    table = paper_order()
    listed = [name for name in table if name in manifest.sources]
    order = [*listed, *sorted(manifest.sources.keys() - set(listed))]
    rows = [_row_of(name, manifest, [name], *_paper_columns(name)) for name in order]
    if len(rows) > 1:
        pairs = sum(row.paper_pairs or 0 for row in rows) or None
        words = PAPER_WORDS if len(listed) == len(table) == len(order) else None
        rows.append(_row_of("total", manifest, order, pairs, words))
    return rows


def paper_order() -> list[str]:
    """The sources in the order of FLAVA's table of PMD."""
    rows = {name: row for name in sources.names() if (row := sources.load(name).info.paper)}
    return sorted(rows, key=lambda name: rows[name].number)


def percentile(histogram: Mapping[int, int], share: float) -> int | None:
    """The least number of words that at least `share` per cent of captions do not exceed.

    >>> percentile({3: 1, 5: 2, 9: 1}, 50)
    5
    """
    total = sum(histogram.values())
    cumulative = 0
    for words, count in sorted(histogram.items()):
        cumulative += count
        if cumulative * 100 >= share * total:
            return words
    return None


def remarks(manifest: Manifest) -> list[str]:
    """Warnings about the numbers: missing parts, limits, leakage that was not checked."""
    warnings = []
    for name, entry in sorted(manifest.sources.items()):
        if entry.limit is not None:
            warnings.append(f"{name} was built with --limit {entry.limit:,}")
        if missing := manifest.missing.get(name):
            warnings.append(f"{name} lacks {len(missing)} parts: run its build again")
        if entry.leakage == "not checked":
            warnings.append(f"{name} may hold evaluation images: there was no {KARPATHY_FILE}")
    return warnings + repeated_images(manifest)


def as_table(rows: Sequence[Lengths], manifest: Manifest) -> list[Table]:
    """Tables for a terminal of 80 columns or more: lengths, counts and reasons."""
    thing, text = _COUNTED[manifest.kind]
    lengths_table = _empty_table(
        f"{manifest.name}: words in a {text}, digest {manifest.digest[:16]}"
    )
    names = ("dataset", thing, "paper", "words", "paper", "diff")
    for name in (*names, *(f"p{share}" for share in PERCENTILES), "max"):
        _add_column(lengths_table, name)
    counts_table = _empty_table(f"{thing} by outcome")
    products = ("sequences", "tokens") if manifest.kind == "text" else ("images",)
    for name in ("dataset", *products, "kept", "dropped", "failed"):
        _add_column(counts_table, name)
    reasons = _empty_table(f"{thing} not kept, by reason")
    _add_column(reasons, "dataset")
    reasons.add_column("dropped by the recipe; failed")
    for number, row in enumerate(rows):
        ends = number == len(rows) - 2  # a line above the total
        lengths_table.add_row(
            row.dataset,
            f"{row.pairs:,}",
            _millions(row.paper_pairs),
            _decimal(row.words_mean),
            _decimal(row.paper_words),
            _signed(row.difference),
            *(_integer(value) for value in (row.words_p5, row.words_p50, row.words_p95)),
            _integer(row.words_max),
            end_section=ends,
        )
        counts_table.add_row(
            row.dataset,
            *(f"{asdict(row)[name]:,}" for name in products),
            f"{row.pairs:,}",
            f"{row.dropped:,}",
            f"{row.failed:,}",
            end_section=ends,
        )
        if entry := manifest.sources.get(row.dataset):
            both = (_format_counts(entry.counts.dropped), _format_counts(entry.counts.failed))
            reasons.add_row(row.dataset, "; ".join(one for one in both if one))
    if manifest.kind != "images":
        return [lengths_table, counts_table, reasons]
    counts_table.title = f"{manifest.name}: {counts_table.title}, digest {manifest.digest[:16]}"
    return [counts_table, reasons]


def as_json(rows: Sequence[Lengths], manifest: Manifest) -> str:
    """The rows with their reasons, for programs."""
    datasets = []
    for row in rows:
        entry = manifest.sources.get(row.dataset)
        reasons = (
            {"dropped_by": entry.counts.dropped, "failed_by": entry.counts.failed} if entry else {}
        )
        datasets.append({**asdict(row), **reasons})
    return json.dumps(
        {"manifest": manifest.name, "digest": manifest.digest, "datasets": datasets}, indent=1
    )


def as_csv(rows: Sequence[Lengths]) -> str:
    """The rows as CSV with a header."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Lengths)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue().rstrip("\n")


def as_markdown(rows: Sequence[Lengths]) -> str:
    """The rows as a Markdown table."""
    names = [field.name for field in fields(Lengths)]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = ["" if value is None else str(value) for value in asdict(row).values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[Lengths], manifest: Manifest, path: str) -> None:
    """Write a PNG with a histogram of caption lengths per source, with its mean and the paper's.

    Raises:
        PmdError: matplotlib is not installed, there is nothing to plot, or `path` cannot be
            written.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise PmdError('--plot needs matplotlib: pip install "pmd-flava[plot]"') from error
    plotted = [row for row in rows if row.dataset in manifest.sources and row.words_max]
    if not plotted:
        thing = "captions" if manifest.kind == "images" else _COUNTED[manifest.kind][0]
        raise PmdError(f"{manifest.name} has no {thing} to plot")
    columns = min(3, len(plotted))
    lines = -(-len(plotted) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * lines), layout="constrained")
    for number, row in enumerate(plotted):
        axes = figure.add_subplot(lines, columns, number + 1)
        _draw_histogram(axes, row, manifest.sources[row.dataset].words, _COUNTED[manifest.kind])
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120, metadata={"Software": None})


def _draw_histogram(
    axes: "Axes", row: Lengths, words: Mapping[int, int], names: tuple[str, str]
) -> None:
    thing, text = names
    longest = max(2 * (row.words_p95 or 0), 10)
    inside = {
        length: 100 * count / row.pairs for length, count in words.items() if length <= longest
    }
    axes.bar(list(inside), list(inside.values()), width=1.0, color="#8fb3d9")
    if row.words_mean is not None:
        axes.axvline(row.words_mean, color="#1b2b3a", label=f"mean {row.words_mean:.1f}")
    if row.paper_words is not None:
        axes.axvline(
            row.paper_words, color="#c44e52", linestyle="--", label=f"paper {row.paper_words}"
        )
    axes.set_xlim(0, longest + 1)
    axes.set_title(f"{row.dataset}, {row.pairs:,} {thing}", fontsize=10)
    axes.set_xlabel(f"words in a {text}", fontsize=8)
    axes.set_ylabel(f"% of {text}s", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _empty_table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0)
    )


def _add_column(table: Table, name: str) -> None:
    table.add_column(name, justify="left" if name == "dataset" else "right", no_wrap=True)


def _paper_columns(name: str) -> tuple[int | None, float | None]:
    row = sources.load(name).info.paper if name in sources.names() else None
    return (row.pairs, row.words) if row else (None, None)


def _row_of(
    dataset: str,
    manifest: Manifest,
    names: Sequence[str],
    paper_pairs: int | None,
    paper_words: float | None,
) -> Lengths:
    entries = [manifest.sources[name] for name in names]
    words: dict[int, int] = {}
    for entry in entries:
        for length, count in entry.words.items():
            words[length] = words.get(length, 0) + count
    texts = sum(words.values())
    mean = sum(length * count for length, count in words.items()) / texts if texts else None
    is_text = manifest.kind == "text"
    low, middle, high = (percentile(words, share) for share in PERCENTILES)
    return Lengths(
        dataset=dataset,
        pairs=sum(entry.counts.kept for entry in entries),
        paper_pairs=paper_pairs,
        images=sum(entry.images for entry in entries),
        unique_images=sum(entry.unique_images for entry in entries),
        words_mean=None if mean is None else round(mean, 3),
        paper_words=paper_words,
        difference=None if mean is None or paper_words is None else round(mean - paper_words, 3),
        words_p5=low,
        words_p50=middle,
        words_p95=high,
        words_max=max(words, default=None),
        dropped=sum(sum(entry.counts.dropped.values()) for entry in entries),
        failed=sum(sum(entry.counts.failed.values()) for entry in entries),
        sequences=sum(shard.pairs for shard in manifest.shards if shard.source in names)
        if is_text
        else None,
        tokens=sum(entry.tokens for entry in entries) if is_text else None,
    )


def _format_counts(reasons: Mapping[str, int]) -> str:
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count:,}" for reason, count in ordered)


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}M"


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{round(value, 1) + 0.0:+.1f}"  # no -0.0


def _integer(value: int | None) -> str:
    return "" if value is None else str(value)
