"""Differences between two datasets: of their manifests, and of their ledgers key by key."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa
from pydantic_core import to_jsonable_python

from pmd_pipeline.base.progress import Stage
from pmd_pipeline.base.tables import read_batches
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import open_read
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.contract.models import Manifest, ShardEntry, SourceEntry
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LedgerColumn

NUM_EXAMPLES = 5
"""Keys that are listed for each kind of change, the first ones."""

ABSENT = "absent"
"""The reason of a record that the other dataset's ledgers do not have."""

_COLUMNS: tuple[LedgerColumn, ...] = (
    "key", "caption", "num_pairs", "status", "reason", "width", "height", "sha256", "image_size"
)  # fmt: skip
_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class Change:
    """One value that differs; None on the side that does not have it."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name}: {_shortened_value(self.before)} -> {_shortened_value(self.after)}"


@dataclass
class SourceChanges:
    """Differences of one source between two datasets.

    Args:
        there: `both`, or the dataset that has the source: `before` or `after`.
        changes: differences of the manifests; of rules and upstream files value by value.
        images: numbers of images `gained`, `lost`, `changed` (other fetched bytes), `stored
            otherwise` (same fetched bytes, another stored image), `with another caption` (another
            first caption).
        pairs: numbers of pairs `gained` and `lost`.
        gained: images gained, by the reason for which the first dataset does not have them.
        lost: images lost, by the reason for which the second does not have them.
        moved: records that neither has, by both reasons, if these differ.
        shards: shards whose bytes or codes differ, or that only one dataset has.
        examples: the first keys of each kind of change.
    """

    source: str
    there: str = "both"
    changes: list[Change] = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    gained: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    shards: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether there is no difference."""
        differences = (self.changes, self.images, self.pairs, self.moved, self.shards)
        return self.there == "both" and not any(differences)


@dataclass(frozen=True)
class Comparison:
    """Two manifests: their addresses, their digests and their differences."""

    before: str
    after: str
    digests: tuple[str, str]
    changes: list[Change]
    sources: list[SourceChanges]

    @property
    def are_equal(self) -> bool:
        """Whether both are the same dataset."""
        return self.digests[0] == self.digests[1]


def compare(before: str, after: str, stage: Stage) -> Comparison:
    """Differences between the datasets of the manifests at `before` and `after`.

    Only ledgers with different digests are read, in batches. A ledger has the first caption of a
    record and the number of its pairs, so a change of a later caption is only seen as a shard with
    other bytes.

    Raises:
        PmdError: one of them is no manifest, a ledger cannot be read, or the kinds differ.
    """
    old, new = load_manifest(before), load_manifest(after)
    if old.kind != new.kind:
        raise PmdError(f"{before} holds {old.kind}, {after} {new.kind}: they cannot be compared")
    equal = old.digest == new.digest
    return Comparison(
        before=before,
        after=after,
        digests=(old.digest, new.digest),
        changes=[] if equal else list(_manifest_changes(old, new)),
        sources=[]
        if equal
        else [
            _source_changes(source, (before, old), (after, new), stage)
            for source in sorted(old.sources.keys() | new.sources.keys())
        ],
    )


def as_json(comparison: Comparison) -> str:
    """The comparison for programs."""
    content = {"equal": comparison.are_equal, **to_jsonable_python(comparison)}
    return json.dumps(content, indent=1, ensure_ascii=False)


def as_lines(comparison: Comparison) -> Iterator[str]:
    """The comparison for people, source by source; an equal source takes one line."""
    yield f"before  {comparison.before}  {comparison.digests[0]}"
    yield f"after   {comparison.after}  {comparison.digests[1]}"
    if comparison.are_equal:
        yield "the same dataset"
    for change in comparison.changes:
        yield str(change)
    for one in comparison.sources:
        if one.there != "both":
            yield f"{one.source}: only {one.there}"
            continue
        yield f"{one.source}: no difference" if one.is_empty else one.source
        groups = ("images", "pairs", "gained", "lost", "moved", "shards")
        titles = ("images", "pairs", "images gained, by reason before", "images lost, by reason",
                  "records kept by neither, by reasons", "shards")  # fmt: skip
        for name, title in zip(groups, titles, strict=True):
            if counts := getattr(one, name):
                yield f"  {title}: " + ", ".join(f"{key} {n:,}" for key, n in counts.items())
        for kind, keys in one.examples.items():
            yield f"  {kind}, for example: {' '.join(keys)}"
        for change in one.changes:
            yield f"  {change}"


def _manifest_changes(old: Manifest, new: Manifest) -> Iterator[Change]:
    """Differences that concern no single source: name, versions, codes."""
    parts = ("format", "name", "versions", "codes")
    yield from _value_changes(
        old.model_dump(mode="json", include=set(parts)),
        new.model_dump(mode="json", include=set(parts)),
    )


def _source_changes(
    source: str, before: tuple[str, Manifest], after: tuple[str, Manifest], stage: Stage
) -> SourceChanges:
    old, new = (manifest.sources.get(source) for _, manifest in (before, after))
    if old is None or new is None:
        return SourceChanges(source, there="before" if new is None else "after")
    changes = SourceChanges(source)
    changes.changes += _value_changes(_comparable(old), _comparable(new))
    missing = [manifest.missing.get(source, []) for _, manifest in (before, after)]
    changes.changes += _value_changes({"parts missing": missing[0]}, {"parts missing": missing[1]})
    left, right = (_shards_by_part(manifest, source) for _, manifest in (before, after))
    for part in sorted(left.keys() | right.keys()):
        changes.shards.update(_shard_changes(left.get(part), right.get(part)))
    if before[1].kind == "text":
        return changes  # shards of texts have no keys to compare
    for part in left.keys() & right.keys():
        if left[part].ledger_sha256 == right[part].ledger_sha256:
            del left[part], right[part]  # the same rows, and no other part has rows with these keys
    sides = (
        _read_ledgers([located(path, shard.ledger_path) for shard in shards.values()])
        for path, shards in ((before[0], left), (after[0], right))
    )
    for rows in _join_by_key(*sides):
        _count(rows, changes)
        stage.resume_from({"records": len(rows)})
    return changes


