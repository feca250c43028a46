"""Traces as text and as JSON: what was read, what each filter decided, where the sample is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from pmd_pipeline.base.record import BadRow, Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.contract.reasons import DROP_REASONS, FAILURE_REASONS, Status
from pmd_pipeline.filters import caption as caption_filters
from pmd_pipeline.index.choose import Chooser, Pair
from pmd_pipeline.inspect.trace import Trace, UpstreamRow
from pmd_pipeline.recipe import Captions

_MAX_TEXTS = 20
"""Texts that are printed of one row, or of one reason; Visual Genome has rows of hundreds."""

_MAX_CHARS = 1000

_NOT_IN_SHARD = "it is beyond --limit in key order, or the shard is older than the index"

_STEPS = {
    Status.FAILED_TO_DOWNLOAD: "not fetched",
    Status.FAILED_TO_RESIZE: "fetched, but not usable",
    Status.DROPPED: "fetched, but dropped by the recipe",
}

_MEASUREMENTS: Mapping[str, Callable[[str], str]] = {
    "has_words": lambda text: f"{len(text.split()):,} words",
    "is_language": lambda text: "{} at {:.2f}".format(*caption_filters.identify(text)),
}
"""By caption filter, the quantity that it compares; other filters print only their verdict."""


def trace_lines(trace: Trace) -> Iterator[str]:
    """The trace line by line: the outcome, then the steps that led to it."""
    yield f"{trace.source} {trace.id}  (key {trace.key})"
    yield f"  {outcome(trace)}"
    for number, row in enumerate(trace.rows):
        yield f"read: {row.location}" if number == 0 else f"also: {row.location}"
        yield from (f"  {line}" for line in _row_lines(trace, row))
    yield f"index: part {part_name(trace.part)}"
    if trace.kept:
        captions = trace.kept.captions
        yield f"  keeps {_count_pairs(len(captions))}, the first: {_shortened(captions[0])!r}"
    for reason in dict.fromkeys(pair.reason for pair in trace.dropped):
        pairs = [pair for pair in trace.dropped if pair.reason == reason]
        yield f"  drops {_count_pairs(len(pairs))} as {reason}: {_meaning(reason)}"
        for pair in pairs[:_MAX_TEXTS]:
            if pair.text:
                yield f"    {pair.field or 'the row'}: {_shortened(pair.text)!r}"
    if trace.kept:
        yield from _build_lines(trace)


def outcome(trace: Trace) -> str:
    """What became of the record, in one sentence."""
    if not trace.kept:
        reasons = dict.fromkeys(pair.reason for pair in trace.dropped)
        return "dropped by the index: " + "; ".join(f"{one}, {_meaning(one)}" for one in reasons)
    if not trace.built:
        return f"not built yet: its part is {part_name(trace.part)}"
    if trace.sequences:
        rows = ", ".join(f"{sequence.row:,}" for sequence in trace.sequences)
        return f"kept: in sequence {rows} of {trace.shard}"
    if trace.ledger is None:
        return f"not in its shard: {_NOT_IN_SHARD}"
    if trace.ledger.status == Status.SUCCESS:
        return f"kept: {_count_pairs(trace.ledger.num_pairs)} in {trace.shard}"
    reason = str(trace.ledger.reason)
    return f"{_STEPS[Status(trace.ledger.status)]}: {reason}, {_meaning(reason)}"


def as_facts(trace: Trace) -> dict[str, Any]:
    """The trace for programs, ready for JSON."""
    facts = asdict(trace) | {"id": trace.id, "outcome": outcome(trace)}
    facts["rows"] = [_row_facts(trace, row) for row in trace.rows]
    return facts


def verdicts(trace: Trace, row: Row) -> list[dict[str, Any]]:
    """The decision of the index on each candidate of an upstream row.

    The rules of the index run again on the row. Each candidate has its `field`, the `text` as it
    would be stored, the `verdict` (`passes`, `not looked at`, or the reason against it), and for
    each filter that ran its `name`, whether the text `passes`, the quantity that it `measured`, and
    its arguments.

    Raises:
        PmdError: a filter of the user's own is gone, has changed, or raises an exception.
    """
    chooser = Chooser(Captions.model_validate(trace.rules["captions"]), trace.kind)
    decisions = chooser.choose(row).decisions
    not_examined = [
        {
            "field": candidate.field,
            "text": chooser.stored_text(candidate.text),
            "verdict": "not looked at",
            "filters": [],
        }
        for candidate in row.candidates[len(decisions) :]
    ]
    return [_decision_facts(chooser, decision) for decision in decisions] + not_examined


def _run_filters_again(trace: Trace, row: Row) -> tuple[list[dict[str, Any]], str | None]:
    """The verdicts; or none, and the reason in a sentence, since the rest is still of use."""
    try:
        return verdicts(trace, row), None
    except PmdError as error:
        return [], f"the filters cannot run again: {error}"


def _row_facts(trace: Trace, row: UpstreamRow) -> dict[str, Any]:
    candidates, problem = list[dict[str, Any]](), row.problem
    if isinstance(row.row, Row):
        candidates, problem = _run_filters_again(trace, row.row)
    content = asdict(row.row) if row.row else {}
    return {"place": row.location, "trouble": problem, **content, "verdicts": candidates}


def _decision_facts(chooser: Chooser, decision: Pair) -> dict[str, Any]:
    text = decision.text or ""
    return {
        "field": decision.field,
        "text": text,
        "verdict": decision.reason or "passes",
        "filters": [
            {
                "name": name,
                "passes": passes,
                "measured": _MEASUREMENTS[name](text) if name in _MEASUREMENTS else None,
                **chooser.captions.filters[name],
            }
            for name, passes in decision.verdicts
        ],
    }


def _row_lines(trace: Trace, row: UpstreamRow) -> Iterator[str]:
    if isinstance(row.row, BadRow):
        yield f"cannot be parsed: {row.row.detail}"
    elif row.row is None:
        yield str(row.problem)
    else:
        names = ("url", "file", "width", "height", "licence", "sha256")
        facts = {name: getattr(row.row, name) for name in names} | dict(row.row.meta)
        known = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
        yield known or "the row holds only texts"
        if row.row.refused:
            yield f"refused as {row.row.refused}: {_meaning(row.row.refused)}"
        if row.row.filtered:
            yield "upstream has already applied the filters"
        candidates, problem = _run_filters_again(trace, row.row)
        if problem:
            yield problem
        lines = [_candidate_line(one) for one in candidates]
        yield from lines[:_MAX_TEXTS]
        if len(lines) > _MAX_TEXTS:
            yield f"and {len(lines) - _MAX_TEXTS:,} more texts"


def _candidate_line(candidate: Mapping[str, Any]) -> str:
    """One text with its verdict and the measurements of the filters."""
    filters = [
        f"{one['name']} {'passes' if one['passes'] else 'refuses'}"
        + (f": {one['measured']}" if one["measured"] else "")
        for one in candidate["filters"]
    ]
    detail = f" ({'; '.join(filters)})" if filters else ""
    return f"{candidate['field']} {_shortened(candidate['text'])!r}: {candidate['verdict']}{detail}"


def _build_lines(trace: Trace) -> Iterator[str]:
    """What the build did with the record."""
    row = trace.ledger
    if row is None:
        yield f"shard: {outcome(trace)}"
        return
    step = "fetched" if row.sha256 else _STEPS[Status(row.status)]
    address = row.final_url or row.url or "the archives given with --images"
    yield f"{step}: {address}" + (f", {trace.attempts} requests" if trace.attempts else "")
    if row.original_width:
        yield f"  {row.original_width} x {row.original_height} pixels"
    if row.sha256:
        yield f"  sha256 {row.sha256}"
    if row.reason:
        yield f"  {row.reason}: {_meaning(row.reason)}"
    if row.error_message:
        yield f"  {row.error_message}"
    if row.image_offset is not None:
        yield f"stored: {trace.shard}"
        yield (
            f"  {row.width} x {row.height} pixels, {row.image_size:,} bytes from byte "
            f"{row.image_offset:,}"
        )


def _shortened(text: str) -> str:
    """The text, cut where it does not fit on a screen, as a document does not."""
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} ..."


def _count_pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"{count:,} pairs"


def _meaning(reason: str) -> str:
    return (
        FAILURE_REASONS.get(reason)
        or DROP_REASONS.get(reason)
        or "the recipe's filter of this name refuses it"
    )
