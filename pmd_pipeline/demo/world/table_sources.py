"""Sources with tables as annotations: SBU, CC3M, CC12M, WIT and YFCC100M."""

import bz2
import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Sequence
from hashlib import md5
from typing import TypeAlias
from urllib.parse import quote_plus

from pmd_pipeline.demo.world.captions import (
    alt_text,
    description,
    encyclopedic,
    foreign,
    photo_title,
    phrase,
    scene_phrase,
    stock_title,
)
from pmd_pipeline.demo.world.languages import LANGUAGES
from pmd_pipeline.demo.world.sample_source import SampleImage, SampleSource
from pmd_pipeline.demo.world.scenes import Scene

Line: TypeAlias = tuple[str, str]
"""Address and caption."""

Style: TypeAlias = Callable[[Scene, random.Random], str]

_SBU_QUIRKS = (
    *("unavailable", "moved", "de", "missing", "again", "blank", "cut", "no_address", "ja"),
    *(
        "unavailable",
        "rotated",
        "gone",
        "rate_limited_once",
        "echo",
        "empty",
        "fr",
        "no_caption",
        "cmyk",
    ),
    *("reset", "es", "unavailable", "page", "busy", "broken", "ru", "mislabelled", "moved"),
)

_CC3M_QUIRKS = (
    *("missing", "png", "page", "again", "short_row", "cut", "moved", "forbidden", "webp"),
    *("blank", "empty", "loop", "echo", "gif", "gone", "swapped", "busy", "drawing", "reset"),
    *("mislabelled", "broken", "reset_once", "rate_limited", "palette_png", "withheld", "deep_png"),
)

_CC12M_QUIRKS = (
    *(
        "missing",
        "webp",
        "forbidden",
        "echo",
        "swapped",
        "page",
        "fr",
        "rate_limited_once",
        "cut",
        "es",
    ),
    *("again", "gone", "palette_png", "short_row", "moved", "empty", "ar", "png", "loop", "blank"),
    *("broken", "gif", "cmyk", "ru", "reset", "spelled", "withheld", "rotated"),
)

_WIT_QUIRKS = (
    *(
        "de",
        "drawing",
        "png",
        "again",
        "fr",
        "rule",
        "rate_limited_once",
        "ja",
        "bomb",
        "foreign_page",
        "gif",
    ),
    *("ru", "uncaptioned", "missing", "palette_png", "es", "short_row", "deep_png", "rule", "ar"),
    *("forbidden", "foreign_page", "de", "busy", "drawing", "cmyk", "cut", "fr", "rate_limited"),
)

_YFCC_QUIRKS = (
    *(
        "video",
        "de",
        "camera",
        "unavailable",
        "short",
        "title",
        "html",
        "ja",
        "uncaptioned",
        "plus",
    ),
    *("missing", "fr", "video", "columns", "camera", "rotated", "ru", "blank", "gone", "undated"),
    *("es", "short", "unavailable", "moved", "ar", "html", "title", "rate_limited_once", "cut"),
)

_WIT_COLUMNS = (
    *("language", "page_url", "image_url", "page_title", "section_title"),
    *("hierarchical_section_title", "caption_reference_description"),
    *("caption_attribution_description", "caption_alt_text_description", "mime_type"),
    *("original_height", "original_width", "is_main_image", "attribution_passes_lang_id"),
    *("page_changed_recently", "context_page_description", "context_section_description"),
)

_LICENCES = {
    "Attribution License": "by",
    "Attribution-ShareAlike License": "by-sa",
    "Attribution-NonCommercial License": "by-nc",
    "Attribution-NonCommercial-NoDerivs License": "by-nc-nd",
}


def sbu(source: SampleSource) -> None:
    """SBU: one JSON object with three columns."""

    def url(sample: SampleImage) -> str:
        server, photo = 1000 + sample.number, sample.random_digits(10)
        return f"http://static.flickr.com/{server}/{photo}_{sample.random_hex(10)}.jpg"

    lines: list[tuple[str, str | None]] = []
    for sample in source.samples(_SBU_QUIRKS):
        if sample.quirk == "no_address":
            lines.append(("n/a", sample.caption(photo_title)))
            source.expect(sample, "bad_row")
        elif sample.quirk == "no_caption":
            lines.append((url(sample), None))
            source.expect(sample, "bad_row")
        else:
            lines += _captioned(source, sample, url(sample), photo_title)
    columns = {
        "image_urls": [address for address, _ in lines],
        "user_ids": [f"{47_000_000 + number}@N08" for number in range(len(lines))],
        "captions": [caption for _, caption in lines],
    }
    source.files["sbu-captions-all.json"] = json.dumps(columns).encode()


def cc3m(source: SampleSource) -> None:
    """CC3M: caption TAB url."""
    lines = _web_lines(source, _CC3M_QUIRKS, alt_text, "{caption}\t{url}\n")
    source.files["Train_GCC-training.tsv"] = lines.encode()


