"""Wikipedia-based Image Text (WIT) v1: images of Wikipedia pages, with up to three captions."""

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
            # Required file last: if it exists, no download was interrupted before it.
            for number in (*range(1, 10), 0)
        ),
        *(
            PublishedFile(
                pattern=f"wit_v1.{split}.all-0000[0-4]-of-00005.tsv",
                # No url: splits that the paper does not use are not downloaded.
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

_MAX_ROW_CHARS = 1 << 20
"""A longer row has an unclosed quote, because whole Wikipedia pages are shorter."""

_TRUTH = {"true": True, "false": False}
"""WIT's spelling of booleans; `bool` of either string is true."""


def read(
    span: Span,
    *,
    language: str = "en",
    splits: Sequence[Split] = ("train",),
    rule: Literal["pmd", "none"] = "pmd",
    ascii: bool = False,  # noqa: A002 - the recipe's option; the builtin is not used here
) -> Iterator[Row | BadRow]:
    """Rows of one file; the id is the address of the image.

    Args:
        span: a whole file, because fields contain newlines.
        language: of the page, which is not always the caption's; other rows are refused.
        splits: splits to take; rows of other files are refused.
        rule: `pmd` refuses texts as the Hugging Face port of PMD does; `none` refuses no text.
        ascii: delete every character outside ASCII, as the port does. Off by default, because it
            breaks names with accents.
    """
    refused_split = None if span.role in splits else "split"
    with (
        open_upstream(span.file) as file,
        io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="") as text,
    ):
        for fields in _table_rows(text, span):
            if isinstance(fields, BadRow):
                yield fields
                continue
            page_language, _, image_url = fields[:3]
            refused = refused_split or (None if page_language == language else "page_language")
            if refused:
                # An id of its own: the image may also be on a page that is taken.
                yield Row(id=f"{page_language} {image_url}", refused=refused)
            else:
                yield _page_row(
                    dict(zip(_COLUMNS, fields, strict=True)), rule=rule, ascii_only=ascii
                )


def _table_rows(text: io.TextIOWrapper, span: Span) -> Iterator[list[str] | BadRow]:
    """The rows below the header, with their fields in the order of `_COLUMNS`."""
    csv.field_size_limit(_MAX_ROW_CHARS)  # of the whole process; the default is too small
    rows = _csv_rows(_BoundedLines(text))
    header = next(rows, None)
    missing = [name for name in _COLUMNS if not isinstance(header, list) or name not in header]
    if not isinstance(header, list) or missing:
        raise PmdError(
            f"{span.file} has no column {missing[0]!r} in its first line: "
            "is it a TSV file of WIT v1, whole and with its header?"
        )
    width, positions = len(header), [header.index(name) for name in _COLUMNS]
    in_order = positions == list(range(width))
    for fields in rows:
        if isinstance(fields, BadRow):
            yield fields
        elif len(fields) != width:
            yield BadRow(f"{len(fields)} columns instead of {width}")
        else:
            yield fields if in_order else [fields[position] for position in positions]


def _csv_rows(source: "_BoundedLines") -> Iterator[list[str] | BadRow]:
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


class _BoundedLines:
    """Lines for the csv module, which reads on while a quote is open, up to a maximal row."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.row_chars = 0
        self.ended = False
        self._readline = text.readline

    def __iter__(self) -> "_BoundedLines":
        return self

    def __next__(self) -> str:
        line = self._readline(_MAX_ROW_CHARS)
        if not line:
            self.ended = True
            raise StopIteration
        self.row_chars += len(line)
        if self.row_chars > _MAX_ROW_CHARS:
            raise csv.Error(f"a row of more than {_MAX_ROW_CHARS} characters, so an unclosed quote")
        return line


def _page_row(
    fields: dict[str, str], *, rule: Literal["pmd", "none"], ascii_only: bool
) -> Row | BadRow:
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
        candidates=_caption_candidates(fields, rule=rule, ascii_only=ascii_only),
        width=sides[0],
        height=sides[1],
        meta=meta,
    )


def _is_side(digits: str) -> bool:
    return digits.isascii() and digits.isdigit() and len(digits) < 10


def _caption_candidates(
    fields: dict[str, str], *, rule: Literal["pmd", "none"], ascii_only: bool
) -> list[Candidate]:
    """The texts of a row in PMD's order: reference, attribution, alternative text."""
    candidates = []
    for name, least in (("reference", 2), ("attribution", 3), ("alt_text", 3)):
        field = f"caption_{name}_description"
        text: str | None = fields[field]
        if not text or not text.strip():
            continue
        if rule == "pmd":
            english = english_part(text) if name == "attribution" else text
            if english is None or len(english.split()) < least:
                candidates.append(Candidate(text, field, refused="rule"))
                continue
            text = english
        if ascii_only:
            text = text.encode("ascii", errors="ignore").decode()
        candidates.append(Candidate(text, field))
    return candidates


def english_part(attribution: str) -> str | None:
    """The text after `English:` of an attribution; None if there is none.

    Commons writes `English: a dog Deutsch: ein Hund`. The word before the next `: ` is the name of
    the next language and is removed. As in PMD's port, a colon in the English text ends it as well.

    >>> english_part("Galego: Un can English: A dog on a beach Deutsch: Ein Hund")
    'A dog on a beach'
    """
    texts = attribution.split(": ")
    for number, before in enumerate(texts[:-1], start=1):
        if before.lower().endswith("english"):
            text = texts[number]
            return " ".join(text.split()[:-1]) if number < len(texts) - 1 else text
    return None
