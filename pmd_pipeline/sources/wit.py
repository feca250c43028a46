"""Wikipedia-based Image Text (WIT) v1: images of Wikipedia pages with up to three captions each."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Literal

from pmd_pipeline.base.record import BadRow, Candidate, Json, Row, url_id
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import Info, PaperRow, PublishedFile
from pmd_pipeline.sources.upstream.files import Span, open_upstream

_BASE = "https://storage.googleapis.com/gresearch/wit/"

INFO = Info(
    title="WIT: Wikipedia-based Image Text v1",
    homepage="https://github.com/google-research-datasets/wit",
    licence="annotations CC BY-SA 3.0; each image under its own licence at Wikimedia Commons",
    citation="Srinivasan et al., WIT: Wikipedia-based Image Text Dataset for Multimodal "
    "Multilingual Machine Learning, SIGIR 2021",
    files=(
        *(
            PublishedFile(
                pattern=f"wit_v1.train.all-{number:05}-of-00010.tsv",
                description="training rows, a tenth of them, about 2.5 GB compressed",
                url=f"{_BASE}wit_v1.train.all-{number:05}-of-00010.tsv.gz",
                role="train",
                required=number == 0,
            )
            # The required one last: where it is, a download was not cut short.
            for number in (*range(1, 10), 0)
        ),
        *(
            PublishedFile(
                pattern=f"wit_v1.{split}.all-0000[0-4]-of-00005.tsv",
                # No url: what the paper does not take is not downloaded unasked.
                description=f"rows of the {split} split, "
                f"{_BASE}wit_v1.{split}.all-00000-of-00005.tsv.gz and four more",
                role=split,
                required=False,
            )
            for split in ("val", "test")
        ),
        PublishedFile(
            pattern="wit_v1.train.all-1percent_sample.tsv",
            description="370,373 of the training rows, for a first look",
            url=_BASE + "wit_v1.train.all-1percent_sample.tsv.gz",
            form="sample",
            role="train",
        ),
    ),
    images="originals in full size at upload.wikimedia.org, which answers 403 without a "
    "descriptive User-Agent and 429 to whoever asks fast",
    collection="pmd",
    paper=PaperRow(6, pairs=4_800_000, words=12.8),
    upstream_rows=37_046_386,
)

Split = Literal["train", "val", "test"]

_COLUMNS = (
    "language",
    "page_url",
    "image_url",
    "page_title",
    "section_title",
    "hierarchical_section_title",
    "caption_reference_description",
    "caption_attribution_description",
    "caption_alt_text_description",
    "mime_type",
    "original_height",
    "original_width",
    "is_main_image",
    "attribution_passes_lang_id",
    "page_changed_recently",
    "context_page_description",
    "context_section_description",
)

_ROW_CHARS = 1 << 20
"""A row that is longer has an unclosed quote: whole pages of Wikipedia are shorter."""

_TRUTH = {"true": True, "false": False}
"""WIT's spelling; Python's `bool` takes both for true."""


def read(
    span: Span,
    *,
    language: str = "en",
    splits: Sequence[Split] = ("train",),
    rule: Literal["pmd", "none"] = "pmd",
    ascii: bool = False,  # noqa: A002 - the word of the recipe; nothing here needs the builtin
) -> Iterator[Row | BadRow]:
    """Rows of one file; the id is the address of the image.

    Args:
        span: a whole file, since fields hold newlines.
        language: of the page, which is not always the caption's; rows of others are refused.
        splits: rows of files of other splits are refused.
        rule: `pmd` refuses texts as the Hugging Face port of PMD does; `none` refuses nothing.
        ascii: delete every character outside ASCII, as the port does. It breaks names with accents,
            so it is off.
    """
    refused_split = None if span.role in splits else "split"
    with (
        open_upstream(span.file) as file,
        io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="") as text,
    ):
        for fields in _table(text, span):
            if isinstance(fields, BadRow):
                yield fields
                continue
            page_language, _, image_url = fields[:3]
            refused = refused_split or (None if page_language == language else "page_language")
            if refused:
                # A record of its own: the image may also stand on a page that is taken.
                yield Row(id=f"{page_language} {image_url}", refused=refused)
            else:
                yield _row(dict(zip(_COLUMNS, fields, strict=True)), rule=rule, ascii_only=ascii)


def _table(text: io.TextIOWrapper, span: Span) -> Iterator[list[str] | BadRow]:
    """The rows below the header with their fields in the order of `_COLUMNS`."""
    csv.field_size_limit(_ROW_CHARS)  # one number for the whole process; the default is too small
    rows = _rows(_Lines(text))
    header = next(rows, None)
    missing = [name for name in _COLUMNS if not isinstance(header, list) or name not in header]
    if not isinstance(header, list) or missing:
        raise PmdError(
            f"{span.file} has no column {missing[0]!r} in its first line: "
            "is it a TSV file of WIT v1, whole and with its header?"
        )
    width, places = len(header), [header.index(name) for name in _COLUMNS]
    in_order = places == list(range(width))
    for fields in rows:
        if isinstance(fields, BadRow):
            yield fields
        elif len(fields) != width:
            yield BadRow(f"{len(fields)} columns instead of {width}")
        else:
            yield fields if in_order else [fields[place] for place in places]


def _rows(source: "_Lines") -> Iterator[list[str] | BadRow]:
    reader = csv.reader(source, delimiter="\t")
    while True:
        source.row_chars = 0
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield BadRow(f"no row of a quoted table: {error}")
            continue
        if fields is None:
            return
        if source.ended:
            yield BadRow("the file ends inside an open quote")
        elif fields:
            yield fields


class _Lines:
    """Lines for the csv module, which takes ever more of them while a quote is open."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.row_chars = 0
        self.ended = False
        self._readline = text.readline

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._readline(_ROW_CHARS)
        if not line:
            self.ended = True
            raise StopIteration
        self.row_chars += len(line)
        if self.row_chars > _ROW_CHARS:
            raise csv.Error(f"a row of more than {_ROW_CHARS} characters, so an unclosed quote")
        return line


