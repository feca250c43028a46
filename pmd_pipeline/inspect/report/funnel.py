"""Pairs of a source from upstream to the shards, and the reasons for which pairs were lost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pmd_pipeline.contract.models import SourceEntry
from pmd_pipeline.contract.reasons import DROP_REASONS, FAILURE_REASONS
from pmd_pipeline.filters import caption as caption_filters
from pmd_pipeline.filters import image as image_filters
from pmd_pipeline.filters import pixels as pixel_filters
from pmd_pipeline.index.build import Index


@dataclass(frozen=True)
class FunnelStep:
    """One step of the funnel: the `count` that is left, and how many were `lost` since the last."""

    name: str
    count: int
    kind: str
    lost: int = 0
    lost_kind: str = ""


@dataclass(frozen=True)
class LossReason:
    """A reason with its pairs; `kind` is `dropped` or `failed`, `share` is of all pairs."""

    name: str
    kind: str
    meaning: str
    pairs: int
    share: float


def funnel(entry: SourceEntry, index: Index | None) -> list[FunnelStep]:
    """The steps from upstream rows to pairs in the shards.

    Without the index, the number of upstream rows is unknown, and their step is left out.
    """
    counts = entry.counts
    chosen = counts.pairs_in - sum(counts.dropped.values())
    rows = [FunnelStep("rows upstream", index.rows, "upstream")] if index else []
    return [
        *rows,
        FunnelStep("pairs in them", counts.pairs_in, "upstream"),
        FunnelStep("left by the recipe", chosen, "upstream", counts.pairs_in - chosen, "dropped"),
        FunnelStep("kept", counts.kept, "kept", chosen - counts.kept, "failed"),
    ]


def loss_reasons(entry: SourceEntry) -> list[LossReason]:
    """Every reason with its meaning: drops, then failures, the most frequent first."""
    return [
        LossReason(name, kind, meaning(name, entry.rules), pairs, pairs / entry.counts.pairs_in)
        for kind, counts in (("dropped", entry.counts.dropped), ("failed", entry.counts.failed))
        for name, pairs in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if pairs
    ]


def meaning(reason: str, rules: Mapping[str, Any]) -> str:
    """The meaning of a reason; of a filter, its arguments and the summary of its docstring.

    Code outside the package is not imported for it, since the manifest may be untrusted.
    """
    known = DROP_REASONS.get(reason) or FAILURE_REASONS.get(reason)
    if known:
        return known
    for section, key, module in (
        ("captions", "filters", caption_filters),
        ("images", "filters", image_filters),
        ("images", "pixel_filters", pixel_filters),
    ):
        keywords = rules.get(section, {}).get(key, {}).get(reason)
        if keywords is None:
            continue
        arguments = "".join(f", {name} = {value}" for name, value in keywords.items())
        function = getattr(module, reason, None)
        if function is None:
            return f"a filter of the recipe, from outside the package{arguments}"
        summary = (function.__doc__ or "").partition("\n")[0].replace("`", "")
        return f"a filter of the recipe{arguments}: {summary}"
    return "the source's own reason"
