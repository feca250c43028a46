"""CC-News: English news articles out of Common Crawl, in whatever files the user has them."""

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
)
from pmd_pipeline.sources.upstream.files import Span, open_upstream

INFO = Info(
    title="CC-News",
    homepage="https://commoncrawl.org/blog/news-dataset-available",
    licence="Common Crawl's terms of use; each article belongs to its publisher",
    citation="Nagel, CC-NEWS, Common Crawl, 2016; Hamborg et al., news-please, ISI 2017; used as "
    "in Liu et al., RoBERTa, 2019",
    files=(
        *TABLES,
        PublishedFile(pattern="*.txt", description="an article a file", form="text"),
    ),
    images="none: texts alone",
    by_hand="put Parquet files (such as the hub's vblagoje/cc_news), JSON Lines or text files of "
    "articles into the folder; FLAVA's own extraction, as RoBERTa's, was not published",
    collection="unimodal",
    kind="text",
)


def read(
    span: Span, *, column: str = COLUMN, most_chars: int = MOST_CHARS
) -> Iterator[Row | BadRow]:
    """Documents of one span; an article is one.

    Args:
        span: rows of a table, or a whole text file.
        column: what a table calls the text.
        most_chars: a longer article is dropped as `too_long`.
    """
    found = iter([_whole(span, most_chars)]) if span.form == "text" else None
    for text in found or column_texts(span, column, most_chars):
        yield text if isinstance(text, BadRow) else document(text, span.file)


def _whole(span: Span, most_chars: int) -> str | BadRow:
    with open_upstream(span.file) as file:
        return decoded(file.read(4 * most_chars + 1), most_chars)
