"""The sources whose upstream is a table: SBU, CC3M, CC12M, WIT and YFCC100M."""

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
    stock_title,
    things,
)
from pmd_pipeline.demo.world.languages import LANGUAGES
from pmd_pipeline.demo.world.plan import Picture, Plan
from pmd_pipeline.demo.world.scenes import Scene

Line: TypeAlias = tuple[str, str]
"""Address and caption."""

Style: TypeAlias = Callable[[Scene, random.Random], str]

_SBU_QUIRKS = (
    *("unavailable", "moved", "de", "missing", "again", "blank", "cut", "no_address", "ja"),
    *("unavailable", "rotated", "gone", "hurried", "echo", "empty", "fr", "no_caption", "cmyk"),
    *("reset", "es", "unavailable", "page", "busy", "broken", "ru", "mislabelled", "moved"),
)

_CC3M_QUIRKS = (
    *("missing", "png", "page", "again", "short_row", "cut", "moved", "forbidden", "webp"),
    *("blank", "empty", "loop", "echo", "gif", "gone", "swapped", "busy", "drawing", "reset"),
    *("mislabelled", "broken", "hiccup", "overrun", "palette_png", "withheld", "deep_png"),
)

_CC12M_QUIRKS = (
    *("missing", "webp", "forbidden", "echo", "swapped", "page", "fr", "hurried", "cut", "es"),
    *("again", "gone", "palette_png", "short_row", "moved", "empty", "ar", "png", "loop", "blank"),
    *("broken", "gif", "cmyk", "ru", "reset", "spelled", "withheld", "rotated"),
)

_WIT_QUIRKS = (
    *("de", "drawing", "png", "again", "fr", "rule", "hurried", "ja", "bomb", "abroad", "gif"),
    *("ru", "untold", "missing", "palette_png", "es", "short_row", "deep_png", "rule", "ar"),
    *("forbidden", "abroad", "de", "busy", "drawing", "cmyk", "cut", "fr", "overrun"),
)

