"""Everything that is known of one record or bad row, from its upstream row to its bytes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from pmd_pipeline import sources
from pmd_pipeline.base.parallel import Pool, ReportProgress, ignore_progress, in_order
from pmd_pipeline.base.record import BadRow, Row, key_of, url_id
from pmd_pipeline.base.storage import folders, sizes
from pmd_pipeline.base.tables import MEND_INDEX, MEND_SHARD, read_batches, read_table
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, open_read, read_bytes
from pmd_pipeline.contract.models import Report
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.index.build import Index, load_index
from pmd_pipeline.index.records import part_of
from pmd_pipeline.sources import Source
from pmd_pipeline.sources.upstream.files import Span

_FIRST_SAMPLES = 5
_CHANGED = "the file has changed: it has no such row any more"


@dataclass(frozen=True)
class ReadRow:
    """An upstream row as its source reads it again; `trouble` says why it cannot be read."""

    place: str
    row: Row | BadRow | None = None
    trouble: str | None = None


@dataclass(frozen=True)
class Trace:
    """What is known of one record, or of one bad row.

    Args:
        rows: upstream's, in order.
        rules: of the index that has the record, a resolved recipe.
        dropped: pairs that the index left out.
        kept: the record in the index, if any pair was kept.
        part: its part.
        shard: where the part's tar is, or would be.
        built: whether the part is.
        ledger: its row of the ledger.
        attempts: how often its address was asked, where that was more than once.
        sample: the JSON beside the image.
    """

    source: str
    key: str
    rules: dict[str, Any]
    rows: list[ReadRow]
    dropped: list[dict[str, Any]]
    kept: dict[str, Any] | None
    part: int
    shard: str
    built: bool = False
    ledger: dict[str, Any] | None = None
    attempts: int | None = None
    sample: dict[str, Any] | None = None
    sequences: list[dict[str, Any]] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Upstream's id of the image, or where the bad row stands."""
        return str((self.kept or self.dropped[0])["id"])


@dataclass(frozen=True)
class Holdings:
    """What a shard holds: its report, and the first of its samples or sequences, by name."""

    shard: str
    report: Report
    first: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _ScanTask:
    """Index files of one part, to be searched for addresses."""

    source: str
    files: tuple[str, ...]
    addresses: tuple[str, ...]

    def __str__(self) -> str:
        return f"searching {self.files[0]}"


def find_traces(data: str, asked: str, pool: Pool, source: str | None = None) -> list[Trace]:
    """The story of each record under the address `data` that `asked` names, source by source.

    `asked` is a key, an id as upstream has it, the place of a bad row (`FILE:START:ROW`), or the
    address of an image. Addresses are searched for in all indexes only where no source has them as
    an id, since that reads every index.

    Raises:
        PmdError: there is no index, or none has it.
    """
    indexes = _indexes(data, source)
    found = [
        (index, key)
        for index in indexes
        for key in _keys(index.source, asked)
        if _has(join(data, "index", index.source), index, key)
    ]
    if not found and "://" in asked:
        found = _searched(data, indexes, asked, pool)
    if not found:
        names = ", ".join(index.source for index in indexes)
        raise PmdError(f"{asked!r} is no key, id or address in the index of {names} under {data}")
    return [_story(data, index, key) for index, key in found]


def holdings(shard: str) -> Holdings:
    """What the tar, or the Parquet file of texts, at `shard` holds.

    Raises:
        PmdError: there is no shard with a report and a ledger at `shard`.
    """
    base = shard.removesuffix(".tar").removesuffix(".parquet")
    report = _loaded_report(f"{base}.json")
    with open_read(f"{base}.parquet") as file:
        is_text = report.ledger == report.tar
        kept = read_table(file, address=f"{base}.parquet")
    if not is_text:
        kept = kept.filter(pc.equal(kept["status"], Status.SUCCESS))
    first = kept.slice(0, _FIRST_SAMPLES).to_pylist()
    if is_text:
        return Holdings(shard, report, {f"sequence {row}": one for row, one in enumerate(first)})
    return Holdings(
        shard,
        report,
        {one["key"]: {name: one[name] for name in ("caption", "url")} for one in first},
    )


def stored_image(story: Trace) -> bytes:
    """The stored JPEG of the story's record.

    Raises:
        PmdError: it has none.
    """
    if story.sample is None or story.ledger is None:
        raise PmdError(f"{story.key} has no stored image: pmd why {story.key} says why")
    return _content(story.shard, story.ledger["image_offset"], story.ledger["image_size"])


def _loaded_report(path: str) -> Report:
    try:
        return Report.model_validate_json(read_bytes(path))
    except ValidationError as error:
        raise PmdError(f"{path} is no report of this version: build the shard again") from error


def _indexes(data: str, source: str | None) -> list[Index]:
    names = [source] if source else folders(join(data, "index"))
    found = [load_index(join(data, "index", name)) for name in names]
    whole = [index for index in found if index is not None and index.parts]
    if not whole:
        what = f"of {source} " if source else ""
        raise PmdError(f"there is no index {what}under {data}; is --out right, and anything built?")
    return whole


