"""BookCorpus: unpublished novels, as sentences in their order or as whole books."""

from collections.abc import Iterator

from pmd_pipeline.base.record import BadRow, Row
from pmd_pipeline.sources import Info, PublishedFile
from pmd_pipeline.sources.upstream.documents import (
    COLUMN,
    MOST_CHARS,
    TABLES,
    column_texts,
    decoded,
    document,
    short_lines,
    too_long,
)
from pmd_pipeline.sources.upstream.files import Span, by_lines

_LONGEST_BOOK = 20_000_000

INFO = Info(
    title="BookCorpus",
    homepage="https://yknzhu.wixsite.com/mbweb",
    licence="not licensed for redistribution; the books belong to their authors",
    citation="Zhu et al., Aligning Books and Movies, ICCV 2015",
    files=(
        *TABLES,
        PublishedFile(
            pattern="*.txt",
            description="sentences or paragraphs, one a line",
            form="text",
            cut=by_lines,
        ),
    ),
    images="none: texts alone",
    by_hand="its authors have withdrawn it: put the Parquet files of the hub's bookcorpus "
    "(74,004,228 sentences), books_large_p1.txt and books_large_p2.txt, or books as text files "
    "into the folder",
    upstream_rows=74_004_228,
    collection="unimodal",
    kind="text",
)


def read(span: Span, *, column: str = COLUMN, lines: int = 1000) -> Iterator[Row | BadRow]:
    """Documents of one span: so many lines as they follow each other, or the rest of a book.

    Upstream's rows are single sentences in the order of the books, without a word of where a book
    ends; a model must see them in that order. A row of several lines is a book, or part of one.

    Args:
        span: rows of a table, or lines of a text file.
        column: what a table calls the text.
        lines: that make a document, if they are not too long for one.
    """
    block: list[str] = []
    num_chars = 0
    for line in _lines(span, column):
        if isinstance(line, BadRow):
            yield line
            continue
        is_full = len(block) == lines or num_chars + len(line or "") >= MOST_CHARS
        if block and (line is None or is_full):
            yield document("\n".join(block), span.file)
            block, num_chars = [], 0
        if line:
            block.append(line)
            num_chars += len(line) + 1
    if block:
        yield document("\n".join(block), span.file)


def _lines(span: Span, column: str) -> Iterator[str | BadRow | None]:
    """Lines that have words, and None where a book ends, as far as upstream says so."""
    if span.form == "text":
        for line in short_lines(span, 4 * MOST_CHARS):
            yield too_long(MOST_CHARS) if line is None else decoded(line, MOST_CHARS)
        return
    for text in column_texts(span, column, _LONGEST_BOOK):
        if isinstance(text, BadRow):
            yield text
            continue
        found = text.splitlines()
        yield from (too_long(MOST_CHARS) if len(one) > MOST_CHARS else one for one in found)
        if len(found) > 1:
            yield None
