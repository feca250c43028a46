"""YFCC100M: photos of Flickr under Creative Commons, with titles and descriptions.

Texts are form-encoded upstream (`+` for a blank, `%C3%A9` for an accent) and are decoded once.
User names, NSIDs and the photo pages that hold them never enter a row; the id leads to the page.
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
"""Size of the spans that the SQLite database is cut into."""

_BUCKET = "https://multimedia-commons.s3-us-west-2.amazonaws.com/"


def by_rowids(file: UpstreamFile) -> Sequence[tuple[int, int | None]]:
    """Cut a SQLite database every `ROWS_PER_SPAN` row numbers.

    Raises:
        PmdError: it is no database, has no table `yfcc100m_dataset`, or is packed.
    """
    with closing(_opened(file)) as database:
        try:
            least, most = database.execute(
                "SELECT min(rowid), max(rowid) FROM yfcc100m_dataset"
            ).fetchone()
        except sqlite3.Error as error:
            raise _not_the_database(file, error) from error
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
            description="any rows of either",
            form="excerpt",
            cut=by_lines,
        ),
        PublishedFile(
            pattern="yfcc100m_dataset.sql",
            description="SQLite database of the 23 columns, md5 b8e3fa7f40ee2f309d63b8de8d755495",
            url=_BUCKET + "tools/etc/yfcc100m_dataset.sql",
            num_bytes=65_644_027_904,
            form="sqlite",
            cut=by_rowids,
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
"""Flickr's year for a photo whose date nobody knows; `null` sorts behind it, too."""

_HEX = [b"%x" % byte for byte in range(256)]


def read(span: Span, *, address: Address = "flickr") -> Iterator[Row | BadRow]:
    """Rows of one span; the id is that of the photo at Flickr.

    Candidates are the description, then the title, and never both in one. `file` is the photo's key
    in the bucket, whichever address is asked for.

    Args:
        span: a stretch of lines, or of row numbers of the database.
        address: `flickr` for the photo at Flickr, `s3` for its copy in the bucket.
    """
    on_s3 = address == "s3"
    if span.form == "subset":
        return _subset(span, on_s3=on_s3)
    if span.form == "sqlite":
        return _database(span, on_s3=on_s3)
    return _tsv(span, on_s3=on_s3)


def photo_hash(downloadurl: bytes) -> bytes:
    """The name of a photo in the bucket: its address's MD5, each byte without its leading zero.

    >>> photo_hash(b"http://farm7.staticflickr.com/6167/6162540254_5d22abd711.jpg")
    b'4ccb23d8746b8d9d76ffd603fc7988'
    """
    digest = md5(downloadurl, usedforsecurity=False).digest()
    return b"".join([_HEX[byte] for byte in digest])


