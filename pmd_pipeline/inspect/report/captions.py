"""Languages and words of captions, from a sample."""

from collections import Counter
from dataclasses import dataclass

import polars as pl

from pmd_pipeline.filters.caption import LID_MODELS, identify, lid_model
from pmd_pipeline.inspect.report.ledgers import LedgerSample

MAX_LANGUAGE_CAPTIONS = 2_000
MAX_WORD_CAPTIONS = 20_000
"""Captions of a source that are read, at equal distances in its sample."""

MAX_WORDS = 24
MAX_LANGUAGES = 5

_STOP = """
a about above after again all along also an and any are around as at away back be because been
before behind being below beside between both but by can could did do does down during each few
for from front get had has have he her here him his how i if in inside into is it its just like
made many me more most much my near next no not of off on one only onto or other our out outside
over own s she so some such t than that the their them then there these they this those through
to too top two under until up upon us very was we were what when where which while who why will
with within without would you your
"""
STOP_WORDS = frozenset(_STOP.split())
"""English words that describe no image; they are counted, but not listed."""

_WORD = r"[\p{L}\p{M}]+(?:['\x{2019}-][\p{L}\p{M}]+)*"

LANGUAGE_NAMES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "ceb": "Cebuano",
    "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "eo": "Esperanto", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish",
    "fr": "French", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "la": "Latin",
    "lt": "Lithuanian", "ms": "Malay", "nl": "Dutch", "no": "Norwegian", "pl": "Polish",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian",
    "sr": "Serbian", "sv": "Swedish", "ta": "Tamil", "th": "Thai", "tl": "Tagalog",
    "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
"""Names for codes of lid.176; the page shows other languages by their code."""


@dataclass(frozen=True)
class CountedName:
    """A name with its count, also as a share of all."""

    name: str
    count: int
    share: float


@dataclass(frozen=True)
class LanguageStats:
    """The most frequent languages of `captions` captions, and all others as one, by `model`."""

    captions: int
    model: str
    shares: list[CountedName]


@dataclass(frozen=True)
class WordStats:
    """The most frequent words, by the share of `captions` captions that have them.

    `stop_share` is the share of stop words among all words.
    """

    captions: int
    stop_share: float
    shares: list[CountedName]


def language_stats(sample: LedgerSample) -> LanguageStats | None:
    """Languages of captions by fastText's identifier; None without captions."""
    captions = _every_nth_caption(sample, MAX_LANGUAGE_CAPTIONS)
    if not len(captions):
        return None
    counts = Counter(identify(" ".join(caption.split()))[0] for caption in captions)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shares = [
        CountedName(LANGUAGE_NAMES.get(code, code or "none"), count, count / len(captions))
        for code, count in ordered[:MAX_LANGUAGES]
    ]
    if rest := sum(count for _, count in ordered[MAX_LANGUAGES:]):
        name = f"{len(ordered) - MAX_LANGUAGES} others"
        shares.append(CountedName(name, rest, rest / len(captions)))
    return LanguageStats(len(captions), LID_MODELS[lid_model()[1]], shares)


def word_stats(sample: LedgerSample) -> WordStats | None:
    """Words of captions: letters, and the marks that join them; None without words."""
    captions = _every_nth_caption(sample, MAX_WORD_CAPTIONS)
    split = captions.str.to_lowercase().str.extract_all(_WORD)
    flat = split.list.explode(keep_nulls=False, empty_as_null=False)
    if not len(flat):
        return None
    is_stop = flat.is_in(sorted(STOP_WORDS))
    once = split.list.unique().list.explode(keep_nulls=False, empty_as_null=False)
    counts = once.filter(~once.is_in(sorted(STOP_WORDS))).alias("word").value_counts()
    top = counts.sort(["count", "word"], descending=[True, False]).head(MAX_WORDS)
    return WordStats(
        captions=len(captions),
        stop_share=float(is_stop.sum()) / len(flat),
        shares=[CountedName(word, count, count / len(captions)) for word, count in top.iter_rows()],
    )


def _every_nth_caption(sample: LedgerSample, limit: int) -> pl.Series:
    """At most `limit` captions that are not empty, at equal distances."""
    captions = sample.kept["caption"].cast(pl.String).drop_nulls()
    captions = captions.filter(captions.str.strip_chars() != "")
    return captions.gather_every(max(1, -(-len(captions) // limit)))
