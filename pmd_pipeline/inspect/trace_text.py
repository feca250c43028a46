"""Stories in words: what was read, what each filter said, what the world did, where it lies."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pmd_pipeline.base.record import BadRow, Candidate, Row, one_line
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.contract.reasons import DROP_REASONS, FAILURE_REASONS, Status
from pmd_pipeline.filters import caption as caption_filters
from pmd_pipeline.index.cleaning import clean
from pmd_pipeline.inspect.trace import ReadRow, Trace
from pmd_pipeline.recipe import Captions, predicate

_MOST_TEXTS = 20
"""Told of one row, or of one reason; Visual Genome has rows of hundreds."""

_MOST_CHARS = 1000

_LEFT_OUT = "it lies beyond --limit in key order, or the shard is older than the index"

_STEPS = {
    "failed_to_download": "not fetched",
    "failed_to_resize": "fetched, but of no use",
    "dropped": "fetched, but refused by the recipe",
}

_MEASURED: Mapping[str, Callable[[str], str]] = {
    "has_words": lambda text: f"{len(text.split()):,} words",
    "is_language": lambda text: "{} at {:.2f}".format(*caption_filters.identify(text)),
}
"""What a filter of captions looks at, measured; one that is not here only says yes or no."""


def trace_lines(story: Trace) -> Iterator[str]:
    """The story line by line, its end first."""
    yield f"{story.source} {story.id}  (key {story.key})"
    yield f"  {outcome(story)}"
    for number, read in enumerate(story.rows):
        yield f"read: {read.place}" if number == 0 else f"also: {read.place}"
        yield from (f"  {line}" for line in _read(story, read))
    yield f"index: part {part_name(story.part)}"
    if story.kept:
        captions = story.kept["captions"]
        yield f"  keeps {_pairs(len(captions))}, the first: {_start(captions[0])!r}"
    for reason in dict.fromkeys(row["reason"] for row in story.dropped):
        rows = [row for row in story.dropped if row["reason"] == reason]
        yield f"  drops {_pairs(len(rows))} as {reason}: {_meaning(reason)}"
        for row in rows[:_MOST_TEXTS]:
            if row["text"]:
                yield f"    {row['field'] or 'the row'}: {_start(row['text'])!r}"
    if story.kept:
        yield from _built(story)


def outcome(story: Trace) -> str:
    """How the story ends, in one sentence."""
    if not story.kept:
        reasons = dict.fromkeys(row["reason"] for row in story.dropped)
        return "dropped by the index: " + "; ".join(f"{one}, {_meaning(one)}" for one in reasons)
    if not story.built:
        return f"not built yet: its part is {part_name(story.part)}"
    if story.sequences:
        rows = ", ".join(f"{one['row']:,}" for one in story.sequences)
        return f"kept: in sequence {rows} of {story.shard}"
    if story.ledger is None:
        return f"not in its shard: {_LEFT_OUT}"
    if story.ledger["status"] == Status.SUCCESS:
        return f"kept: {_pairs(story.ledger['num_pairs'])} in {story.shard}"
    reason = story.ledger["reason"]
    return f"{_STEPS[story.ledger['status']]}: {reason}, {_meaning(reason)}"


def as_facts(story: Trace) -> dict[str, Any]:
    """The story for programs."""
    facts = asdict(story) | {"id": story.id, "outcome": outcome(story)}
    facts["rows"] = [
        {
            "place": read.place,
            "trouble": read.trouble,
            **(asdict(read.row) if read.row else {}),
            "verdicts": verdicts(story, read.row) if isinstance(read.row, Row) else [],
        }
        for read in story.rows
    ]
    return facts


def verdicts(story: Trace, row: Row) -> list[dict[str, Any]]:
    """What the rules say of each candidate of an upstream row, filters run again.

    Each has the `field`, the `text` as it would be stored, the `verdict` (`passes`, `not looked
    at`, or the reason against it), and for each filter that was asked its `name`, whether it
    `passes`, and what it `measured`.
    """
    rules = Captions.model_validate(story.rules["captions"])
    found: list[dict[str, Any]] = []
    taken = False
    for one in row.candidates:
        said = _judged(one, row, rules)
        if taken:
            said |= {"verdict": "not looked at", "filters": []}
        taken = taken or (rules.choose == "first" and said["verdict"] == "passes")
        found.append(said)
    return found


def _judged(one: Candidate, row: Row, rules: Captions) -> dict[str, Any]:
    text = one_line(one.text)
    cleaning = rules.clean.model_dump()
    if any(cleaning.values()):
        text = one_line(clean(text, **cleaning))
    asked: list[dict[str, Any]] = []
    verdict = row.refused or one.refused or (None if text else "no_text")
    if verdict is None and not row.filtered:
        for name, keywords in rules.filters.items():
            passes = predicate(caption_filters, name, keywords)(text)
            measure = _MEASURED.get(name)
            measured = measure(text) if measure else None
            asked.append({"name": name, "passes": passes, "measured": measured, **keywords})
            if not passes:
                verdict = name
                break
    return {"field": one.field, "text": text, "verdict": verdict or "passes", "filters": asked}


def _read(story: Trace, read: ReadRow) -> Iterator[str]:
    if isinstance(read.row, BadRow):
        yield f"cannot be understood: {read.row.detail}"
    elif read.row is None:
        yield str(read.trouble)
    else:
        names = ("url", "file", "width", "height", "licence", "sha256")
        facts = {name: getattr(read.row, name) for name in names} | dict(read.row.meta)
        said = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        yield said or "the row holds texts only"
        if read.row.refused:
            yield f"refused as {read.row.refused}: {_meaning(read.row.refused)}"
        if read.row.filtered:
            yield "upstream has applied the filters already"
        lines = [_candidate(one) for one in verdicts(story, read.row)]
        yield from lines[:_MOST_TEXTS]
        if len(lines) > _MOST_TEXTS:
            yield f"and {len(lines) - _MOST_TEXTS:,} texts more"


def _candidate(said: Mapping[str, Any]) -> str:
    """One text with its verdict, and what the filters measured."""
    measured = [
        f"{one['name']} {'passes' if one['passes'] else 'refuses'}"
        + (f": {one['measured']}" if one["measured"] else "")
        for one in said["filters"]
    ]
    detail = f" ({'; '.join(measured)})" if measured else ""
    return f"{said['field']} {_start(said['text'])!r}: {said['verdict']}{detail}"


def _built(story: Trace) -> Iterator[str]:
    """What the build did with the record."""
    row = story.ledger
    if row is None:
        yield f"shard: {outcome(story)}"
        return
    come = "fetched" if row["sha256"] else _STEPS[row["status"]]
    where = row["final_url"] or row["url"] or "the images given with --images"
    yield f"{come}: {where}" + (f", asked {story.attempts} times" if story.attempts else "")
    if row["original_width"]:
        yield f"  {row['original_width']} x {row['original_height']} pixels"
    if row["sha256"]:
        yield f"  sha256 {row['sha256']}"
    if row["reason"]:
        yield f"  {row['reason']}: {_meaning(row['reason'])}"
    if row["error_message"]:
        yield f"  {row['error_message']}"
    if row["image_offset"] is not None:
        yield f"stored: {story.shard}"
        yield (
            f"  {row['width']} x {row['height']} pixels, {row['image_size']:,} bytes from byte "
            f"{row['image_offset']:,}"
        )


def _start(text: str) -> str:
    """A text that fits on a screen: a document is told by its beginning."""
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]} ..."


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count:,} pairs"


def _meaning(reason: str) -> str:
    return (
        FAILURE_REASONS.get(reason)
        or DROP_REASONS.get(reason)
        or "the recipe's filter of this name refuses it"
    )