def _tsv(span: Span, *, on_s3: bool) -> Iterator[Row | BadRow]:
    for line in lines(span):
        fields = line.split(b"\t")
        if len(fields) == 23:  # the first edition: no line number, no hash
            fields = [b"", fields[0], b"", *fields[1:]]
        elif len(fields) != 25:
            yield BadRow(f"{len(fields)} columns instead of 25 or 23")
            continue
        yield _row(
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


def _database(span: Span, *, on_s3: bool) -> Iterator[Row | BadRow]:
    select = (
        f"SELECT {_COLUMNS} FROM yfcc100m_dataset "  # noqa: S608 - a constant
        "WHERE rowid >= ? AND rowid < ? ORDER BY rowid"
    )
    with closing(_opened(span.file)) as database:
        try:
            rows = database.execute(select, (span.start, span.stop))
            for values in rows:
                fields = [_bytes(value) for value in values]
                yield _row(*fields, name=b"", on_s3=on_s3)
        except sqlite3.Error as error:
            raise _not_the_database(span.file, error) from error


def _row(  # noqa: PLR0913 - the columns; packing them would cost a tenth of the time
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
    """The row of a photo; `name` is that in the bucket, empty where upstream leaves it out."""
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
        candidates.append(Candidate(decoded(description), "description"))
    if title:
        candidates.append(Candidate(decoded(title), "title"))
    meta: dict[str, Json] = {"flickr_id": image_id}
    if b"" < taken < _UNDATED:
        meta["datetaken"] = taken.decode("utf-8", "replace")
    file = _file_of(name)
    return Row(
        id=image_id,
        candidates=candidates,
        url=_BUCKET + file if on_s3 else downloadurl.decode("utf-8", "replace"),
        file=file,
        licence=(licenseurl or licensename).decode("utf-8", "replace") or None,
        meta=meta,
    )


def decoded(text: bytes) -> str:
    """The text behind its form encoding; bytes that are no UTF-8 become U+FFFD.

    >>> decoded(b"2+%2B+2,+caf%C3%A9")
    '2 + 2, café'
    """
    if b"+" in text:
        text = text.replace(b"+", b" ")
    if b"%" in text:
        text = unquote_to_bytes(text)
    return text.decode("utf-8", "replace")


def _subset(span: Span, *, on_s3: bool) -> Iterator[Row | BadRow]:
    for line in lines(span):
        try:
            pair = json.loads(line)
            meta = json.loads(pair["meta"]) if isinstance(pair, dict) and pair.get("meta") else {}
        except (ValueError, TypeError, RecursionError) as error:
            yield BadRow(f"no JSON object with its meta as JSON: {error}")
            continue
        yield _kept_row(pair, meta, on_s3=on_s3)


def _kept_row(pair: Any, meta: Any, *, on_s3: bool) -> Row | BadRow:  # noqa: ANN401 - any JSON
    """The row of a pair that PMD's authors kept; of its texts, their loader takes the first."""
    if not isinstance(pair, dict) or not isinstance(meta, dict):
        return BadRow("the line or its meta is no object")
    texts = pair.get("texts")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts[:1]):
        return BadRow("texts is no list of texts")
    address = _said(meta, "downloadurl") or _said(pair, "image_url")
    if not address.startswith(("http://", "https://")):
        return BadRow(f"image_url is no http address: {address[:80]!r}")
    file = address.removeprefix(_BUCKET)
    if file == address:
        file = _file_of(photo_hash(address.encode()))
    photo = _said(meta, "photoid") or flickr_id(address)
    return Row(
        id=photo or url_id(address),
        candidates=[Candidate(_whole(text), "texts") for text in texts[:1]],
        url=_BUCKET + file if on_s3 else address,
        file=file,
        licence=_said(meta, "licenseurl") or _said(meta, "licensename") or None,
        meta={"flickr_id": photo} if photo else {},
        filtered=True,
    )


def _said(table: dict[str, Any], name: str) -> str:
    value = table.get(name)
    return _whole(str(value)) if isinstance(value, str | int) else ""


def _whole(text: str) -> str:
    r"""The text with lone surrogates, which JSON can hold and UTF-8 cannot, made into `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _file_of(name: bytes) -> str:
    digits = name.decode()
    return f"data/images/{digits[:3]}/{digits[3:6]}/{digits}.jpg"


def _opened(file: UpstreamFile) -> sqlite3.Connection:
    if file.member or not file.path.endswith(".sql"):
        raise PmdError(f"{file} is packed, and SQLite reads nothing packed: unpack it first")
    try:
        database = sqlite3.connect(
            f"{Path(file.path).absolute().as_uri()}?mode=ro&immutable=1", uri=True
        )
    except sqlite3.Error as error:
        raise _not_the_database(file, error) from error
    database.text_factory = bytes  # decoded like the lines, and never an error in the middle
    return database


def _bytes(value: bytes | str | float | None) -> bytes:
    if value is None:
        return b""
    return value if isinstance(value, bytes) else str(value).encode()


def _not_the_database(file: UpstreamFile, error: sqlite3.Error) -> PmdError:
    return PmdError(
        f"{file} is not the SQLite form of YFCC100M ({error}): download it again, whole"
    )
