"""Trace of one record or bad row: its upstream rows, its pairs in the index, its stored sample."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pmd_pipeline import sources
from pmd_pipeline.base.parallel import Pool, ReportProgress, ignore_progress, in_order
from pmd_pipeline.base.record import BadRow, Row, key_of, url_id
from pmd_pipeline.base.storage import folders
from pmd_pipeline.base.tables import MEND_INDEX, MEND_SHARD, read_batches, read_table
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, open_read, size_of
from pmd_pipeline.contract.models import Kind
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.contract.schemas import LedgerRow, ledger_rows
from pmd_pipeline.index.build import Index, load_index
from pmd_pipeline.index.records import DroppedPair, IndexRecord, part_of
from pmd_pipeline.inspect.shard_contents import (
    TextSequence,
    load_report,
    read_bytes_at,
    read_texts,
)
from pmd_pipeline.sources import Source
from pmd_pipeline.sources.upstream.files import Span

_CHANGED = "the file has changed: it no longer has this row"


@dataclass(frozen=True)
class UpstreamRow:
    """An upstream row, read again; where that fails, `row` is None and `problem` a sentence."""

    location: str
    row: Row | BadRow | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Trace:
    """What the files under the data folder hold about one record or bad row.

    Args:
        rules: resolved recipe of the index that has the record.
        rows: upstream rows, in order.
        dropped: pairs that the index dropped.
        kept: the record in the index, if at least one pair was kept.
        part: number of its part.
        shard: address of the part's tar or Parquet file, which exists if `built`.
        ledger: its row of the ledger.
        attempts: requests for its image, if there was more than one.
        sample: the JSON beside the stored image.
        sequences: rows of the shard that hold the document, for texts.
    """

    source: str
    key: str
    kind: Kind
    rules: dict[str, Any]
    rows: list[UpstreamRow]
    dropped: list[DroppedPair]
    kept: IndexRecord | None
    part: int
    shard: str
    built: bool = False
    ledger: LedgerRow | None = None
    attempts: int | None = None
    sample: dict[str, Any] | None = None
    sequences: list[TextSequence] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Upstream's id of the image, or the location of the bad row."""
        return (self.kept or self.dropped[0]).id


@dataclass(frozen=True)
class _ScanTask:
    """Index files of one part, to be searched for addresses."""

    source: str
    files: tuple[str, ...]
    addresses: tuple[str, ...]

    def __str__(self) -> str:
        return f"searching {self.files[0]}"


def find_traces(data: str, query: str, pool: Pool, source: str | None = None) -> list[Trace]:
    """The traces of all records under the folder `data` that match `query`, source by source.

    `query` is a key, an upstream id, the location of a bad row (`FILE:START:ROW`), or the address
    of an image. If no source has the address as an id, the search reads all index files.

    Raises:
        PmdError: there is no index, or no record matches.
    """
    indexes = _load_indexes(data, source)
    matches = [
        (index, key)
        for index in indexes
        for key in _possible_keys(index.source, query)
        if _is_indexed(join(data, "index", index.source), index, key)
    ]
    if not matches and "://" in query:
        matches = _find_by_address(data, indexes, query, pool)
    if not matches:
        names = ", ".join(index.source for index in indexes)
        raise PmdError(f"{query!r} is no key, id or address in the index of {names} under {data}")
    return [_trace(data, index, key) for index, key in matches]


def stored_image(trace: Trace) -> bytes:
    """The stored image of the record, with the bytes that the tar has.

    Raises:
        PmdError: the record has none.
    """
    row = trace.ledger
    if row is None or row.image_offset is None or row.image_size is None:
        raise PmdError(f"{trace.key} has no stored image: run pmd why {trace.key} for the reason")
    return read_bytes_at(trace.shard, row.image_offset, row.image_size)


def scan(task: _ScanTask, _report_progress: ReportProgress) -> list[str]:
    """The keys of the records that have one of the addresses."""
    addresses, keys = pa.array(task.addresses), set[str]()
    for file_address in task.files:
        with open_read(file_address) as file:
            for batch in read_batches(file, ["key", "url"], address=file_address, mend=MEND_INDEX):
                matches = batch.filter(pc.is_in(batch["url"], value_set=addresses))
                keys.update(matches["key"].to_pylist())
    return sorted(keys)


def _load_indexes(data: str, source: str | None) -> list[Index]:
    names = [source] if source else folders(join(data, "index"))
    loaded = [load_index(join(data, "index", name)) for name in names]
    indexes = [index for index in loaded if index is not None and index.parts]
    if not indexes:
        what = f"of {source} " if source else ""
        raise PmdError(
            f"there is no index {what}under {data}: give the --out of a build that has run"
        )
    return indexes


def _possible_keys(source: str, query: str) -> list[str]:
    """The query itself if it is a key, and the keys of the ids that it may be."""
    keys = [key_of(source, query), key_of(source, url_id(query))]
    if len(query) == 16 and set(query) <= set("0123456789abcdef"):
        keys.insert(0, query)
    return list(dict.fromkeys(keys))


