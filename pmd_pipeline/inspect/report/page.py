"""The page itself: one HTML file without scripts, which requests nothing from other hosts."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import jinja2
import numpy as np
import polars as pl

from pmd_pipeline import sources
from pmd_pipeline.base.parallel import OnProgress
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.contract.models import Manifest, SourceEntry
from pmd_pipeline.index.build import Index
from pmd_pipeline.inspect.report import captions, charts, gallery, ledgers
from pmd_pipeline.inspect.report.charts import Histogram
from pmd_pipeline.inspect.report.duplicates import DuplicateStats, find_duplicates
from pmd_pipeline.inspect.report.funnel import FunnelStep, LossReason, funnel, loss_reasons
from pmd_pipeline.inspect.report.hosts import HostStats, host_stats
from pmd_pipeline.inspect.report.ledgers import LedgerSample
from pmd_pipeline.inspect.stats import Lengths, lengths, remarks

MAX_LICENCES = 8
MAX_CHARACTERS = 320
"""Of a caption or an address on the page; longer ones are cut, and their length is added."""

_KNOWN = frozenset(sources.names())
_UNITS = ("kB", "MB", "GB", "TB")
_HIDDEN = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, and those that change the direction of text; their numbers are shown."""


@dataclass(frozen=True)
class SourceSection:
    """The section of the page about one source.

    Args:
        records: number of records in the sample, and in the source.
        licences: kept images by licence, if the index states it.
        texts: samples of a source without images.
        lost: examples of dropped and failed pairs, by reason.
    """

    name: str
    title: str
    homepage: str | None
    entry: SourceEntry
    row: Lengths
    records: tuple[int, int]
    steps: list[FunnelStep]
    reasons: list[LossReason]
    hosts: list[HostStats]
    lengths: Histogram | None
    sides: Histogram | None
    aspect_ratios: Histogram | None
    languages: captions.LanguageStats | None
    words: captions.WordStats | None
    licences: list[captions.CountedName]
    images: list[gallery.GalleryImage]
    texts: list[str]
    lost: dict[str, list[gallery.LostExample]]
    has_index: bool


def page(path: str, data: str | None, on_progress: OnProgress = lambda *_: None) -> str:
    """The page about the manifest at `path`, as HTML; `on_progress` counts ledgers.

    Args:
        data: folder or address with the `index` of the shards; None takes the folder in which
            `pmd build` put them. Without an index the page has no upstream rows, no licences and no
            examples of pairs that the index dropped, which it states.

    Raises:
        PmdError: the manifest, a ledger or a shard is missing, or is not what the manifest names.
    """
    manifest = load_manifest(path)
    rows = lengths(manifest)
    by_name = {row.dataset: row for row in rows}
    folder = data or ledgers.data_folder(path, manifest)
    sections = []
    for name in (row.dataset for row in rows if row.dataset in manifest.sources):
        sections.append(source_section(path, manifest, by_name[name], folder))
        on_progress(name, {"ledgers": sum(shard.source == name for shard in manifest.shards)})
    is_text = manifest.kind == "text"
    duplicates = None if is_text else find_duplicates(path, manifest, on_progress)
    return render(manifest, rows, sections, duplicates)


def source_section(path: str, manifest: Manifest, row: Lengths, data: str | None) -> SourceSection:
    """The section about the source of `row` in the manifest at `path`."""
    name = row.dataset
    entry = manifest.sources[name]
    info = sources.load(name).info if name in _KNOWN else None
    sample = ledgers.sample_ledgers(path, manifest, name)
    index = ledgers.matching_index(data, name, entry) if data else None
    dropped = ledgers.dropped_pairs(data, index, sample.parts) if data and index else ()
    sides = sample.kept.select("original_width", "original_height").drop_nulls()
    sides = sides.filter(pl.all_horizontal(pl.all() > 0))
    width, height = sides["original_width"].to_numpy(), sides["original_height"].to_numpy()
    return SourceSection(
        name=name,
        title=info.title if info else name,
        homepage=info.homepage if info else None,
        entry=entry,
        row=row,
        records=(len(sample.rows), sample.records),
        steps=funnel(entry, index),
        reasons=loss_reasons(entry),
        hosts=host_stats(sample),
        lengths=charts.lengths_chart(entry.words, row.paper_words),
        sides=charts.sides_chart(np.minimum(width, height)),
        aspect_ratios=charts.aspect_ratios_chart(width / height),
        languages=captions.language_stats(sample),
        words=captions.word_stats(sample),
        licences=_licence_counts(data, index, sample),
        images=gallery.gallery_images(sample),
        texts=gallery.sample_texts(sample),
        lost=gallery.lost_examples(sample, dropped),
        has_index=index is not None,
    )


def render(
    manifest: Manifest,
    rows: Sequence[Lengths],
    sections: Sequence[SourceSection],
    duplicates: DuplicateStats | None,
) -> str:
    """The HTML of the page."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("pmd_pipeline.inspect.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "count": "{:,}".format,
        "percent": percent,
        "decimal": "{:.1f}".format,
        "visible": visible,
        "link": link,
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "si": short_bytes,
    }
    style = templates.get_template("page.css").render()
    style_hash = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return templates.get_template("page.html").render(
        manifest=manifest,
        rows=rows,
        sections=sections,
        duplicates=duplicates,
        remarks=remarks(manifest),
        chart=charts,
        style=style,
        style_hash=style_hash,
    )


def visible(text: str, limit: int = MAX_CHARACTERS) -> str:
    """`text` cut to `limit` characters, with the numbers of characters that would hide or turn it.

    >>> visible("left\u202eright")
    'left[U+202E]right'
    """
    cut = text[:limit]
    more = f" … ({len(text):,} characters)" if len(text) > limit else ""
    return _HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", cut) + more


def link(url: str | None) -> str | None:
    """`url` if it is an http or https address with a host; else None."""
    if not url or not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return url if parts.scheme in {"http", "https"} and parts.hostname else None


def percent(share: float) -> str:
    """A share in a few characters; only 0 and 1 become 0% and 100%.

    >>> percent(0.9999), percent(0.00001), percent(0.5)
    ('> 99.9%', '< 0.1%', '50.0%')
    """
    if share in {0, 1}:
        return f"{share:.0%}"
    if share < 0.001:
        return "< 0.1%"
    return "> 99.9%" if share > 0.999 else f"{share:.1%}"


def short_bytes(count: int) -> str:
    """Bytes with a unit.

    >>> short_bytes(1_200_000)
    '1.2 MB'
    """
    if count < 1000:
        return f"{count} bytes"
    power = min((len(str(count)) - 1) // 3, len(_UNITS))
    return f"{count / 1000**power:,.1f} {_UNITS[power - 1]}"


def _licence_counts(
    data: str | None, index: Index | None, sample: LedgerSample
) -> list[captions.CountedName]:
    if data is None or index is None:
        return []
    counts = ledgers.licences(data, index, sample)
    total = int(counts["count"].sum())
    shares = [
        captions.CountedName(name, count, count / total) for name, count in counts.iter_rows()
    ]
    rest = sum(share.count for share in shares[MAX_LICENCES:])
    others = f"{len(shares) - MAX_LICENCES:,} others"
    more = [captions.CountedName(others, rest, rest / total)] if rest else []
    return shares[:MAX_LICENCES] + more