def _comparable(entry: SourceEntry) -> dict[str, Any]:
    """The entry of a source without what follows from other values; upstream files by name."""
    derived = {"rules_sha256", "words", "upstream", "unique_images", "repeated"}
    content = entry.model_dump(mode="json", exclude=derived)
    return {**content, "upstream": {file.name: file.sha256 for file in entry.upstream}}


def _shards_by_part(manifest: Manifest, source: str) -> dict[int, ShardEntry]:
    return {shard.part: shard for shard in manifest.shards if shard.source == source}


def _shard_changes(old: ShardEntry | None, new: ShardEntry | None) -> Iterator[str]:
    if old is None or new is None:
        yield "only before" if new is None else "only after"
        return
    if old.sha256 != new.sha256:
        yield "with other bytes"
    if old.codes_sha256 != new.codes_sha256:
        yield "with other codes"


def _value_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[Change]:
    """The values that differ, with dotted names."""
    for name in [*old, *(name for name in new if name not in old)]:
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _value_changes(before, after, f"{prefix}{name}.")
        elif before != after:
            yield Change(prefix + name, before, after)


def _read_ledgers(addresses: Sequence[str]) -> Iterator[pl.DataFrame]:
    """The rows of ledgers, one after the other, in batches that are not empty."""
    for address in addresses:
        with open_read(address) as file:
            try:
                for batch in read_batches(file, _COLUMNS, _BATCH_ROWS):
                    if batch.num_rows:
                        yield pl.DataFrame(batch.select(_COLUMNS))
            except (pa.ArrowException, KeyError) as error:
                raise PmdError(f"{address} is no whole ledger: run pmd verify") from error


def _join_by_key(
    left: Iterator[pl.DataFrame], right: Iterator[pl.DataFrame]
) -> Iterator[pl.DataFrame]:
    """Full join by key, by which both sides are sorted; columns of the right end in `_right`."""
    one, two = next(left, None), next(right, None)
    while one is not None or two is not None:
        ends = [frame["key"][-1] for frame in (one, two) if frame is not None]
        until = pl.col("key") <= min(ends)
        heads = [_NO_ROWS if frame is None else frame.filter(until) for frame in (one, two)]
        yield heads[0].join(heads[1], on="key", how="full", coalesce=True).sort("key")
        one, two = (_after(frame, until, side) for frame, side in ((one, left), (two, right)))


def _after(
    frame: pl.DataFrame | None, until: pl.Expr, side: Iterator[pl.DataFrame]
) -> pl.DataFrame | None:
    if frame is None:
        return None
    rest = frame.filter(~until)
    return rest if len(rest) else next(side, None)


_NO_ROWS = pl.DataFrame(
    schema={
        name: pl.Int64 if name == "image_size" else pl.Int32
        if name in {"num_pairs", "width", "height"} else pl.String
        for name in _COLUMNS
    }
)  # fmt: skip


def _count(rows: pl.DataFrame, changes: SourceChanges) -> None:
    """Add the differences of joined rows."""
    kept, kept_now = (
        (pl.col(name) == Status.SUCCESS).fill_null(False) for name in ("status", "status_right")
    )
    both = rows.filter(kept & kept_now)
    gained, lost = rows.filter(~kept & kept_now), rows.filter(kept & ~kept_now)
    other = pl.col("sha256").ne_missing(pl.col("sha256_right"))
    stored = pl.any_horizontal(
        pl.col(name).ne_missing(pl.col(f"{name}_right"))
        for name in ("width", "height", "image_size")
    )
    caption = pl.col("caption").ne_missing(pl.col("caption_right"))
    kinds = {
        "gained": gained,
        "lost": lost,
        "changed": both.filter(other),
        "stored otherwise": both.filter(~other & stored),
        "with another caption": both.filter(caption),
    }
    for kind, some in kinds.items():
        if len(some):
            changes.images[kind] += len(some)
            keys = changes.examples.setdefault(kind, [])
            keys += some["key"].head(NUM_EXAMPLES - len(keys)).to_list()
    more = both["num_pairs_right"] - both["num_pairs"]
    changes.pairs["gained"] += _total(gained["num_pairs_right"]) + _total(more.filter(more > 0))
    changes.pairs["lost"] += _total(lost["num_pairs"]) - _total(more.filter(more < 0))
    changes.pairs = +changes.pairs  # removes zeros
    changes.gained.update(_reasons(gained, "status", "reason"))
    changes.lost.update(_reasons(lost, "status_right", "reason_right"))
    neither = rows.filter(~kept & ~kept_now)
    for before, after in zip(
        _reasons(neither, "status", "reason"),
        _reasons(neither, "status_right", "reason_right"),
        strict=True,
    ):
        if before != after:
            changes.moved[f"{before} -> {after}"] += 1


def _reasons(rows: pl.DataFrame, status: str, reason: str) -> list[str]:
    """The reason for which each row is not kept on one side."""
    known = pl.when(pl.col(status).is_null()).then(pl.lit(ABSENT)).otherwise(pl.col(reason))
    return rows.select(known.fill_null("?").alias("reason"))["reason"].to_list()


def _total(counts: pl.Series) -> int:
    return int(counts.sum())


def _shortened_value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
