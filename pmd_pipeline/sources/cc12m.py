"""Conceptual 12M: `url TAB caption`, the reverse of CC3M; names of people are `<PERSON>`."""

from collections.abc import Iterator

from pmd_pipeline.base.record import BadRow, Row
from pmd_pipeline.sources import Info, PaperRow, PublishedFile
from pmd_pipeline.sources.upstream.files import Span, by_lines
from pmd_pipeline.sources.upstream.tsv import captioned_urls

INFO = Info(
    title="Conceptual 12M",
    homepage="https://github.com/google-research-datasets/conceptual-12m",
    licence="annotations free for any purpose, as is; the images belong to their owners",
    citation="Changpinyo et al., Conceptual 12M, CVPR 2021",
    files=(
        PublishedFile(
            pattern="cc12m.tsv",
            description="addresses and captions",
            url="https://storage.googleapis.com/conceptual_12m/cc12m.tsv",
            sha256="892b549d493c7e75ade10d46c88c9ddabb097790d912b74cfc0ea4ff035ec2c3",
            num_bytes=2_707_204_412,
            cut=by_lines,
        ),
    ),
    images="from the web, one by one; 7.7 of 12.4 million were left in 2025",
    collection="pmd",
    paper=PaperRow(7, pairs=11_000_000, words=17.3),
    upstream_rows=12_423_374,
)


def read(span: Span) -> Iterator[Row | BadRow]:
    """Rows of one span; the id is the address."""
    yield from captioned_urls(span, url=0, caption=1)