def cc12m(source: SampleSource) -> None:
    """CC12M: url TAB caption, and no newline at the end."""
    lines = _web_lines(source, _CC12M_QUIRKS, stock_title, "{url}\t{caption}\n")
    source.files["cc12m.tsv"] = lines.removesuffix("\n").encode()


def wit(source: SampleSource) -> None:
    """WIT: gzipped tables with header and quoting, ten for training and one for validation."""
    rows: list[list[str]] = []
    for sample in source.samples(_WIT_QUIRKS):
        for row, reason in _wit_rows(source, sample):
            rows.append(row)
            source.expect(sample, reason)
    validation = [source.sample(source.scenes + number) for number in range(source.scenes // 20)]
    for sample in validation:
        source.expect(sample, "split")
    tables = {f"train.all-{part:05d}-of-00010": rows[part::10] for part in range(10)}
    tables["val.all-00000-of-00005"] = [
        _wit_row(source, one, "en", _wit_captions(one)) for one in validation
    ]
    for name, part in tables.items():
        text = io.StringIO(newline="")
        csv.writer(text, delimiter="\t", lineterminator="\n").writerows([_WIT_COLUMNS, *part])
        source.files[f"wit_v1.{name}.tsv.gz"] = gzip.compress(text.getvalue().encode(), mtime=0)


def yfcc100m(source: SampleSource) -> None:
    """YFCC100M: 25 columns, form-encoded, packed with bzip2."""
    lines = []
    for sample in source.samples(_YFCC_QUIRKS):
        columns = _yfcc_row(source, sample)
        lines.append("\t".join(columns[:20] if sample.quirk == "columns" else columns) + "\n")
        reasons = {
            "video": "video",
            "camera": "has_words",
            "short": "has_words",
            "uncaptioned": "no_caption",
            "blank": "no_text",
            "columns": "bad_row",
        }
        reason = "is_language" if sample.quirk in LANGUAGES else reasons.get(sample.quirk or "")
        source.expect(sample, reason)
    source.files["yfcc100m_dataset.bz2"] = bz2.compress("".join(lines).encode())


def _captioned(source: SampleSource, sample: SampleImage, url: str, style: Style) -> list[Line]:
    """The lines of one image; counts their pairs."""
    first = sample.caption(style)
    captions = {"again": [first, sample.caption(style)], "echo": [first, first]}
    lines = [(url, caption) for caption in captions.get(sample.quirk or "", [first])]
    if sample.quirk == "spelled":
        # two spellings of one address, which must become one record
        lines.append((f"{url.replace('https://', 'HTTPS://')}#top", sample.caption(style)))
    source.put(url, sample)
    for _, caption in lines:
        source.expect(sample, None if caption else "no_text")
    return lines


def _web_lines(source: SampleSource, quirks: Sequence[str], style: Style, form: str) -> str:
    lines = []
    for sample in source.samples(quirks):
        url = _web_url(sample)
        if sample.quirk in {"short_row", "swapped"}:
            caption = sample.caption(style)
            line = form.format(url=caption, caption=url)
            lines.append(f"{caption}\n" if sample.quirk == "short_row" else line)
            source.expect(sample, "bad_row")
            continue
        captioned = _captioned(source, sample, url, style)
        lines += [form.format(url=address, caption=caption) for address, caption in captioned]
    return "".join(lines)


def _web_url(sample: SampleImage) -> str:
    number, name = sample.number, sample.random_hex(8)
    slug = phrase(sample.scene.groups[0], size=True).replace(" ", "-")
    return (
        f"https://images.stock.example/photos/{slug}-picture-id{name}?s=612x612",
        f"http://blog.example/wp-content/uploads/2019/{number % 12 + 1:02d}/{name}.jpg",
        f"https://cdn.shop.example/image/product/sized/{name}/{slug}.jpg?width=640&height=640",
        f"http://farm4.staticflickr.com/3448/{sample.random_digits(10)}_{name}aa_z.jpg",
        f"http://78.media.example/{name}/tumblr_{name}_500.jpg",
    )[number % 5]


def _wit_rows(source: SampleSource, sample: SampleImage) -> list[tuple[list[str], str | None]]:
    """The rows of one image, each with the reason for its drop, or None."""
    quirk, scene = sample.quirk or "", sample.scene
    shape, german = scene.groups[0].shape, foreign(scene, "de")

    def row(language: str, *captions: str) -> list[str]:
        return _wit_row(source, sample, language, captions)

    if quirk in LANGUAGES:
        attribution = f"English: {encyclopedic(scene, sample.rng)}"
        return [(row(quirk, foreign(scene, quirk), attribution, ""), "page_language")]
    if quirk == "rule":
        return [(row("en", shape, f"Deutsch: {german}", f"a {shape}"), "rule")]
    if quirk == "uncaptioned":
        return [(row("en", "", "", ""), "no_caption")]
    english = row("en", *_wit_captions(sample))
    if quirk == "short_row":
        return [(english[:-1], "bad_row")]
    others: dict[str, list[tuple[list[str], str | None]]] = {
        "foreign_page": [(row("de", german, "", ""), "page_language")],
        "again": [(row("en", *_wit_captions(sample)), None)],
    }
    return [(english, None), *others.get(quirk, [])]


def _wit_captions(sample: SampleImage) -> tuple[str, str, str]:
    """Reference, attribution and alternative text; one or two of them are not empty."""
    text = encyclopedic(sample.scene, sample.rng)
    other = f"drawing that shows {scene_phrase(sample.scene, size=True)}"
    return (
        (text, "", ""),
        ("", f"English: {text}", ""),
        (text, f"English: {other}", other),
        ("", f"English: {text} Deutsch: {foreign(sample.scene, 'de')}", ""),
        ("", f"Deutsch: {foreign(sample.scene, 'de')}", text),
    )[sample.number % 5]


def _wit_row(
    source: SampleSource, sample: SampleImage, language: str, captions: Sequence[str]
) -> list[str]:
    shape = sample.scene.groups[0].shape.title()
    width, height = sample.scene.frame
    suffix, mime = {
        "drawing": ("svg", "image/svg+xml"),
        "gif": ("gif", "image/gif"),
        "png": ("png", "image/png"),
        "palette_png": ("png", "image/png"),
        "deep_png": ("png", "image/png"),
        "bomb": ("png", "image/png"),
    }.get(sample.quirk or "", ("jpg", "image/jpeg"))
    name = f"{shape}_{sample.number}.{suffix}"
    folder = md5(name.encode(), usedforsecurity=False).hexdigest()
    url = f"https://upload.wikimedia.org/wikipedia/commons/{folder[0]}/{folder[:2]}/{name}"
    context = f'A {shape.lower()} is a figure in geometry.\nIt is also called a "{shape}".'
    return [
        language,
        f"https://{language}.wikipedia.org/wiki/{shape}",
        source.put(url, sample),
        shape,
        "Gallery" if sample.number % 2 else "",
        f"{shape} / Gallery" if sample.number % 2 else shape,
        *captions,
        mime,
        str(height),
        str(width),
        "false" if sample.number % 3 else "true",
        "true" if language == "en" else "false",
        "true" if sample.number % 2 else "false",
        context,
        context if sample.number % 2 else "",
    ]


def _yfcc_row(source: SampleSource, sample: SampleImage) -> list[str]:
    number, server, farm = sample.number, 7000 + sample.number, sample.number % 9 + 1
    photo, secret = sample.random_digits(10), sample.random_hex(10)
    url = source.put(f"http://farm{farm}.staticflickr.com/{server}/{photo}_{secret}.jpg", sample)
    digest = md5(url.encode(), usedforsecurity=False).digest()
    name = "".join(f"{byte:x}" for byte in digest)  # without leading zeros, as upstream's
    path = f"data/images/{name[:3]}/{name[3:6]}/{name}.jpg"
    source.put(f"https://multimedia-commons.s3-us-west-2.amazonaws.com/{path}", sample)
    title, text = _yfcc_texts(sample)
    licence, short = list(_LICENCES.items())[number % len(_LICENCES)]
    undated = sample.quirk == "undated"
    day = f"2011-{number % 12 + 1:02d}-{number % 28 + 1:02d} 21:13:32.0"
    user = f"{15_000_000 + number}@N00"
    return [
        *(str(number), photo, name, user, "sample+person"),
        *("4501-01-01 00:00:00.0" if undated else day, str(1_316_432_672 + number)),
        *("Nokia+N950", quote_plus(title), quote_plus(text), "shapes,black+and+white", ""),
        *(("-122.288368", "47.622562", "15") if number % 3 else ("", "", "")),
        *(f"http://www.flickr.com/photos/{user}/{photo}/", url, licence),
        *(f"http://creativecommons.org/licenses/{short}/2.0/", str(server), str(farm)),
        *(secret, sample.random_hex(10), "jpg", "1" if sample.quirk == "video" else "0"),
    ]


def _yfcc_texts(sample: SampleImage) -> tuple[str, str]:
    """Title and description, one of which may be empty."""
    scene, rng, quirk = sample.scene, sample.rng, sample.quirk or ""
    text, camera = description(scene, rng), f"IMG_{sample.random_digits(4)}"
    one = scene.groups[0]
    short = f"{one.colour.title()} {one.shape}"
    if quirk in LANGUAGES:
        caption = foreign(scene, quirk)
        return ("", caption) if sample.number % 2 else (caption, caption)
    variants = {
        "camera": (camera, ""),
        "short": (short, ""),
        "title": (photo_title(scene, rng), foreign(scene, "de")),
        "html": (
            short,
            f'<b>My picture</b> &amp; more: {text} <a href="http://blog.example/">here</a>',
        ),
        "plus": (short, f"Shapes + colours: {text}"),
        "uncaptioned": ("", ""),
        "blank": ("", " "),
    }
    usual = ((camera, text), (short, text), (photo_title(scene, rng), ""))[sample.number % 3]
    return variants.get(quirk, usual)
