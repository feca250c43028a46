"""Which candidates of a row become pairs, and why the others do not."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from pmd_pipeline.base.record import Box, Candidate, Row, full_text, one_line
from pmd_pipeline.contract.models import Kind
from pmd_pipeline.filters import caption as caption_filters
from pmd_pipeline.index.cleaning import clean
from pmd_pipeline.recipe import Captions, predicates


class Pair(NamedTuple):
    """One pair of a row: kept where `reason` is None.

    `text` is the caption as it will be stored; of a dropped pair, the last one looked at.
    """

    text: str | None
    field: str | None
    box: Box | None
    reason: str | None


class Chooser:
    """Turns rows into pairs by the `[captions]` of a recipe.

    What is counted as a pair is, by `kind`, also an image alone, or a document with its lines.

    `fields` counts what became of each candidate that was looked at, by field and by reason
    (`kept` for the winners): with `choose = "first"` this is more than the pairs' reasons tell.
    """

    def __init__(self, captions: Captions, kind: Kind = "pairs") -> None:
        self.fields: Counter[tuple[str, str]] = Counter()
        self._is_image = kind == "images"
        self._tidy = full_text if kind == "text" else one_line
        self._first = captions.choose == "first"
        self._cleaning = captions.clean.model_dump()
        self._cleans = any(self._cleaning.values())
        self._filters: dict[str, Callable[..., bool]] = predicates(
            caption_filters, captions.filters, captions.filters_sha256
        )

    def pairs(self, row: Row) -> list[Pair]:
        """The row's pairs, kept and dropped; none for a row that only knows the image.

        A refused row drops its pairs unseen, and at least one. With `choose = "first"` a row is one
        pair: the first candidate that passes, or else the reason of the last that has text.
        """
        if self._is_image:
            return [Pair("", "image", None, row.refused)]
        if row.refused:
            candidates = row.candidates[:1] if self._first else row.candidates
            unseen = [Pair(one.text, one.field, one.box, row.refused) for one in candidates]
            return unseen or [Pair(None, None, None, row.refused)]
        judged = (self._judged(one, filtered=row.filtered) for one in row.candidates)
        if not self._first:
            return list(judged)
        pairs: list[Pair] = []
        for pair in judged:
            if pair.reason is None:
                return [pair]
            if not pairs or pair.reason != "no_text":
                pairs = [pair]
        return pairs

    def _judged(self, one: Candidate, *, filtered: bool) -> Pair:
        text = self._tidy(one.text)
        if self._cleans:
            text = self._tidy(clean(text, **self._cleaning))
        reason = one.refused or self._refusal(text, filtered=filtered)
        self.fields[one.field, reason or "kept"] += 1
        return Pair(text, one.field, one.box, reason)

    def _refusal(self, text: str, *, filtered: bool) -> str | None:
        if not text:
            return "no_text"
        if filtered:
            return None
        for name, passes in self._filters.items():
            if not passes(text):
                return name
        return None
