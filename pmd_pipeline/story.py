"""The whole story of one sample, from its upstream row to its bytes in the shard."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import pyarrow.parquet as pq
from pydantic import ValidationError

from pmd_pipeline import sources
from pmd_pipeline.errors import PmdError
from pmd_pipeline.format import DROPPED, FAILED, WORKED, Report, part_name
from pmd_pipeline.index import Index, load_index
from pmd_pipeline.record import BadRow, Row, key_of
from pmd_pipeline.records import part_of
from pmd_pipeline.storage import folders, join, open_read, read_bytes, sizes
from pmd_pipeline.upstream import Span

_FIRST_SAMPLES = 5
_CHANGED = {"note": "the file has changed: it has no such row any more"}


@dataclass(frozen=True)
class Chapter:
    """One step of a sample's way: what it is about, and what is known, by name."""

    title: str
    facts: dict[str, Any]


def sample_story(data: str, key: str) -> list[Chapter]:
    """What happened to the record or bad row `key` under the address `data`, step by step.

    Raises:
        PmdError: `key` is no key, or no index under `data` has it.
    """
    if len(key) != 16 or set(key) - set("0123456789abcdef"):
        raise PmdError(f"{key!r} is no key: a key is 16 hex digits, as in the shards and ledgers")
    for name in folders(join(data, "index")):
        folder = join(data, "index", name)
        index = load_index(folder)
        if index is None or not index.parts:
            continue
        part = index.parts[part_of(key, len(index.parts))]
        kept = _rows(join(folder, part.kept.name), key)
        dropped = _rows(join(folder, part.dropped.name), key)
        if kept or dropped:
            return list(_chapters(data, index, key, kept, dropped))
    raise PmdError(f"no index under {data} has the key {key}; is --out right, and the index built?")


def shard_story(tar: str) -> list[Chapter]:
    """What a shard holds: its report, and its first samples.

    Raises:
        PmdError: there is no shard with a report and a ledger at `tar`.
    """
    base = tar.removesuffix(".tar")
    try:
        report = Report.model_validate_json(read_bytes(f"{base}.json"))
    except ValidationError as error:
        raise PmdError(
            f"{base}.json is no report of this version: build the shard again"
        ) from error
    with open_read(f"{base}.parquet") as file:
        kept = pq.read_table(file, filters=[("status", "=", WORKED)]).slice(0, _FIRST_SAMPLES)
    return [
        Chapter(f"shard {tar}", report.model_dump(mode="json", exclude={"words"})),
        *(
            Chapter(f"sample {row['key']}", {"caption": row["caption"], "url": row["url"]})
            for row in kept.to_pylist()
        ),
    ]


def sample_image(chapters: Sequence[Chapter]) -> bytes:
    """The stored JPEG of the sample that `chapters` tell of.

    Raises:
        PmdError: the sample has no image.
    """
    for chapter in chapters:
        if "image_offset" in chapter.facts:
            with open_read(chapter.facts["shard"]) as file:
                file.seek(chapter.facts["image_offset"])
                return file.read(chapter.facts["image_size"])
    raise PmdError("there is no stored image to write: the story without --image says why")


def _chapters(
    data: str,
    index: Index,
    key: str,
    kept: Sequence[dict[str, Any]],
    dropped: Sequence[dict[str, Any]],
) -> Iterator[Chapter]:
    part = part_of(key, len(index.parts))
    yield from _upstream(index, kept, dropped, key)
    for row in dropped:
        reason = row["reason"]
        known = DROPPED.get(reason, "the filter of this name refuses the text")
        facts = {"field": row["field"], "text": row["text"], "reason": reason, "meaning": known}
        yield Chapter("pair dropped by the index", facts)
    for row in kept:
        facts = {name: value for name, value in row.items() if name not in {"spans", "rows"}}
        yield Chapter(f"record in part {part_name(part)} of the index", _without_none(facts))
        yield from _built(data, index.source, part, key)


def _upstream(
    index: Index, kept: Sequence[dict[str, Any]], dropped: Sequence[dict[str, Any]], key: str
) -> Iterator[Chapter]:
    """The rows as their source reads them again, where the files are still there."""
    places = {(row["span"], row["row"]) for row in dropped}
    places |= {place for row in kept for place in zip(row["spans"], row["rows"], strict=True)}
    for number, wanted in groupby(sorted(places), key=itemgetter(0)):
        span = index.spans[number].span()
        rows = [row for _, row in wanted]
        try:
            found = _reread(index, span, rows, key)
        except PmdError as error:  # the file is gone or changed; the rest of the story stands
            found = {row: {"note": str(error)} for row in rows}
        for row in rows:
            yield Chapter(f"row {row} of {_place(span)}", found.get(row, _CHANGED))


def _reread(index: Index, span: Span, rows: list[int], key: str) -> dict[int, dict[str, Any]]:
    """What the rows of these numbers say of `key`; the span is read up to the last of them."""
    read = sources.load(index.source).read(span, **index.rules["options"])
    wanted = set(rows)
    return {
        number: _as_facts(row)
        for number, row in enumerate(islice(read, rows[-1] + 1))
        if number in wanted and (isinstance(row, BadRow) or key_of(index.source, row.id) == key)
    }


def _place(span: Span) -> str:
    until = "its end" if span.stop is None else f"{span.stop:,}"
    return f"{span.file}" + (f" from {span.start:,} to {until}" if span.start or span.stop else "")


def _built(data: str, source: str, part: int, key: str) -> Iterator[Chapter]:
    base = join(data, "shards", source, part_name(part))
    if f"{part_name(part)}.json" not in sizes(join(data, "shards", source)):
        yield Chapter("not built yet", {"part": part_name(part)})
        return
    rows = _rows(f"{base}.parquet", key)
    if not rows:
        meaning = DROPPED["limit"] + ", or the shard is older than the index"
        yield Chapter(f"not in the ledger {base}.parquet", {"reason": "limit", "meaning": meaning})
    for row in rows:
        facts = _without_none({"shard": f"{base}.tar", **row})
        if reason := row["reason"]:
            facts["meaning"] = FAILED.get(reason, "the image filter of this name refuses it")
        yield Chapter(f"row of the ledger {base}.parquet", facts)
        if row["image_offset"] is not None:
            with open_read(f"{base}.tar") as file:
                file.seek(row["json_offset"])
                described = json.loads(file.read(row["json_size"]))
            yield Chapter(f"sample in {base}.tar", described)


def _rows(address: str, key: str) -> list[dict[str, Any]]:
    with open_read(address) as file:
        table = pq.read_table(file, filters=[("key", "=", key)])
    return list(table.to_pylist())


def _as_facts(row: Row | BadRow) -> dict[str, Any]:
    if isinstance(row, BadRow):
        return {"reason": row.reason, "detail": row.detail}
    facts = {name: getattr(row, name) for name in Row.__dataclass_fields__ if name != "candidates"}
    texts = [f"{one.field}: {one.text}" for one in row.candidates[:20]]
    return _without_none({**facts, "candidates": texts})


def _without_none(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value not in (None, "", [], {})}
