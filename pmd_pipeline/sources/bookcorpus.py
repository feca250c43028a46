"""BookCorpus: unpublished novels, as ordered sentences or as whole books."""

from collections.abc import Iterator

from pmd_pipeline.base.record import BadRow, Row
from pmd_pipeline.sources import Info, PublishedFile
from pmd_pipeline.sources.upstream.documents import (
    DEFAULT_COLUMN,
    MAX_CHARS,
    TABLE_FILES,
    bounded_lines,
    column_texts,
    decode_text,
    document_row,
    too_long_row,
)
from pmd_pipeline.sources.upstream.files import Span, by_lines

_LONGEST_BOOK = 20_000_000

INFO = Info(
    title="BookCorpus",
    homepage="https://yknzhu.wixsite.com/mbweb",
    licence="not licensed for redistribution; the books belong to their authors",
    citation="Zhu et al., Aligning Books and Movies, ICCV 2015",
    files=(
        *TABLE_FILES,
        PublishedFile(
            pattern="*.txt",
            description="sentences or paragraphs, one per line",
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


def read(span: Span, *, column: str = DEFAULT_COLUMN, lines: int = 1000) -> Iterator[Row | BadRow]:
    """Documents of one span: consecutive lines, or the rest of a book.

    Upstream's rows are single sentences in the order of the books, and do not state where a book
    ends. A model must see them in that order. A row of several lines is a book, or part of one.

    Args:
        span: rows of a table, or lines of a text file.
        column: column of the text in a table.
        lines: most lines in a document; fewer if they would be too long.
    """
    block: list[str] = []
    num_chars = 0
    for line in _lines(span, column):
        if isinstance(line, BadRow):
            yield line
            continue
        is_full = len(block) == lines or num_chars + len(line or "") >= MAX_CHARS
        if block and (line is None or is_full):
            yield document_row("\n".join(block), span.file)
            block, num_chars = [], 0
        if line:
            block.append(line)
            num_chars += len(line) + 1
    if block:
        yield document_row("\n".join(block), span.file)


def _lines(span: Span, column: str) -> Iterator[str | BadRow | None]:
    """Lines of text, and None where a book is known to end."""
    if span.form == "text":
        for line in bounded_lines(span, 4 * MAX_CHARS):
            yield too_long_row(MAX_CHARS) if line is None else decode_text(line, MAX_CHARS)
        return
    for text in column_texts(span, column, _LONGEST_BOOK):
        if isinstance(text, BadRow):
            yield text
            continue
        book_lines = text.splitlines()
        yield from (too_long_row(MAX_CHARS) if len(one) > MAX_CHARS else one for one in book_lines)
        if len(book_lines) > 1:
            yield None
