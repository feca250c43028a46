"""Documents of text corpora: Parquet, JSON Lines or plain text, compressed or not."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from pmd_pipeline.base.record import BadRow, Candidate, Row, full_text
from pmd_pipeline.sources import PublishedFile
from pmd_pipeline.sources.upstream.files import (
    SPAN_BYTES,
    Span,
    UpstreamFile,
    by_lines,
    open_upstream,
)

DEFAULT_COLUMN = "text"
MAX_CHARS = 1_000_000
"""Longer documents are bad rows. No article is as long; books are cut before."""

_BYTES_PER_CHAR = 6
"""Bytes of the longest JSON escape of a character."""

_MIN_LINE_BYTES = 1 << 20
"""Bytes that a line of JSON may always have, because a row has other fields than its text."""


def by_row_groups(file: UpstreamFile) -> Sequence[tuple[int, int | None]]:
    """Spans of a Parquet file: row groups of about `SPAN_BYTES` together."""
    from pmd_pipeline.sources.upstream import parquet  # noqa: PLC0415 - `pmd sources` needs no pyarrow

    return parquet.row_group_ranges(file, SPAN_BYTES)


TABLE_FILES = (
    PublishedFile(
        pattern="*.parquet", description="a column of texts", form="parquet", cut=by_row_groups
    ),
    PublishedFile(
        pattern="*.jsonl",
        description="an object with a text on each line",
        form="jsonl",
        cut=by_lines,
    ),
)


def column_texts(span: Span, column: str, max_chars: int) -> Iterator[str | BadRow]:
    """The text of each row of a span, or a bad row."""
    if span.form == "parquet":
        from pmd_pipeline.sources.upstream import parquet  # noqa: PLC0415 - as above

        return (
            cell if isinstance(cell, BadRow) else decode_text(cell, max_chars)
            for cell in parquet.cells(span, column)
        )
    max_bytes = max(_MIN_LINE_BYTES, _BYTES_PER_CHAR * max_chars)
    return (
        too_long_row(max_chars) if line is None else _text_of_line(line, column, max_chars)
        for line in bounded_lines(span, max_bytes)
    )


def bounded_lines(span: Span, max_bytes: int) -> Iterator[bytes | None]:
    """The lines that begin inside the span; None for one of more than `max_bytes`."""
    with open_upstream(span.file) as file:
        position = 0
        if span.start:
            file.seek(span.start - 1)
            position = span.start - 1 + _line_bytes(file.readline(max_bytes), file, max_bytes)
        while span.stop is None or position < span.stop:
            line = file.readline(max_bytes)
            if not line:
                return
            size = _line_bytes(line, file, max_bytes)
            position += size
            yield line.rstrip(b"\r\n") if size == len(line) else None


def decode_text(content: bytes, max_chars: int) -> str | BadRow:
    """The text of UTF-8 bytes, or a bad row."""
    if len(content) > 4 * max_chars:
        return too_long_row(max_chars)
    try:
        return _checked_text(content.decode(), max_chars)
    except UnicodeDecodeError as error:
        return BadRow(f"byte {error.start} is not UTF-8", "not_text")


def too_long_row(max_chars: int) -> BadRow:
    """The bad row for a text that is longer."""
    return BadRow(f"more than {max_chars:,} characters", "too_long")


def document_row(text: str, file: UpstreamFile) -> Row:
    """The row of a document; its id is a digest of the text, so equal documents are one record."""
    full = full_text(text)
    digest = hashlib.blake2b(full.encode(errors="replace"), digest_size=16).hexdigest()
    return Row(id=digest, file=file.name, candidates=[Candidate(full, DEFAULT_COLUMN)])


def _checked_text(text: str, max_chars: int) -> str | BadRow:
    if len(text) > max_chars:
        return too_long_row(max_chars)
    return BadRow("there are zeros in it", "not_text") if "\0" in text else text


def _line_bytes(line: bytes, file: BinaryIO, max_bytes: int) -> int:
    """Bytes of the whole line that begins with `line`; reads over the rest of it."""
    size, block = len(line), line
    while len(block) == max_bytes and not block.endswith(b"\n"):
        block = file.readline(max_bytes)
        size += len(block)
    return size


def _text_of_line(line: bytes, column: str, max_chars: int) -> str | BadRow:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return BadRow("the line is not UTF-8", "not_text")
    except (ValueError, RecursionError):
        return BadRow("the line is no JSON")
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        return BadRow(f"the line is no object with a text {column!r}")
    return _checked_text(text, max_chars)
