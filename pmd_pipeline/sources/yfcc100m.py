"""YFCC100M: Flickr photos under Creative Commons licences, with titles and descriptions.

Upstream's texts are form-encoded (`+` for a blank, `%C3%A9` for an accent) and are decoded once.
Rows contain no user names, NSIDs or addresses of photo pages; the id leads to the page.
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from hashlib import md5
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

from pmd_pipeline.base.record import BadRow, Candidate, Json, Row, flickr_id, url_id
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import Info, PaperRow, PublishedFile
from pmd_pipeline.sources.upstream.files import Span, UpstreamFile, by_lines, lines

ROWS_PER_SPAN = 500_000
"""Row numbers in a span of the SQLite database."""

_BUCKET = "https://multimedia-commons.s3-us-west-2.amazonaws.com/"


def by_row_ids(file: UpstreamFile) -> Sequence[tuple[int, int | None]]:
    """Spans of `ROWS_PER_SPAN` row numbers of a SQLite database.

    Raises:
        PmdError: it is not a database, has no table `yfcc100m_dataset`, or is packed.
    """
    with closing(_open_database(file)) as database:
        try:
            least, most = database.execute(
                "SELECT min(rowid), max(rowid) FROM yfcc100m_dataset"
            ).fetchone()
        except sqlite3.Error as error:
            raise _database_error(file, error) from error
    if least is None:
        return [(0, 0)]
    starts = range(least, most + 1, ROWS_PER_SPAN)
    return [(start, min(start + ROWS_PER_SPAN, most + 1)) for start in starts]


INFO = Info(
    title="YFCC100M: Yahoo Flickr Creative Commons 100 Million",
    homepage="https://multimediacommons.wordpress.com/yfcc100m-core-dataset/",
    licence="metadata under the terms of Yahoo's Webscope; each photo under one of six Creative "
    "Commons 2.0 licences, named in its row",
    citation="Thomee et al., YFCC100M: The New Data in Multimedia Research, CACM 2016",
    files=(
        PublishedFile(
            pattern="yfcc100m_dataset",
            description="100,000,000 rows of 25 columns, about 14 GB packed (bz2 or tgz)",
            form="tsv",
            cut=by_lines,
        ),
        PublishedFile(
            pattern="yfcc100m_dataset-[0-9]",
            description="the ten parts of the first edition, rows of 23 columns",
            form="parts",
            cut=by_lines,
        ),
        PublishedFile(
            pattern="yfcc100m_dataset*.tsv",
            description="rows of either format",
            form="excerpt",
            cut=by_lines,
        ),
        PublishedFile(
            pattern="yfcc100m_dataset.sql",
            description="SQLite database of the 23 columns, md5 b8e3fa7f40ee2f309d63b8de8d755495",
            url=_BUCKET + "tools/etc/yfcc100m_dataset.sql",
            num_bytes=65_644_027_904,
            form="sqlite",
            cut=by_row_ids,
        ),
        PublishedFile(
            pattern="yfcc100m_subset.jsonl",
            description="the pairs that PMD's authors kept, filtered already",
            form="subset",
            cut=by_lines,
        ),
    ),
    images="from Flickr, one by one, or from the bucket multimedia-commons on S3 (500 pixels, "
    "option address); about 96 of 99 million were left to PMD's authors",
    by_hand="the rows are no longer handed out, unless the bucket still has the database: put "
    "yfcc100m_dataset (Webscope), yfcc100m_dataset.sql (S3) or, once you have accepted the licence "
    "of huggingface.co/datasets/facebook/pmd, its data/yfcc100m_subset.jsonl there",
    collection="pmd",
    paper=PaperRow(9, pairs=30_300_000, words=12.7),
    upstream_rows=100_000_000,
)

Address = Literal["flickr", "s3"]

_COLUMNS = "photoid, datetaken, title, description, downloadurl, licensename, licenseurl, marker"
_UNDATED = b"4501"
"""Flickr's year for a photo without a date; `null` sorts behind it as well."""

