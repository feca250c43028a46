"""Numbers, charts and pictures become one HTML file that asks nobody for anything."""

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
from pmd_pipeline.inspect.report import captions as texts
from pmd_pipeline.inspect.report import charts, gallery, ledgers
from pmd_pipeline.inspect.report import drop_reasons as losses
from pmd_pipeline.inspect.report.charts import Histogram
from pmd_pipeline.inspect.report.duplicates import Copies, find_copies
from pmd_pipeline.inspect.report.ledgers import Sample
from pmd_pipeline.inspect.stats import Lengths, lengths, remarks

MOST_LICENCES = 8
MOST_CHARACTERS = 320
"""Of a caption or an address on the page; longer ones say how long they are."""

_KNOWN = frozenset(sources.names())
_UNITS = ("kB", "MB", "GB", "TB")
_HIDDEN = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that are no text, or that turn the text around them: shown by their number."""


@dataclass(frozen=True)
class SourcePart:
    """All that the page says of one source.

    Args:
        records: how many records of the source the sampled numbers are from, and of how many.
        licences: kept images by licence, where the index knows it.
        lost: examples of what is not there, by reason.
        texts: samples of a source without images.
    """

    name: str
    title: str
    homepage: str | None
    entry: SourceEntry
    row: Lengths
    records: tuple[int, int]
    steps: list[losses.Step]
    reasons: list[losses.Reason]
    hosts: list[losses.Host]
    lengths: Histogram | None
    sides: Histogram | None
    shapes: Histogram | None
    languages: texts.Languages | None
    words: texts.Words | None
    licences: list[texts.Share]
    shown: list[gallery.Shown]
    texts: list[str]
    lost: dict[str, list[gallery.Lost]]
    has_index: bool


def page(path: str, data: str | None, on_progress: OnProgress = lambda *_: None) -> str:
    """The page on the manifest at `path`, as HTML; ledgers are told to `watch` as they are read.

    Args:
        data: folder or address with the `index` that the shards were built from; None looks for it
            beside the shards. Without it the page lacks upstream rows, licences, and examples of
            what the index dropped, and says so.

    Raises:
        PmdError: the manifest, a ledger or a shard is not there, or not what the manifest names.
    """
    manifest = load_manifest(path)
    rows = lengths(manifest)
    by_name = {row.dataset: row for row in rows}
    folder = data or ledgers.data_folder(path, manifest)
    parts = []
    for name in (row.dataset for row in rows if row.dataset in manifest.sources):
        parts.append(source_part(path, manifest, by_name[name], folder))
        on_progress(name, {"ledgers": sum(shard.source == name for shard in manifest.shards)})
    copies = find_copies(path, manifest, on_progress) if manifest.kind != "text" else None
    return render(manifest, rows, parts, copies)


def source_part(path: str, manifest: Manifest, row: Lengths, data: str | None) -> SourcePart:
    """What the page on the manifest at `path` says of the source of `row`."""
    name = row.dataset
    entry = manifest.sources[name]
    info = sources.load(name).info if name in _KNOWN else None
    sampled = ledgers.sample(path, manifest, name)
    index = ledgers.matching_index(data, name, entry) if data else None
    dropped = ledgers.dropped_pairs(data, index, sampled.parts) if data and index else ()
    sides = sampled.kept.select("original_width", "original_height").drop_nulls()
    sides = sides.filter(pl.all_horizontal(pl.all() > 0))
    width, height = sides["original_width"].to_numpy(), sides["original_height"].to_numpy()
    return SourcePart(
        name=name,
        title=info.title if info else name,
        homepage=info.homepage if info else None,
        entry=entry,
        row=row,
        records=(len(sampled.rows), sampled.records),
        steps=losses.funnel(entry, index),
        reasons=losses.reasons(entry),
        hosts=losses.hosts(sampled),
        lengths=charts.lengths_chart(entry.words, row.paper_words),
        sides=charts.sides_chart(np.minimum(width, height)),
        shapes=charts.shapes_chart(width / height),
        languages=texts.languages(sampled),
        words=texts.words(sampled),
        licences=_licences(data, index, sampled),
        shown=gallery.shown(sampled),
        texts=gallery.texts(sampled),
        lost=gallery.lost(sampled, dropped),
        has_index=index is not None,
    )


def render(
    manifest: Manifest, rows: Sequence[Lengths], parts: Sequence[SourcePart], copies: Copies | None
) -> str:
    """The HTML of all this."""
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
        parts_of=parts,
        copies=copies,
        remarks=remarks(manifest),
        chart=charts,
        style=style,
        style_hash=style_hash,
    )


def visible(text: str, most: int = MOST_CHARACTERS) -> str:
    """`text` as it can be shown: cut, and with what would hide or turn it named.

    >>> visible("left\u202eright")
    'left[U+202E]right'
    """
    cut = text[:most]
    more = f" … ({len(text):,} characters)" if len(text) > most else ""
    return _HIDDEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", cut) + more


def link(url: str | None) -> str | None:
    """`url` if it may be a link: http or https, to a host; else None."""
    if not url or not url.isprintable() or " " in url:
        return None
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return url if parts.scheme in {"http", "https"} and parts.hostname else None


def percent(share: float) -> str:
    """A share in a few characters, never rounded to all or nothing.

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


def _licences(data: str | None, index: Index | None, sampled: Sample) -> list[texts.Share]:
    if data is None or index is None:
        return []
    counted = ledgers.licences(data, index, sampled)
    total = int(counted["count"].sum())
    shares = [texts.Share(name, count, count / total) for name, count in counted.iter_rows()]
    rest = sum(share.count for share in shares[MOST_LICENCES:])
    others = f"{len(shares) - MOST_LICENCES:,} others"
    more = [texts.Share(others, rest, rest / total)] if rest else []
    return shares[:MOST_LICENCES] + more
