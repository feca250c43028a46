"""The two-column lines of both Conceptual Captions sources."""

from collections.abc import Iterator

from pmd_pipeline.base.record import BadRow, Candidate, Row, flickr_id, url_id
from pmd_pipeline.sources.upstream.files import Span, lines


def captioned_urls(span: Span, *, url: int, caption: int) -> Iterator[Row | BadRow]:
    """Rows of a TSV without header or quoting; `url` and `caption` are its columns.

    A quote has no meaning, so a caption that starts with `"` does not take in the next rows. A row
    whose `url` column is not an address is a bad row, so swapped columns are noticed.
    """
    for line in lines(span):
        fields = line.decode("utf-8", errors="replace").split("\t")
        if len(fields) <= max(url, caption):
            yield BadRow(f"{len(fields)} columns instead of {max(url, caption) + 1}")
            continue
        address = fields[url].strip()
        if not address.lower().startswith(("http://", "https://")):
            yield BadRow(f"column {url + 1} is no http address: {address[:80]!r}")
            continue
        photo = flickr_id(address)
        yield Row(
            id=url_id(address),
            url=address,
            candidates=[Candidate(fields[caption], "caption")],
            meta={"flickr_id": photo} if photo else {},
        )
