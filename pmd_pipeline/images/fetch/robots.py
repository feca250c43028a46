"""Opt-out signals of publishers: robots.txt, X-Robots-Tag, TDM-Reservation.

This module only parses and caches; `FetchClient` sends the requests.
"""

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass, field

from pmd_pipeline.base.user_agent import PRODUCT

MAX_ROBOTS_BYTES = 500 << 10
"""Bytes of a robots.txt that are parsed; RFC 9309 (section 2.5) requires no less."""

_CACHE_SECONDS = 24 * 3600.0  # RFC 9309, section 2.4

_OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
_OUR_NAMES = frozenset({PRODUCT, "*", "robots"})
_DIRECTIVE_WITH_VALUE = re.compile(r"unavailable_after|max-[a-z-]+")
_BOT_NAME = re.compile(r"[a-z*][a-z0-9*._/-]*")
_PRODUCT_TOKEN = re.compile(r"[A-Za-z_-]+|\*")

_RULE_KEYS = frozenset({b"allow", b"disallow", b"crawl-delay"})
_DELAY = re.compile(rb"[0-9]{1,6}(\.[0-9]{1,6})?")
_MAX_DELAY_SECONDS = 30.0

_UNRESERVED = frozenset((string.ascii_letters + string.digits + "-._~").encode())
_RESERVED = frozenset(b":/?#[]@!$&'()*+,;=")  # RFC 3986, sections 2.2 and 2.3
_ESCAPE = re.compile(rb"%[0-9A-Fa-f]{2}")


def opt_out_directive(headers: Iterable[str]) -> str | None:
    """The first directive of X-Robots-Tag headers that forbids us to keep an image.

    A bot's name applies to the directives after it, up to the next name or the end of its header.
    Directives about other uses, such as dates, are ignored.

    >>> opt_out_directive(["googlebot: noindex", "max-snippet: 20, noai"])
    'noai'
    """
    for header in headers:
        is_for_us = True
        for element in header.lower().split(","):
            bot, directives = _parse_element(element)
            if bot is not None:
                is_for_us = bot.partition("/")[0] in _OUR_NAMES
            opt_outs = [one for one in directives if one in _OPT_OUT_DIRECTIVES]
            if opt_outs and is_for_us:
                return opt_outs[0]
    return None


def _parse_element(element: str) -> tuple[str | None, list[str]]:
    """The bot's name before an element of the list, if any, and the element's directives."""
    bot = None
    while ":" in element:
        name, _, rest = element.partition(":")
        name = name.strip()
        if name in _OPT_OUT_DIRECTIVES:  # `noai: 1` is no bot's name
            return bot, [name]
        if _DIRECTIVE_WITH_VALUE.fullmatch(name) or not _BOT_NAME.fullmatch(name):
            return bot, []
        bot, element = name, rest
    return bot, re.split(r"[\s;]+", element.strip())


def is_tdm_reserved(headers: Iterable[str]) -> bool:
    """True if TDM-Reservation headers reserve text and data mining to the rights holder."""
    return any(value.strip() == "1" for header in headers for value in header.split(","))


@dataclass(frozen=True)
class RobotsRules:
    """The rules of a robots.txt for us (RFC 9309).

    Args:
        rules: patterns, as `_normalise_pattern` returns them, and whether they allow; the first
            match decides.
        delay: seconds between requests (`Crawl-delay`, which is common but in no RFC), up to
            `_MAX_DELAY_SECONDS`.
    """

    rules: tuple[tuple[bytes, bool], ...] = ()
    delay: float = 0.0

    @classmethod
    def parse(cls, content: bytes) -> "RobotsRules":
        r"""The rules of the groups with our name, or else of the groups for `*`.

        >>> robots = RobotsRules.parse(
        ...     b"User-agent: *\nDisallow: /private/\nAllow: /private/*.jpg$"
        ... )
        >>> robots.allows("/private/1.jpg"), robots.allows("/private/1.jpg?x")
        (True, False)
        """
        our_group, default_group = _Group(), _Group()
        current = list[_Group]()
        is_named, in_agents = False, False
        for key, value in _key_values(content):
            if key == b"user-agent":
                current = current if in_agents else []
                in_agents = True
                match = _PRODUCT_TOKEN.match(value.decode("latin-1"))
                name = match.group().lower() if match else ""
                if name == PRODUCT:
                    is_named = True
                    current.append(our_group)
                elif name == "*":
                    current.append(default_group)
            else:
                # Crawl-delay is no rule of the RFC, so it does not end a list of user agents
                in_agents = in_agents and key == b"crawl-delay"
                for group in current:
                    group.add(key, value)
        group = our_group if is_named else default_group
        rules = sorted(group.rules.items(), key=lambda rule: (-len(rule[0]), not rule[1]))
        return cls(tuple(rules), group.delay)

    def allows(self, path: str) -> bool:
        """True if `path`, query included, in ASCII, may be requested."""
        if path == "/robots.txt":
            return True
        # these two are operators in a pattern, where they stand for themselves only if escaped
        plain = _normalise(path.encode()).replace(b"*", b"%2A").replace(b"$", b"%24")
        return next((allow for pattern, allow in self.rules if _matches(pattern, plain)), True)


