"""The second half of an error sentence about an unknown name."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
    """What may have been meant by `name`, or else all that is known.

    >>> suggestion("is_langauge", ["has_words", "is_language"])
    "did you mean 'is_language'?"
    >>> suggestion("x", ["b", "a"])
    'there are a, b'
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"there are {', '.join(sorted(names))}" if names else "there are none"