_YFCC_QUIRKS = (
    *("video", "de", "camera", "unavailable", "short", "title", "html", "ja", "untold", "plus"),
    *("missing", "fr", "video", "columns", "camera", "rotated", "ru", "blank", "gone", "undated"),
    *("es", "short", "unavailable", "moved", "ar", "html", "title", "hurried", "cut"),
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


def sbu(plan: Plan) -> None:
    """SBU: one JSON object with three columns."""

    def url(picture: Picture) -> str:
        server, photo = 1000 + picture.number, picture.digits(10)
        return f"http://static.flickr.com/{server}/{photo}_{picture.hexes(10)}.jpg"

    lines: list[tuple[str, str | None]] = []
    for picture in plan.pictures(_SBU_QUIRKS):
        if picture.quirk == "no_address":
            lines.append(("n/a", picture.said(photo_title)))
            plan.expect(picture, "bad_row")
        elif picture.quirk == "no_caption":
            lines.append((url(picture), None))
            plan.expect(picture, "bad_row")
        else:
            lines += _captioned(plan, picture, url(picture), photo_title)
    columns = {
        "image_urls": [address for address, _ in lines],
        "user_ids": [f"{47_000_000 + number}@N08" for number in range(len(lines))],
        "captions": [caption for _, caption in lines],
    }
    plan.files["sbu-captions-all.json"] = json.dumps(columns).encode()


def cc3m(plan: Plan) -> None:
    """CC3M: caption TAB url."""
    lines = _web_lines(plan, _CC3M_QUIRKS, alt_text, "{caption}\t{url}\n")
    plan.files["Train_GCC-training.tsv"] = lines.encode()


def cc12m(plan: Plan) -> None:
    """CC12M: url TAB caption, and no newline at the end."""
    lines = _web_lines(plan, _CC12M_QUIRKS, stock_title, "{url}\t{caption}\n")
    plan.files["cc12m.tsv"] = lines.removesuffix("\n").encode()


def wit(plan: Plan) -> None:
    """WIT: gzipped tables with header and quoting, ten for training and one for validation."""
    rows: list[list[str]] = []
    for picture in plan.pictures(_WIT_QUIRKS):
        for row, reason in _wit_rows(plan, picture):
            rows.append(row)
            plan.expect(picture, reason)
    held = [plan.picture(plan.scenes + number) for number in range(plan.scenes // 20)]
    for picture in held:
        plan.expect(picture, "split")
    tables = {f"train.all-{part:05d}-of-00010": rows[part::10] for part in range(10)}
    tables["val.all-00000-of-00005"] = [_wit_row(plan, one, "en", _said_once(one)) for one in held]
    for name, part in tables.items():
        text = io.StringIO(newline="")
        csv.writer(text, delimiter="\t", lineterminator="\n").writerows([_WIT_COLUMNS, *part])
        plan.files[f"wit_v1.{name}.tsv.gz"] = gzip.compress(text.getvalue().encode(), mtime=0)


def yfcc100m(plan: Plan) -> None:
    """YFCC100M: 25 columns, form-encoded, packed with bzip2."""
    lines = []
    for picture in plan.pictures(_YFCC_QUIRKS):
        columns = _yfcc_row(plan, picture)
        lines.append("\t".join(columns[:20] if picture.quirk == "columns" else columns) + "\n")
        reasons = {
            "video": "video",
            "camera": "has_words",
            "short": "has_words",
            "untold": "no_caption",
            "blank": "no_text",
            "columns": "bad_row",
        }
        reason = "is_language" if picture.quirk in LANGUAGES else reasons.get(picture.quirk or "")
        plan.expect(picture, reason)
    plan.files["yfcc100m_dataset.bz2"] = bz2.compress("".join(lines).encode())


def _captioned(plan: Plan, picture: Picture, url: str, style: Style) -> list[Line]:
    """The lines of one picture, and their pairs expected."""
    first = picture.said(style)
    captions = {"again": [first, picture.said(style)], "echo": [first, first]}
    lines = [(url, caption) for caption in captions.get(picture.quirk or "", [first])]
    if picture.quirk == "spelled":
        # one address in two spellings, which must meet in one record
        lines.append((f"{url.replace('https://', 'HTTPS://')}#top", picture.said(style)))
    plan.put(url, picture)
    for _, caption in lines:
        plan.expect(picture, None if caption else "no_text")
    return lines


def _web_lines(plan: Plan, quirks: Sequence[str], style: Style, form: str) -> str:
    lines = []
    for picture in plan.pictures(quirks):
        url = _web_url(picture)
        if picture.quirk in {"short_row", "swapped"}:
            caption = picture.said(style)
            line = form.format(url=caption, caption=url)
            lines.append(f"{caption}\n" if picture.quirk == "short_row" else line)
            plan.expect(picture, "bad_row")
            continue
        found = _captioned(plan, picture, url, style)
        lines += [form.format(url=address, caption=caption) for address, caption in found]
    return "".join(lines)


def _web_url(picture: Picture) -> str:
    number, name = picture.number, picture.hexes(8)
    slug = phrase(picture.scene.groups[0], size=True).replace(" ", "-")
    return (
        f"https://images.stock.example/photos/{slug}-picture-id{name}?s=612x612",
        f"http://blog.example/wp-content/uploads/2019/{number % 12 + 1:02d}/{name}.jpg",
        f"https://cdn.shop.example/image/product/sized/{name}/{slug}.jpg?width=640&height=640",
        f"http://farm4.staticflickr.com/3448/{picture.digits(10)}_{name}aa_z.jpg",
        f"http://78.media.example/{name}/tumblr_{name}_500.jpg",
    )[number % 5]


def _wit_rows(plan: Plan, picture: Picture) -> list[tuple[list[str], str | None]]:
    """The rows of one image, with the reason why each is dropped or None."""
    quirk, scene = picture.quirk or "", picture.scene
    shape, german = scene.groups[0].shape, foreign(scene, "de")

    def row(language: str, *told: str) -> list[str]:
        return _wit_row(plan, picture, language, told)

    if quirk in LANGUAGES:
        attribution = f"English: {encyclopedic(scene, picture.dice)}"
        return [(row(quirk, foreign(scene, quirk), attribution, ""), "page_language")]
    if quirk == "rule":
        return [(row("en", shape, f"Deutsch: {german}", f"a {shape}"), "rule")]
    if quirk == "untold":
        return [(row("en", "", "", ""), "no_caption")]
    english = row("en", *_said_once(picture))
    if quirk == "short_row":
        return [(english[:-1], "bad_row")]
    others: dict[str, list[tuple[list[str], str | None]]] = {
        "abroad": [(row("de", german, "", ""), "page_language")],
        "again": [(row("en", *_said_once(picture)), None)],
    }
    return [(english, None), *others.get(quirk, [])]


def _said_once(picture: Picture) -> tuple[str, str, str]:
    """Reference, attribution and alternative text, of which one is there, or a second one, too."""
    text = encyclopedic(picture.scene, picture.dice)
    other = f"drawing that shows {things(picture.scene, size=True)}"
    return (
        (text, "", ""),
        ("", f"English: {text}", ""),
        (text, f"English: {other}", other),
        ("", f"English: {text} Deutsch: {foreign(picture.scene, 'de')}", ""),
        ("", f"Deutsch: {foreign(picture.scene, 'de')}", text),
    )[picture.number % 5]


def _wit_row(plan: Plan, picture: Picture, language: str, told: Sequence[str]) -> list[str]:
    shape = picture.scene.groups[0].shape.title()
    width, height = picture.scene.frame
    suffix, mime = {
        "drawing": ("svg", "image/svg+xml"),
        "gif": ("gif", "image/gif"),
        "png": ("png", "image/png"),
        "palette_png": ("png", "image/png"),
        "deep_png": ("png", "image/png"),
        "bomb": ("png", "image/png"),
    }.get(picture.quirk or "", ("jpg", "image/jpeg"))
    name = f"{shape}_{picture.number}.{suffix}"
    folder = md5(name.encode(), usedforsecurity=False).hexdigest()
    url = f"https://upload.wikimedia.org/wikipedia/commons/{folder[0]}/{folder[:2]}/{name}"
    context = f'A {shape.lower()} is a figure in geometry.\nIt is also called a "{shape}".'
    return [
        language,
        f"https://{language}.wikipedia.org/wiki/{shape}",
        plan.put(url, picture),
        shape,
        "Gallery" if picture.number % 2 else "",
        f"{shape} / Gallery" if picture.number % 2 else shape,
        *told,
        mime,
        str(height),
        str(width),
        "false" if picture.number % 3 else "true",
        "true" if language == "en" else "false",
        "true" if picture.number % 2 else "false",
        context,
        context if picture.number % 2 else "",
    ]


def _yfcc_row(plan: Plan, picture: Picture) -> list[str]:
    number, server, farm = picture.number, 7000 + picture.number, picture.number % 9 + 1
    photo, secret = picture.digits(10), picture.hexes(10)
    url = plan.put(f"http://farm{farm}.staticflickr.com/{server}/{photo}_{secret}.jpg", picture)
    digest = md5(url.encode(), usedforsecurity=False).digest()
    name = "".join(f"{byte:x}" for byte in digest)  # without leading zeros, as upstream has it
    path = f"data/images/{name[:3]}/{name[3:6]}/{name}.jpg"
    plan.put(f"https://multimedia-commons.s3-us-west-2.amazonaws.com/{path}", picture)
    title, text = _yfcc_texts(picture)
    licence, short = list(_LICENCES.items())[number % len(_LICENCES)]
    undated = picture.quirk == "undated"
    day = f"2011-{number % 12 + 1:02d}-{number % 28 + 1:02d} 21:13:32.0"
    user = f"{15_000_000 + number}@N00"
    return [
        *(str(number), photo, name, user, "sample+person"),
        *("4501-01-01 00:00:00.0" if undated else day, str(1_316_432_672 + number)),
        *("Nokia+N950", quote_plus(title), quote_plus(text), "shapes,black+and+white", ""),
        *(("-122.288368", "47.622562", "15") if number % 3 else ("", "", "")),
        *(f"http://www.flickr.com/photos/{user}/{photo}/", url, licence),
        *(f"http://creativecommons.org/licenses/{short}/2.0/", str(server), str(farm)),
        *(secret, picture.hexes(10), "jpg", "1" if picture.quirk == "video" else "0"),
    ]


def _yfcc_texts(picture: Picture) -> tuple[str, str]:
    """Title and description, both there or one of them, most often."""
    scene, dice, quirk = picture.scene, picture.dice, picture.quirk or ""
    text, camera = description(scene, dice), f"IMG_{picture.digits(4)}"
    one = scene.groups[0]
    short = f"{one.colour.title()} {one.shape}"
    if quirk in LANGUAGES:
        said = foreign(scene, quirk)
        return ("", said) if picture.number % 2 else (said, said)
    odd = {
        "camera": (camera, ""),
        "short": (short, ""),
        "title": (photo_title(scene, dice), foreign(scene, "de")),
        "html": (
            short,
            f'<b>My picture</b> &amp; more: {text} <a href="http://blog.example/">here</a>',
        ),
        "plus": (short, f"Shapes + colours: {text}"),
        "untold": ("", ""),
        "blank": ("", " "),
    }
    usual = ((camera, text), (short, text), (photo_title(scene, dice), ""))[picture.number % 3]
    return odd.get(quirk, usual)
