"""Whether those who publish an image let us keep it: robots.txt, X-Robots-Tag, TDM-Reservation.

Nothing here asks anybody: `fetch` brings what was said and the time.
"""

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass, field

from pmd_pipeline.base.user_agent import PRODUCT

ROBOTS_BYTES = 500 << 10
"""More of a robots.txt is not read; RFC 9309 (section 2.5) wants no less."""

_CACHED_SECONDS = 24 * 3600.0  # RFC 9309, section 2.4

_NO = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
_TO_US = frozenset({PRODUCT, "*", "robots"})
_VALUED = re.compile(r"unavailable_after|max-[a-z-]+")
_BOT = re.compile(r"[a-z*][a-z0-9*._/-]*")
_PRODUCT = re.compile(r"[A-Za-z_-]+|\*")

_RULES = frozenset({b"allow", b"disallow", b"crawl-delay"})
_DELAY = re.compile(rb"[0-9]{1,6}(\.[0-9]{1,6})?")
_LONGEST_DELAY = 30.0

_UNRESERVED = frozenset((string.ascii_letters + string.digits + "-._~").encode())
_RESERVED = frozenset(b":/?#[]@!$&'()*+,;=")  # RFC 3986, sections 2.2 and 2.3
_ESCAPE = re.compile(rb"%[0-9A-Fa-f]{2}")


def refusal_in_tags(headers: Iterable[str]) -> str | None:
    """The first word of X-Robots-Tag headers by which we may not keep an image; None if we may.

    A bot's name speaks for the words after it, to the end of its header or the next name. What
    says nothing about keeping images, such as a date, is passed over.

    >>> refusal_in_tags(["googlebot: noindex", "max-snippet: 20, noai"])
    'noai'
    """
    for header in headers:
        to_us = True
        for element in header.lower().split(","):
            bot, words = _named(element)
            if bot is not None:
                to_us = bot.partition("/")[0] in _TO_US
            refusing = [word for word in words if word in _NO]
            if refusing and to_us:
                return refusing[0]
    return None


def _named(element: str) -> tuple[str | None, list[str]]:
    """The bot that an element of the list begins with, if any, and the element's words."""
    bot = None
    while ":" in element:
        name, _, rest = element.partition(":")
        name = name.strip()
        if name in _NO:  # `noai: 1` is no bot's name
            return bot, [name]
        if _VALUED.fullmatch(name) or not _BOT.fullmatch(name):
            return bot, []
        bot, element = name, rest
    return bot, re.split(r"[\s;]+", element.strip())


def is_reserved(headers: Iterable[str]) -> bool:
    """Say whether TDM-Reservation headers keep text and data mining to the rights holder."""
    return any(value.strip() == "1" for header in headers for value in header.split(","))


@dataclass(frozen=True)
class Robots:
    """What a robots.txt lets us ask for (RFC 9309).

    Args:
        rules: patterns, in the form that `_pattern` gives, and whether they allow; those that come
            first decide.
        delay: seconds that it wants between requests (`Crawl-delay`, which many write and no RFC
            knows), up to what anybody can wait.
    """

    rules: tuple[tuple[bytes, bool], ...] = ()
    delay: float = 0.0

    @classmethod
    def of(cls, content: bytes) -> "Robots":
        r"""The rules of the groups for us, or else of those for everybody.

        >>> robots = Robots.of(b"User-agent: *\nDisallow: /private/\nAllow: /private/*.jpg$")
        >>> robots.allows("/private/1.jpg"), robots.allows("/private/1.jpg?x")
        (True, False)
        """
        ours, everybodys = _Group(), _Group()
        groups = list[_Group]()
        is_named, naming = False, False
        for key, value in _lines(content):
            if key == b"user-agent":
                groups = groups if naming else []
                naming = True
                found = _PRODUCT.match(value.decode("latin-1"))
                name = found.group().lower() if found else ""
                if name == PRODUCT:
                    is_named = True
                    groups.append(ours)
                elif name == "*":
                    groups.append(everybodys)
            else:
                naming = naming and key == b"crawl-delay"  # it is no rule, so it ends no list
                for group in groups:
                    group.add(key, value)
        group = ours if is_named else everybodys
        rules = sorted(group.rules.items(), key=lambda rule: (-len(rule[0]), not rule[1]))
        return cls(tuple(rules), group.delay)

    def allows(self, path: str) -> bool:
        """Say whether we may ask for `path`, query included, in ASCII."""
        if path == "/robots.txt":
            return True
        # in a pattern these two have a meaning, so there they are escaped if they are meant
        plain = _plain(path.encode()).replace(b"*", b"%2A").replace(b"$", b"%24")
        return next((allow for pattern, allow in self.rules if _matches(pattern, plain)), True)


