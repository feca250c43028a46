"""Conceptual Captions 3M: `caption TAB url`, lower-cased and tokenised upstream."""

from collections.abc import Iterator

from pmd_pipeline.base.record import BadRow, Row
from pmd_pipeline.sources import Info, PaperRow, PublishedFile
from pmd_pipeline.sources.upstream.files import Span, by_lines
from pmd_pipeline.sources.upstream.tsv import captioned_urls

INFO = Info(
    title="Conceptual Captions 3M",
    homepage="https://ai.google.com/research/ConceptualCaptions",
    licence="annotations free for any purpose, as is; the images belong to their owners",
    citation="Sharma et al., Conceptual Captions, ACL 2018",
    files=(
        PublishedFile(
            pattern="*GCC-training.tsv",
            description="training captions",
            url="https://storage.googleapis.com/gcc-data/Train/GCC-training.tsv"
            "?_ga=2.191230122.-1896153081.1529438250",
            sha256="eab84e5ebc713a41a6b1f6ae6fa3d6617821a13b03fe24e16004cc4aac189635",
            num_bytes=564_607_502,
            cut=by_lines,
        ),
    ),
    images="from the web, one by one; 1.9 to 2.0 million of 3.3 were left in 2022 to 2024",
    collection="pmd",
    paper=PaperRow(4, pairs=3_100_000, words=10.3),
    upstream_rows=3_318_333,
)


def read(span: Span) -> Iterator[Row | BadRow]:
    """Rows of one span; the id is the address, and the validation file is left out as in PMD."""
    yield from captioned_urls(span, url=1, caption=0)