def _row(fields: dict[str, str], *, rule: Literal["pmd", "none"], ascii_only: bool) -> Row | BadRow:
    address = fields["image_url"].strip()
    if not address.lower().startswith(("http://", "https://")):
        return BadRow(f"image_url is no http address: {address[:80]!r}")
    meta: dict[str, Json] = {"page_url": fields["page_url"], "mime_type": fields["mime_type"]}
    for name in ("is_main_image", "attribution_passes_lang_id"):
        if fields[name] not in {*_TRUTH, ""}:
            return BadRow(f"{name} is neither true nor false: {fields[name][:80]!r}")
        if fields[name]:
            meta[name] = _TRUTH[fields[name]]
    sides: list[int | None] = []
    for name in ("original_width", "original_height"):
        if fields[name] and not _is_side(fields[name]):
            return BadRow(f"{name} is no number of pixels: {fields[name][:80]!r}")
        sides.append(int(fields[name]) if fields[name] else None)
    return Row(
        id=url_id(address),
        url=address,
        candidates=_candidates(fields, rule=rule, ascii_only=ascii_only),
        width=sides[0],
        height=sides[1],
        meta=meta,
    )


def _is_side(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) < 10


def _candidates(
    fields: dict[str, str], *, rule: Literal["pmd", "none"], ascii_only: bool
) -> list[Candidate]:
    """The texts that are there, in PMD's order: reference, attribution, alternative text."""
    found = []
    for name, least in (("reference", 2), ("attribution", 3), ("alt_text", 3)):
        field = f"caption_{name}_description"
        text: str | None = fields[field]
        if not text or not text.strip():
            continue
        if rule == "pmd":
            english = english_part(text) if name == "attribution" else text
            if english is None or len(english.split()) < least:
                found.append(Candidate(text, field, refused="rule"))
                continue
            text = english
        if ascii_only:
            text = text.encode("ascii", errors="ignore").decode()
        found.append(Candidate(text, field))
    return found


def english_part(attribution: str) -> str | None:
    """What an attribution says after `English:`; None where it says nothing there.

    Commons writes `English: a dog Deutsch: ein Hund`: the word before the next `: ` is the name of
    the next language, and goes. As in PMD's port, a colon inside the English text cuts it, too.

    >>> english_part("Galego: Un can English: A dog on a beach Deutsch: Ein Hund")
    'A dog on a beach'
    """
    pieces = attribution.split(": ")
    for number, piece in enumerate(pieces[:-1], start=1):
        if piece.lower().endswith("english"):
            text = pieces[number]
            return " ".join(text.split()[:-1]) if number < len(pieces) - 1 else text
    return None