_HEX = [b"%x" % byte for byte in range(256)]


def read(span: Span, *, address: Address = "flickr") -> Iterator[Row | BadRow]:
    """Rows of one span; the id is that of the photo at Flickr.

    Candidates are the description, then the title, never both in one. `file` is the photo's key in
    the bucket for either address.

    Args:
        span: a range of lines, or of row numbers of the database.
        address: `flickr` for the photo at Flickr, `s3` for its copy in the bucket.
    """
    on_s3 = address == "s3"
    if span.form == "subset":
        return _subset_rows(span, on_s3=on_s3)
    if span.form == "sqlite":
        return _database_rows(span, on_s3=on_s3)
    return _tsv_rows(span, on_s3=on_s3)


def photo_hash(downloadurl: bytes) -> bytes:
    """The name of a photo in the bucket: MD5 of its address, each byte without leading zero.

    >>> photo_hash(b"http://farm7.staticflickr.com/6167/6162540254_5d22abd711.jpg")
    b'4ccb23d8746b8d9d76ffd603fc7988'
    """
    digest = md5(downloadurl, usedforsecurity=False).digest()
    return b"".join([_HEX[byte] for byte in digest])


def _tsv_rows(span: Span, *, on_s3: bool) -> Iterator[Row | BadRow]:
    for line in lines(span):
        fields = line.split(b"\t")
        if len(fields) == 23:  # the first edition: no line number, no hash
            fields = [b"", fields[0], b"", *fields[1:]]
        elif len(fields) != 25:
            yield BadRow(f"{len(fields)} columns instead of 25 or 23")
            continue
        yield _photo_row(
            fields[1],
            fields[5],
            fields[8],
            fields[9],
            fields[16],
            fields[17],
            fields[18],
            fields[24],
            name=fields[2],
            on_s3=on_s3,
        )


def _database_rows(span: Span, *, on_s3: bool) -> Iterator[Row | BadRow]:
    select = (
        f"SELECT {_COLUMNS} FROM yfcc100m_dataset "  # noqa: S608 - a constant
        "WHERE rowid >= ? AND rowid < ? ORDER BY rowid"
    )
    with closing(_open_database(span.file)) as database:
        try:
            rows = database.execute(select, (span.start, span.stop))
            for values in rows:
                fields = [_as_bytes(value) for value in values]
                yield _photo_row(*fields, name=b"", on_s3=on_s3)
        except sqlite3.Error as error:
            raise _database_error(span.file, error) from error


def _photo_row(  # noqa: PLR0913 - the columns; packing them costs a tenth of the time
    photo: bytes,
    taken: bytes,
    title: bytes,
    description: bytes,
    downloadurl: bytes,
    licensename: bytes,
    licenseurl: bytes,
    marker: bytes,
    *,
    name: bytes,
    on_s3: bool,
) -> Row | BadRow:
    """The row of a photo; `name` is its name in the bucket, empty where upstream omits it."""
    if not photo.isdigit():
        return BadRow(f"photoid is no number: {photo[:80]!r}")
    image_id = photo.decode()
    if marker != b"0":
        if marker == b"1":
            return Row(id=image_id, refused="video")
        return BadRow(f"marker is neither 0 nor 1: {marker[:80]!r}")
    if not downloadurl.startswith((b"http://", b"https://")):
        return BadRow(f"downloadurl is no http address: {downloadurl[:80]!r}")
    if not name:
        name = photo_hash(downloadurl)
    elif not name.isalnum() or not 16 <= len(name) <= 32:
        return BadRow(f"no hash: {name[:80]!r}")
    candidates = []
    if description:
        candidates.append(Candidate(decode_form(description), "description"))
    if title:
        candidates.append(Candidate(decode_form(title), "title"))
    meta: dict[str, Json] = {"flickr_id": image_id}
    if b"" < taken < _UNDATED:
        meta["datetaken"] = taken.decode("utf-8", "replace")
    file = _bucket_key(name)
    return Row(
        id=image_id,
        candidates=candidates,
        url=_BUCKET + file if on_s3 else downloadurl.decode("utf-8", "replace"),
        file=file,
        licence=(licenseurl or licensename).decode("utf-8", "replace") or None,
        meta=meta,
    )