@dataclass
class _Group:
    """The rules and the delay of the groups of one user agent."""

    rules: dict[bytes, bool] = field(default_factory=dict)
    delay: float = 0.0

    def add(self, key: bytes, value: bytes) -> None:
        if key != b"crawl-delay":
            pattern = _normalise_pattern(value)
            self.rules[pattern] = self.rules.get(pattern, False) or key == b"allow"
        elif _DELAY.fullmatch(value):
            self.delay = max(self.delay, min(float(value), _MAX_DELAY_SECONDS))


def _key_values(content: bytes) -> Iterable[tuple[bytes, bytes]]:
    """Keys and values of the lines that have an effect; an empty pattern has none."""
    if len(content) > MAX_ROBOTS_BYTES:
        # up to the last complete line: half a rule is another rule
        content = content[: content.rfind(b"\n", 0, MAX_ROBOTS_BYTES) + 1]
    for line in re.split(rb"[\r\n]+", content.removeprefix(b"\xef\xbb\xbf")):
        key, colon, value = line.partition(b"#")[0].partition(b":")
        key, value = key.strip().lower(), value.strip()
        if colon and (key == b"user-agent" or (key in _RULE_KEYS and value)):
            yield key, value


def _normalise_pattern(value: bytes) -> bytes:
    """A pattern in normal spelling; `$` is an operator only at its end."""
    plain = _normalise(value)
    end = b"$" if plain.endswith(b"$") else b""
    return plain.removesuffix(b"$").replace(b"$", b"%24") + end


def _normalise(path: bytes) -> bytes:
    """One spelling for all paths that are equivalent (RFC 9309, section 2.2.2)."""

    def spelling(match: re.Match[bytes]) -> bytes:
        octet = int(match.group()[1:], 16)
        return bytes([octet]) if octet in _UNRESERVED else match.group().upper()

    unescaped = _UNRESERVED | _RESERVED | {ord("%")}
    escaped = b"".join(
        bytes([octet]) if octet in unescaped else b"%%%02X" % octet for octet in path
    )
    return _ESCAPE.sub(spelling, escaped)


def _matches(pattern: bytes, path: bytes) -> bool:
    """True if a prefix of `path` matches `pattern`; the time is linear in both."""
    is_anchored = pattern.endswith(b"$")
    first, *rest = pattern.removesuffix(b"$").split(b"*")
    if not path.startswith(first):
        return False
    position = len(first)
    last = rest.pop() if is_anchored and rest else None
    for literal in rest:
        start = path.find(literal, position)
        if start < 0:
            return False
        position = start + len(literal)
    if last is not None:
        return len(path) - len(last) >= position and path.endswith(last)
    return not is_anchored or position == len(path)


class RobotsCache:
    """Rules by origin, for a day and within a limit of memory.

    Args:
        max_rules: sum over all origins; the oldest entries are evicted.
    """

    def __init__(self, max_rules: int = 200_000) -> None:
        self._max_rules = max_rules
        self._entries: dict[str, tuple[RobotsRules, float]] = {}
        self._weight = 0

    def get(self, origin: str, now: float) -> RobotsRules | None:
        """The rules of an origin; None if they have to be fetched."""
        rules, stored_at = self._entries.get(origin, (None, 0.0))
        return rules if now < stored_at + _CACHE_SECONDS else None

    def put(self, origin: str, rules: RobotsRules, now: float) -> None:
        """Store the rules of an origin."""
        self._evict(origin)
        while self._entries and self._weight + _weight(rules) > self._max_rules:
            self._evict(next(iter(self._entries)))
        self._entries[origin] = (rules, now)
        self._weight += _weight(rules)

    def _evict(self, origin: str) -> None:
        if origin in self._entries:
            self._weight -= _weight(self._entries.pop(origin)[0])


def _weight(robots: RobotsRules) -> int:
    return 1 + len(robots.rules)
