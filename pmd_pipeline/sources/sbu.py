"""SBU Captioned Photos: a JSON file of columns, or two text files joined by line number."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from pmd_pipeline.base.record import BadRow, Candidate, Row, flickr_id, url_id
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import Info, PaperRow, PublishedFile
from pmd_pipeline.sources.upstream.files import Span, json_items, lines

INFO = Info(
    title="SBU Captioned Photos",
    homepage="https://www.cs.rice.edu/~vo9/sbucaptions/",
    licence="not specified; the photos belong to their Flickr users",
    citation="Ordonez et al., Im2Text, NIPS 2011",
    files=(
        PublishedFile(
            pattern="sbu-captions-all.json",
            description="addresses and captions, as columns",
            url="https://www.cs.rice.edu/~vo9/sbucaptions/sbu-captions-all.tar.gz",
            sha256="3d145fb58fea5bf5680e71c82e93d336c1a06d726dbea7f7702d49f5bf2ff532",
            num_bytes=49_787_719,
            form="json",
        ),
        PublishedFile(
            pattern="SBU_captioned_photo_dataset_urls.txt",
            description="addresses, one per line, of the older SBUCaptionedPhotoDataset.tar.gz",
            form="text",
            role="urls",
        ),
        PublishedFile(
            pattern="SBU_captioned_photo_dataset_captions.txt",
            description="captions, one per line, in the order of the addresses",
            form="text",
            role="captions",
            cut=None,
        ),
    ),
    images="from Flickr, one by one; 0.86 of 1.0 million were left some years ago, and in 2025 "
    "most addresses were reported gone",
    collection="pmd",
    paper=PaperRow(2, pairs=1_000_000, words=12.1),
    upstream_rows=1_000_000,
)

_WEB = ("http://", "https://")
_OLD_HOST, _HOST = "http://static.flickr.com/", "https://static.flickr.com/"
_END = object()


def read(span: Span) -> Iterator[Row | BadRow]:
    """Rows of the whole list; the id is the address. Ids of Flickr users are left out.

    Raises:
        PmdError: the columns, or the two text files, have different lengths.
    """
    for number, (address, caption) in enumerate(_columns(span)):
        if not isinstance(address, str) or not address.strip().startswith(_WEB):
            yield BadRow(f"row {number} has no http address")
            continue
        if not isinstance(caption, str):
            yield BadRow(f"row {number} has no caption")
            continue
        url = address.strip()
        if url.startswith(_OLD_HOST):
            url = _HOST + url.removeprefix(_OLD_HOST)
        photo = flickr_id(url)
        yield Row(
            id=url_id(url),
            url=url,
            candidates=[Candidate(caption, "caption")],
            meta={"flickr_id": photo} if photo else {},
        )


def _columns(span: Span) -> Iterator[tuple[Any, Any]]:
    """Address and caption of each row."""
    if span.form == "text":
        captions = Span(span.companion("captions"))
        where = f"{span.file} and {captions.file}"
        return _zip_columns(where, _decoded_lines(span), _decoded_lines(captions))
    names = ("image_urls", "captions", "user_ids")
    columns = [json_items(span.file, f"{name}.item") for name in names]
    return ((row[0], row[1]) for row in _zip_columns(str(span.file), *columns))


def _decoded_lines(span: Span) -> Iterator[str]:
    return (line.decode("utf-8", errors="replace") for line in lines(span))


def _zip_columns(where: str, *columns: Iterator[Any]) -> Iterator[tuple[Any, ...]]:
    for number, row in enumerate(zip_longest(*columns, fillvalue=_END)):
        if any(value is _END for value in row):
            raise PmdError(
                f"{where}: the lists have different lengths (one ends after {number}), so captions "
                "cannot be matched to addresses: download again"
            )
        yield row