def decode_form(text: bytes) -> str:
    """The text of a form-encoded field; bytes that are not UTF-8 become U+FFFD.

    >>> decode_form(b"2+%2B+2,+caf%C3%A9")
    '2 + 2, café'
    """
    if b"+" in text:
        text = text.replace(b"+", b" ")
    if b"%" in text:
        text = unquote_to_bytes(text)
    return text.decode("utf-8", "replace")


def _subset_rows(span: Span, *, on_s3: bool) -> Iterator[Row | BadRow]:
    for line in lines(span):
        try:
            pair = json.loads(line)
            meta = json.loads(pair["meta"]) if isinstance(pair, dict) and pair.get("meta") else {}
        except (ValueError, TypeError, RecursionError) as error:
            yield BadRow(f"no JSON object with its meta as JSON: {error}")
            continue
        yield _subset_row(pair, meta, on_s3=on_s3)


def _subset_row(pair: Any, meta: Any, *, on_s3: bool) -> Row | BadRow:  # noqa: ANN401 - any JSON
    """The row of a pair that PMD's authors kept, with the first text, as their loader takes it."""
    if not isinstance(pair, dict) or not isinstance(meta, dict):
        return BadRow("the line or its meta is no object")
    texts = pair.get("texts")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts[:1]):
        return BadRow("texts is no list of texts")
    address = _text_field(meta, "downloadurl") or _text_field(pair, "image_url")
    if not address.startswith(("http://", "https://")):
        return BadRow(f"image_url is no http address: {address[:80]!r}")
    file = address.removeprefix(_BUCKET)
    if file == address:
        file = _bucket_key(photo_hash(address.encode()))
    photo = _text_field(meta, "photoid") or flickr_id(address)
    return Row(
        id=photo or url_id(address),
        candidates=[Candidate(_without_surrogates(text), "texts") for text in texts[:1]],
        url=_BUCKET + file if on_s3 else address,
        file=file,
        licence=_text_field(meta, "licenseurl") or _text_field(meta, "licensename") or None,
        meta={"flickr_id": photo} if photo else {},
        filtered=True,
    )


def _text_field(table: dict[str, Any], name: str) -> str:
    value = table.get(name)
    return _without_surrogates(str(value)) if isinstance(value, str | int) else ""


def _without_surrogates(text: str) -> str:
    r"""The text with `?` for lone surrogates, which JSON can represent and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _bucket_key(name: bytes) -> str:
    digits = name.decode()
    return f"data/images/{digits[:3]}/{digits[3:6]}/{digits}.jpg"


def _open_database(file: UpstreamFile) -> sqlite3.Connection:
    if file.member or not file.path.endswith(".sql"):
        raise PmdError(f"{file} is packed, and SQLite cannot read it: unpack it first")
    try:
        database = sqlite3.connect(
            f"{Path(file.path).absolute().as_uri()}?mode=ro&immutable=1", uri=True
        )
    except sqlite3.Error as error:
        raise _database_error(file, error) from error
    database.text_factory = bytes  # decoded like the lines, so bad text is no SQL error
    return database


def _as_bytes(value: bytes | str | float | None) -> bytes:
    if value is None:
        return b""
    return value if isinstance(value, bytes) else str(value).encode()


def _database_error(file: UpstreamFile, error: sqlite3.Error) -> PmdError:
    return PmdError(
        f"{file} is not the SQLite form of YFCC100M ({error}): download it again, whole"
    )