def _keys(source: str, asked: str) -> list[str]:
    """The keys that `asked` may mean: its own, or those of the ids that it may be."""
    found = [key_of(source, asked), key_of(source, url_id(asked))]
    if len(asked) == 16 and set(asked) <= set("0123456789abcdef"):
        found.insert(0, asked)
    return list(dict.fromkeys(found))


def _has(folder: str, index: Index, key: str) -> bool:
    part = index.parts[part_of(key, len(index.parts))]
    return any(
        _rows(join(folder, file.name), key, MEND_INDEX) for file in (part.kept, part.dropped)
    )


def _searched(
    data: str, indexes: Sequence[Index], asked: str, pool: Pool
) -> list[tuple[Index, str]]:
    """Records with this address, in any of the spellings it may have."""
    twin = asked.replace("http://", "https://", 1)
    if twin == asked:
        twin = asked.replace("https://", "http://", 1)
    addresses = tuple(dict.fromkeys([asked, url_id(asked), twin, url_id(twin)]))
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


def scan(task: _ScanTask, _tick: ReportProgress) -> list[str]:
    """The keys of the records that have one of the addresses."""
    wanted, found = pa.array(task.addresses), set[str]()
    for address in task.files:
        with open_read(address) as file:
            for batch in read_batches(file, ["key", "url"], address=address, mend=MEND_INDEX):
                hits = batch.filter(pc.is_in(batch["url"], value_set=wanted))
                found.update(hits["key"].to_pylist())
    return sorted(found)


def _story(data: str, index: Index, key: str) -> Trace:
    number = part_of(key, len(index.parts))
    part, folder = index.parts[number], join(data, "index", index.source)
    kept = _rows(join(folder, part.kept.name), key, MEND_INDEX)
    dropped = _rows(join(folder, part.dropped.name), key, MEND_INDEX)
    shards, name = join(data, "shards", index.source), part_name(number)
    is_text = _source_of(index).info.kind == "text"
    shard = join(shards, f"{name}.parquet" if is_text else f"{name}.tar")
    built = f"{name}.json" in sizes(shards)
    ledger = (
        _rows(join(shards, f"{name}.parquet"), key, MEND_SHARD) if built and not is_text else []
    )
    sample = None
    if ledger and ledger[0]["json_offset"] is not None:
        sample = json.loads(_content(shard, ledger[0]["json_offset"], ledger[0]["json_size"]))
    return Trace(
        source=index.source,
        key=key,
        rules=index.rules,
        rows=list(_upstream(index, kept, dropped, key)),
        dropped=dropped,
        kept=kept[0] if kept else None,
        part=number,
        shard=shard,
        built=built,
        ledger=ledger[0] if ledger else None,
        attempts=_attempts(join(shards, f"{name}.json"), key) if ledger else None,
        sample=sample,
        sequences=list(_sequences(shard, key)) if built and is_text else [],
    )


def _attempts(report: str, key: str) -> int | None:
    return _loaded_report(report).timing.attempts.get(key)


def _sequences(shard: str, key: str) -> Iterator[dict[str, Any]]:
    """The rows of a shard of texts that a document is in, with their numbers."""
    with open_read(shard) as file:
        table = read_table(file, address=shard)
    for number, keys in enumerate(table["keys"].to_pylist()):
        if key in keys:
            yield {"row": number, **table.slice(number, 1).to_pylist()[0]}


def _upstream(
    index: Index, kept: Sequence[dict[str, Any]], dropped: Sequence[dict[str, Any]], key: str
) -> Iterator[ReadRow]:
    """The rows as their source reads them again, where the files are still there."""
    places = {(row["span"], row["row"]) for row in dropped}
    places |= {place for row in kept for place in zip(row["spans"], row["rows"], strict=True)}
    for number, wanted in groupby(sorted(places), key=itemgetter(0)):
        span = index.spans[number].span()
        rows = [row for _, row in wanted]
        found: dict[int, Row | BadRow] = {}
        trouble = _CHANGED
        try:
            found = _reread(index, span, rows, key)
        except PmdError as error:  # the file is gone or changed; the rest of the story stands
            trouble = str(error)
        for row in rows:
            place = f"row {row:,} of {_place(span)}"
            yield ReadRow(place, found.get(row), None if row in found else trouble)


def _reread(index: Index, span: Span, rows: list[int], key: str) -> dict[int, Row | BadRow]:
    """What the rows of these numbers say of `key`; the span is read up to the last of them."""
    read = _source_of(index).read(span, **index.rules["options"])
    wanted = set(rows)
    return {
        number: row
        for number, row in enumerate(islice(read, rows[-1] + 1))
        if number in wanted and (isinstance(row, BadRow) or key_of(index.source, row.id) == key)
    }


def _source_of(index: Index) -> Source:
    return sources.load(index.source, index.rules.get("module"))


def _place(span: Span) -> str:
    until = "its end" if span.stop is None else f"{span.stop:,}"
    return f"{span.file}" + (f" from {span.start:,} to {until}" if span.start or span.stop else "")


def _content(address: str, offset: int, size: int) -> bytes:
    with open_read(address) as file:
        file.seek(offset)
        return file.read(size)


def _rows(address: str, key: str, mend: str) -> list[dict[str, Any]]:
    with open_read(address) as file:
        table = read_table(file, address=address, mend=mend)
    return list(table.filter(pc.equal(table["key"], key)).to_pylist())
