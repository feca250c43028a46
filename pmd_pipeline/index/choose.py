"""Choice of captions: which candidates of a row become pairs, and why the others do not."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from pmd_pipeline.base.record import Box, Candidate, Row, full_text, one_line
from pmd_pipeline.contract.models import Kind
from pmd_pipeline.filters import caption as caption_filters
from pmd_pipeline.index.cleaning import clean
from pmd_pipeline.recipe import Captions, predicates


class FilterVerdict(NamedTuple):
    """Whether a text passes the filter called `name`."""

    name: str
    passes: bool


_NONE_RAN: tuple[FilterVerdict, ...] = ()


class Pair(NamedTuple):
    """One pair of a row: kept where `reason` is None.

    `text` is the caption as it will be stored; of a refused row, as upstream has it. `verdicts` are
    those of the filters that ran, in their order: none runs after one that refuses the text.
    """

    text: str | None
    field: str | None
    box: Box | None
    reason: str | None
    verdicts: tuple[FilterVerdict, ...] = _NONE_RAN


class Choice(NamedTuple):
    """The pairs of a row, and the decisions that led to them.

    Args:
        pairs: the row's pairs, kept and dropped; none for a row that states only the image.
        decisions: one for each candidate in order, up to the last that was examined. With
            `choose = "first"` that is the first candidate that passes.
    """

    pairs: list[Pair]
    decisions: list[Pair]


class Chooser:
    """Turns rows into pairs by the `[captions]` of a recipe.

    What is counted as a pair is, by `kind`, also an image alone, or a document with its lines.

    `fields` counts the decisions on candidates, by field and by reason (`kept` for those that
    pass). With `choose = "first"` a row may have more decisions than pairs. `stored_text` gives a
    text as a shard would store it: white space and Unicode normalised, then cleaned.
    """

    def __init__(self, captions: Captions, kind: Kind = "pairs") -> None:
        self.captions = captions
        self.fields: Counter[tuple[str, str]] = Counter()
        self._is_image = kind == "images"
        self._tidy = full_text if kind == "text" else one_line
        self._first = captions.choose == "first"
        self._cleaning: dict[str, bool] = captions.clean.model_dump()
        self.stored_text = self._cleaned if any(self._cleaning.values()) else self._tidy
        self._filters: list[tuple[Callable[..., bool], tuple[FilterVerdict, ...]]] = []
        self._passed: tuple[FilterVerdict, ...] = ()
        functions = predicates(caption_filters, captions.filters, captions.filters_sha256)
        for name, function in functions.items():
            refusal = (*self._passed, FilterVerdict(name, passes=False))
            self._filters.append((function, refusal))
            self._passed = (*self._passed, FilterVerdict(name, passes=True))

    def pairs(self, row: Row) -> list[Pair]:
        """The row's pairs, kept and dropped; none for a row that states only the image."""
        return self.choose(row).pairs

    def choose(self, row: Row) -> Choice:
        """The row's pairs with the decisions that led to them.

        A refused row drops all its pairs without a check of their texts, and at least one. With
        `choose = "first"` a row is one pair: the first candidate that passes, or else the last one
        that has text, with its reason.
        """
        if self._is_image:
            return Choice([Pair("", "image", None, row.refused)], [])
        if row.refused:
            candidates = row.candidates[:1] if self._first else row.candidates
            refused = [Pair(one.text, one.field, one.box, row.refused) for one in candidates]
            return Choice(refused or [Pair(None, None, None, row.refused)], refused)
        if not self._first:
            pairs = [self._decide(one, filtered=row.filtered) for one in row.candidates]
            return Choice(pairs, pairs)
        decisions: list[Pair] = []
        dropped: list[Pair] = []
        for one in row.candidates:
            decision = self._decide(one, filtered=row.filtered)
            decisions.append(decision)
            if decision.reason is None:
                return Choice([decision], decisions)
            if not dropped or decision.reason != "no_text":
                dropped = [decision]
        return Choice(dropped, decisions)

    def _decide(self, one: Candidate, *, filtered: bool) -> Pair:
        text = self.stored_text(one.text)
        reason, verdicts = one.refused, _NONE_RAN
        if not reason:
            reason, verdicts = self._filtered(text, already=filtered)
        self.fields[one.field, reason or "kept"] += 1
        return Pair(text, one.field, one.box, reason, verdicts)

    def _filtered(
        self, text: str, *, already: bool
    ) -> tuple[str | None, tuple[FilterVerdict, ...]]:
        """The reason to drop the text, or None, and the verdicts of the filters that ran.

        Args:
            already: upstream has applied the filters.
        """
        if not text:
            return "no_text", _NONE_RAN
        if already:
            return None, _NONE_RAN
        for passes, refusal in self._filters:
            if not passes(text):
                return refusal[-1].name, refusal
        return None, self._passed

    def _cleaned(self, text: str) -> str:
        return self._tidy(clean(self._tidy(text), **self._cleaning))