@dataclass
class _Group:
    """What a robots.txt says to somebody."""

    rules: dict[bytes, bool] = field(default_factory=dict)
    delay: float = 0.0

    def add(self, key: bytes, value: bytes) -> None:
        if key != b"crawl-delay":
            pattern = _pattern(value)
            self.rules[pattern] = self.rules.get(pattern, False) or key == b"allow"
        elif _DELAY.fullmatch(value):
            self.delay = max(self.delay, min(float(value), _LONGEST_DELAY))


def _lines(content: bytes) -> Iterable[tuple[bytes, bytes]]:
    """Keys and values of the lines that make rules; an empty pattern is no rule."""
    if len(content) > ROBOTS_BYTES:
        content = content[: content.rfind(b"\n", 0, ROBOTS_BYTES) + 1]  # half a rule is another
    for line in re.split(rb"[\r\n]+", content.removeprefix(b"\xef\xbb\xbf")):
        key, colon, value = line.partition(b"#")[0].partition(b":")
        key, value = key.strip().lower(), value.strip()
        if colon and (key == b"user-agent" or (key in _RULES and value)):
            yield key, value


def _pattern(value: bytes) -> bytes:
    """A pattern in plain spelling; only at its end does `$` mean the end of the path."""
    plain = _plain(value)
    end = b"$" if plain.endswith(b"$") else b""
    return plain.removesuffix(b"$").replace(b"$", b"%24") + end


def _plain(path: bytes) -> bytes:
    """One spelling for all that mean the same (RFC 9309, section 2.2.2)."""

    def spelled(found: re.Match[bytes]) -> bytes:
        octet = int(found.group()[1:], 16)
        return bytes([octet]) if octet in _UNRESERVED else found.group().upper()

    stays = _UNRESERVED | _RESERVED | {ord("%")}
    escaped = b"".join(bytes([octet]) if octet in stays else b"%%%02X" % octet for octet in path)
    return _ESCAPE.sub(spelled, escaped)


def _matches(pattern: bytes, path: bytes) -> bool:
    """Say whether `path` begins as `pattern` says, in time that no pattern can blow up."""
    ends = pattern.endswith(b"$")
    first, *rest = pattern.removesuffix(b"$").split(b"*")
    if not path.startswith(first):
        return False
    at = len(first)
    last = rest.pop() if ends and rest else None
    for piece in rest:
        found = path.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    if last is not None:
        return len(path) - len(last) >= at and path.endswith(last)
    return not ends or at == len(path)


class RobotsCache:
    """What robots.txt files said, by origin, for a day and of a bounded size together.

    Args:
        most: rules held; the origins read longest ago make room.
    """

    def __init__(self, most: int = 200_000) -> None:
        self._most = most
        self._kept: dict[str, tuple[Robots, float]] = {}
        self._weight = 0

    def get(self, origin: str, now: float) -> "Robots | None":
        """What is known of an origin; None if it must be asked."""
        robots, at = self._kept.get(origin, (None, 0.0))
        return robots if now < at + _CACHED_SECONDS else None

    def put(self, origin: str, robots: Robots, now: float) -> None:
        """Keep what an origin answered."""
        self._forget(origin)
        while self._kept and self._weight + _weight(robots) > self._most:
            self._forget(next(iter(self._kept)))
        self._kept[origin] = (robots, now)
        self._weight += _weight(robots)

    def _forget(self, origin: str) -> None:
        if origin in self._kept:
            self._weight -= _weight(self._kept.pop(origin)[0])


def _weight(robots: Robots) -> int:
    return 1 + len(robots.rules)
