"""The second half of an error sentence about an unknown name."""

import difflib
from collections.abc import Iterable

_MIN_LETTERS = 4
"""Fewer letters occur in too many names."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Suggests the known name that is similar to `name`, or lists all known names.

    A similar name is suggested, or one that contains `name` if that has four letters or more.

    >>> suggestion("is_langauge", ["has_words", "is_language"])
    "did you mean 'is_language'?"
    >>> suggestion("clip", ["lr", "grad_clip_norm"])
    "did you mean 'grad_clip_norm'?"
    >>> suggestion("x", ["b", "a"])
    'there are a, b'
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if not close and len(name) >= _MIN_LETTERS:
        close = sorted(one for one in names if name in one)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there are {', '.join(sorted(names))}" if names else "there are none"
