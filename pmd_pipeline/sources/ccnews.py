"""CC-News: English news articles of Common Crawl, from the files that the user has."""

from collections.abc import Iterator

from pmd_pipeline.base.record import BadRow, Row
from pmd_pipeline.sources import Info, PublishedFile
from pmd_pipeline.sources.upstream.documents import (
    DEFAULT_COLUMN,
    MAX_CHARS,
    TABLE_FILES,
    column_texts,
    decode_text,
    document_row,
)
from pmd_pipeline.sources.upstream.files import Span, open_upstream

INFO = Info(
    title="CC-News",
    homepage="https://commoncrawl.org/blog/news-dataset-available",
    licence="Common Crawl's terms of use; each article belongs to its publisher",
    citation="Nagel, CC-NEWS, Common Crawl, 2016; Hamborg et al., news-please, ISI 2017; used as "
    "in Liu et al., RoBERTa, 2019",
    files=(
        *TABLE_FILES,
        PublishedFile(pattern="*.txt", description="one article per file", form="text"),
    ),
    images="none: texts alone",
    by_hand="put Parquet files (such as the hub's vblagoje/cc_news), JSON Lines or text files of "
    "articles into the folder; FLAVA's own extraction, as RoBERTa's, was not published",
    collection="unimodal",
    kind="text",
)


def read(
    span: Span, *, column: str = DEFAULT_COLUMN, most_chars: int = MAX_CHARS
) -> Iterator[Row | BadRow]:
    """Documents of one span, one for each article.

    Args:
        span: rows of a table, or a whole text file.
        column: column of the text in a table.
        most_chars: a longer article is dropped as `too_long`.
    """
    texts = (
        iter([_file_text(span, most_chars)])
        if span.form == "text"
        else column_texts(span, column, most_chars)
    )
    for text in texts:
        yield text if isinstance(text, BadRow) else document_row(text, span.file)


def _file_text(span: Span, most_chars: int) -> str | BadRow:
    with open_upstream(span.file) as file:
        return decode_text(file.read(4 * most_chars + 1), most_chars)