def _is_indexed(folder: str, index: Index, key: str) -> bool:
    part = index.parts[part_of(key, len(index.parts))]
    return any(
        _rows_with_key(join(folder, file.name), key).num_rows for file in (part.kept, part.dropped)
    )


def _find_by_address(
    data: str, indexes: Sequence[Index], address: str, pool: Pool
) -> list[tuple[Index, str]]:
    """Records with this address, normalised or not, over http or https."""
    other = address.replace("http://", "https://", 1)
    if other == address:
        other = address.replace("https://", "http://", 1)
    addresses = tuple(dict.fromkeys([address, url_id(address), other, url_id(other)]))
    tasks = [
        _ScanTask(
            index.source,
            tuple(
                join(data, "index", index.source, file.name) for file in (part.kept, part.dropped)
            ),
            addresses,
        )
        for index in indexes
        for part in index.parts
    ]
    by_name = {index.source: index for index in indexes}
    results = in_order(pool, scan, tasks, ignore_progress)
    return [
        (by_name[task.source], key)
        for task, keys in zip(tasks, results, strict=True)
        for key in keys
    ]


def _trace(data: str, index: Index, key: str) -> Trace:
    number = part_of(key, len(index.parts))
    part, folder = index.parts[number], join(data, "index", index.source)
    kept = [
        IndexRecord(**row) for row in _rows_with_key(join(folder, part.kept.name), key).to_pylist()
    ]
    dropped = [
        DroppedPair(**row)
        for row in _rows_with_key(join(folder, part.dropped.name), key).to_pylist()
    ]
    paths = ShardPaths.in_folder(join(data, "shards", index.source), number)
    built = size_of(paths.report) is not None
    kind = _kind_of(index, paths)
    shard = paths.ledger if kind == "text" else paths.tar
    ledger = _find_ledger_row(paths.ledger, key) if built and kind != "text" else None
    texts = read_texts(shard) if built and kind == "text" else ()
    return Trace(
        source=index.source,
        key=key,
        kind=kind,
        rules=index.rules,
        rows=list(_upstream_rows(index, kept, dropped, key)),
        dropped=dropped,
        kept=kept[0] if kept else None,
        part=number,
        shard=shard,
        built=built,
        ledger=ledger,
        attempts=load_report(paths.report).timing.attempts.get(key) if ledger else None,
        sample=_sample_json(shard, ledger) if ledger else None,
        sequences=[sequence for sequence in texts if key in sequence.keys],
    )


def _kind_of(index: Index, paths: ShardPaths) -> Kind:
    try:
        return _source_of(index).info.kind
    except PmdError:  # a missing or changed module of the user's does not end the trace
        is_text = size_of(paths.report) is not None and size_of(paths.tar) is None
        return "text" if is_text else "pairs"


def _source_of(index: Index) -> Source:
    rules = index.rules
    return sources.load(index.source, rules.get("module"), rules.get("module_sha256"))


def _rows_with_key(address: str, key: str, mend: str = MEND_INDEX) -> pa.Table:
    with open_read(address) as file:
        table = read_table(file, address=address, mend=mend)
    return table.filter(pc.equal(table["key"], key))


def _find_ledger_row(address: str, key: str) -> LedgerRow | None:
    return next(iter(ledger_rows(_rows_with_key(address, key, MEND_SHARD))), None)


def _sample_json(shard: str, row: LedgerRow) -> dict[str, Any] | None:
    if row.json_offset is None or row.json_size is None:
        return None
    return dict(json.loads(read_bytes_at(shard, row.json_offset, row.json_size)))


def _upstream_rows(
    index: Index, kept: Sequence[IndexRecord], dropped: Sequence[DroppedPair], key: str
) -> Iterator[UpstreamRow]:
    """The rows as their source reads them now, if the annotation files still exist."""
    places = {(pair.span, pair.row) for pair in dropped}
    places |= {place for record in kept for place in zip(record.spans, record.rows, strict=True)}
    for number, in_span in groupby(sorted(places), key=itemgetter(0)):
        span = index.spans[number].span()
        numbers = [row for _, row in in_span]
        rows: dict[int, Row | BadRow] = {}
        problem = _CHANGED
        try:
            rows = _read_again(index, span, numbers, key)
        except PmdError as error:  # a missing or changed file does not end the trace
            problem = str(error)
        for row in numbers:
            location = f"row {row:,} of {_describe(span)}"
            yield UpstreamRow(location, rows.get(row), None if row in rows else problem)


def _read_again(index: Index, span: Span, numbers: list[int], key: str) -> dict[int, Row | BadRow]:
    """The rows of these numbers that belong to `key`; reads the span up to the last of them."""
    read = _source_of(index).read(span, **index.rules["options"])
    return {
        number: row
        for number, row in enumerate(islice(read, numbers[-1] + 1))
        if number in numbers and (isinstance(row, BadRow) or key_of(index.source, row.id) == key)
    }


def _describe(span: Span) -> str:
    stop = "the end" if span.stop is None else f"{span.stop:,}"
    return f"{span.file}" + (f" from {span.start:,} to {stop}" if span.start or span.stop else "")
