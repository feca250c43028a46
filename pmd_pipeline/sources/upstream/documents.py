"""Texts out of files as corpora are published: Parquet, JSON Lines, plain; packed or not."""

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

COLUMN = "text"
MOST_CHARS = 1_000_000
"""No article is as long; a book in one piece is, and is cut before."""

_BYTES_PER_CHAR = 6
"""JSON's longest spelling of a character."""

_LEAST_LINE = 1 << 20
"""Bytes that a line of JSON may have whatever the recipe says: a row has more than its text."""


def by_row_groups(file: UpstreamFile) -> Sequence[tuple[int, int | None]]:
    """Cut a Parquet file into stretches of row groups of about `SPAN_BYTES`."""
    from pmd_pipeline.sources.upstream import parquet as _parquet  # noqa: PLC0415 - `pmd sources` needs no pyarrow

    return _parquet.by_row_groups(file, SPAN_BYTES)


TABLES = (
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


def column_texts(span: Span, column: str, most_chars: int) -> Iterator[str | BadRow]:
    """The text of each row of a span, or what is wrong with it."""
    if span.form == "parquet":
        from pmd_pipeline.sources.upstream import parquet as _parquet  # noqa: PLC0415 - as above

        return (
            cell if isinstance(cell, BadRow) else decoded(cell, most_chars)
            for cell in _parquet.cells(span, column)
        )
    longest = max(_LEAST_LINE, _BYTES_PER_CHAR * most_chars)
    return (
        too_long(most_chars) if line is None else _value(line, column, most_chars)
        for line in short_lines(span, longest)
    )


def short_lines(span: Span, most_bytes: int) -> Iterator[bytes | None]:
    """The lines that begin inside the span; None for one of more than `most_bytes`."""
    with open_upstream(span.file) as file:
        position = 0
        if span.start:
            file.seek(span.start - 1)
            position = span.start - 1 + _passed(file.readline(most_bytes), file, most_bytes)
        while span.stop is None or position < span.stop:
            line = file.readline(most_bytes)
            if not line:
                return
            size = _passed(line, file, most_bytes)
            position += size
            yield line.rstrip(b"\r\n") if size == len(line) else None


def decoded(content: bytes, most_chars: int) -> str | BadRow:
    """The text that the bytes spell in UTF-8."""
    if len(content) > 4 * most_chars:
        return too_long(most_chars)
    try:
        return _sound(content.decode(), most_chars)
    except UnicodeDecodeError as error:
        return BadRow(f"byte {error.start} is not UTF-8", "not_text")


def too_long(most_chars: int) -> BadRow:
    """The row of a text that is longer."""
    return BadRow(f"more than {most_chars:,} characters", "too_long")


def document(text: str, file: UpstreamFile) -> Row:
    """The row of a document; its id is its content, so that equal documents meet."""
    full = full_text(text)
    name = hashlib.blake2b(full.encode(errors="replace"), digest_size=16).hexdigest()
    return Row(id=name, file=file.name, candidates=[Candidate(full, COLUMN)])


def _sound(text: str, most_chars: int) -> str | BadRow:
    if len(text) > most_chars:
        return too_long(most_chars)
    return BadRow("there are zeros in it", "not_text") if "\0" in text else text


def _passed(line: bytes, file: BinaryIO, most_bytes: int) -> int:
    """Bytes of the whole line that begins with `line`, the rest of which is passed over."""
    size, piece = len(line), line
    while len(piece) == most_bytes and not piece.endswith(b"\n"):
        piece = file.readline(most_bytes)
        size += len(piece)
    return size


def _value(line: bytes, column: str, most_chars: int) -> str | BadRow:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return BadRow("the line is not UTF-8", "not_text")
    except (ValueError, RecursionError):
        return BadRow("the line is no JSON")
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        return BadRow(f"the line is no object with a text {column!r}")
    return _sound(text, most_chars)
