"""How often each host may be asked, and when nobody can be.

`Hosts` gets the time and the results of requests; it neither waits nor sends requests. Coroutines
wait with `RateLimiter`.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial

LONGEST_WAIT = 60.0
"""Seconds that an address waits for its host at a time; who wants longer is asked no more."""

MOST_TROUBLES = 10
"""Troubles in a row after which a host is left alone."""

MOST_RESTS = 6
"""Rests in a row that addresses wait for, if the host has ever worked; then they fail at once."""

BURST = 10
"""Failures to reach any host, one after the other, that mean that the network is cut."""

LONGEST_CUT = 300.0
"""Seconds that a cut network is waited for; then failures are believed."""

_REST = 15.0
_PAUSE = 5.0
_LONGEST_BACK_OFF = 30.0
_MOST_HOSTS = 20_000


class RequestResult(Enum):
    """What became of a request, as far as its host is concerned."""

    UNASKED = auto()
    """It was not made after all."""
    ANSWERED = auto()
    BUSY = auto()
    """The host asks for fewer requests (429, 503)."""
    BROKEN = auto()
    """The host was reached, and its answer did not come, or not whole."""
    SILENT = auto()
    """The host was not reached."""


class HostUnavailable(Exception):
    """The host is not asked for now; `kind` is its last trouble."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(eq=False)
class Permit:
    """The right to make one request, or the wait for it; who makes the request notes its end.

    Args:
        kind: of the trouble, one of `format.FAILED`.
        retry_after: seconds that the host wants to be left alone.
    """

    host: str
    ending: RequestResult = RequestResult.UNASKED
    kind: str = ""
    retry_after: float | None = None
    began: float = -math.inf


@dataclass
class _Host:
    limit: float
    waiting: deque[Permit] = field(default_factory=deque)
    in_flight: int = 0
    free_at: float = -math.inf
    next_at: float = -math.inf
    slowed_at: float = -math.inf
    troubles: int = 0
    rests: int = 0
    has_worked: bool = False
    kind: str = ""

    def most(self) -> int:
        """Requests that may be in flight; after a rest, one has to show that the host is back."""
        return 1 if self.rests else int(self.limit)

    def is_idle(self, now: float) -> bool:
        """Say whether nothing is lost when the host is forgotten."""
        return (
            not (self.waiting or self.in_flight or self.rests)
            and max(self.free_at, self.next_at) <= now
        )


@dataclass
class _Network:
    silent: set[str] = field(default_factory=set)
    misses: int = 0
    until: float = -math.inf
    pauses: int = 0
    paused: float = 0.0

    def is_cut(self) -> bool:
        return self.pauses > 0 and self.paused < LONGEST_CUT

    def missed(self, turn: Permit, now: float, num_hosts: int) -> None:
        if turn.began < self.until or self.paused >= LONGEST_CUT:
            return  # asked before the pause, it tells nothing new
        self.misses += 1
        self.silent.add(turn.host)
        is_burst = self.misses >= BURST and len(self.silent) >= min(BURST, num_hosts)
        if self.pauses or is_burst:
            pause = min(_PAUSE * 2**self.pauses, LONGEST_WAIT, LONGEST_CUT - self.paused)
            self.until = now + pause
            self.paused += pause
            self.pauses += 1


class Hosts:
    """Who may ask which host, and when.

    A host is asked by as many at once as it bears: each answer lets in a little more, up to `most`,
    and each 429, 503 or failure halves it, once for all that were in flight. What it asks to wait
    is waited by all. After `MOST_TROUBLES` in a row it is left alone, then one request shows if it
    is back. Who waits goes in the order of coming.

    When nobody can be reached any more, nobody is asked for a while: the network is cut.

    Args:
        most: requests in flight to one host.
        delay_of: least seconds between the beginnings of requests to a host.
    """

    def __init__(self, most: int, delay_of: Callable[[str], float] = lambda _: 0.0) -> None:
        self._most = most
        self._delay_of = delay_of
        self._hosts: dict[str, _Host] = {}
        self._network = _Network()

    def queue(self, name: str, now: float) -> Permit:
        """A turn that waits at the end of the host's line."""
        if len(self._hosts) >= _MOST_HOSTS and name not in self._hosts:
            self._hosts = {n: host for n, host in self._hosts.items() if not host.is_idle(now)}
        turn = Permit(name)
        self._hosts.setdefault(name, _Host(float(self._most))).waiting.append(turn)
        return turn

    def wait(self, turn: Permit, now: float) -> float:
        """Seconds after which to call again, or at the next change of the host; 0 begins the turn.

        Raises:
            HostUnavailable: the host is not waited for.
        """
        host = self._hosts[turn.host]
        is_waited_for = not host.rests or (host.has_worked and host.rests <= MOST_RESTS)
        if not is_waited_for and (now < host.free_at or host.in_flight):
            raise HostUnavailable(host.kind)
        if host.free_at - now > LONGEST_WAIT:
            raise HostUnavailable(host.kind)
        until = max(host.free_at, host.next_at, self._network.until)
        if until > now:
            return until - now
        if host.in_flight >= host.most() or host.waiting[0] is not turn:
            return math.inf
        host.waiting.popleft()
        host.in_flight += 1
        host.next_at = now + self._delay_of(turn.host)
        turn.began = now
        return 0.0

    def first(self, name: str) -> Permit | None:
        """The turn that is first in the host's line, if any waits."""
        host = self._hosts.get(name)
        return host.waiting[0] if host and host.waiting else None

    def leave(self, turn: Permit) -> None:
        """Stop waiting, if the turn has not begun."""
        waiting = self._hosts[turn.host].waiting
        if turn in waiting:
            waiting.remove(turn)

    def end(self, turn: Permit, now: float) -> None:
        """Learn what became of a turn that had begun."""
        host = self._hosts[turn.host]
        host.in_flight -= 1
        if turn.ending in {RequestResult.ANSWERED, RequestResult.BUSY}:
            self._network = _Network()
        if turn.ending is RequestResult.ANSWERED:
            host.limit = min(self._most, host.limit + 1 / host.limit)
            host.troubles = host.rests = 0
            host.has_worked = True
        elif turn.ending is RequestResult.SILENT:
            self._network.missed(turn, now, len(self._hosts))
            if not self.is_cut():  # else it tells of the network and not of the host
                _trouble(host, turn, now)
        elif turn.ending is not RequestResult.UNASKED:
            _trouble(host, turn, now)

    def is_cut(self) -> bool:
        """Say whether nobody at all can be reached, so that no failure to do so counts."""
        return self._network.is_cut()


def _trouble(host: _Host, turn: Permit, now: float) -> None:
    host.kind = turn.kind
    is_news = turn.began >= host.slowed_at  # not one of those in flight at the last trouble
    if turn.ending is RequestResult.BUSY:
        back_off = min(2.0**host.troubles / 2, _LONGEST_BACK_OFF)
        pause = back_off if turn.retry_after is None else turn.retry_after
        host.free_at = max(host.free_at, now + pause)
    if is_news or turn.ending is not RequestResult.BUSY:
        host.troubles += 1
    if is_news:
        host.limit = max(1.0, host.limit / 2)
        host.slowed_at = now
    if is_news if host.rests else host.troubles >= MOST_TROUBLES:
        host.free_at = max(host.free_at, now + min(_REST * 2**host.rests, LONGEST_WAIT))
        host.slowed_at = now
        host.rests += 1


class Clock:
    """The time, and ways to let it pass on an event loop; tests have their own."""

    def now(self) -> float:
        """Seconds since whenever."""
        return time.monotonic()

    def later(self, seconds: float, what: Callable[[], object]) -> None:
        """Call `what` after so many seconds."""
        asyncio.get_running_loop().call_later(seconds, what)

    async def sleep(self, seconds: float) -> None:
        """Let seconds pass."""
        woken = asyncio.Event()
        self.later(seconds, woken.set)
        await woken.wait()


class RateLimiter:
    """`Hosts` for coroutines, which wait until their turn has come.

    A turn begins only while `has_room` says that one more request may be in flight, to whichever
    host; the hosts that wait for that go in turn too.
    """

    def __init__(self, hosts: Hosts, clock: Clock, has_room: Callable[[], bool]) -> None:
        self.in_flight = 0
        self._hosts = hosts
        self._clock = clock
        self._has_room = has_room
        self._begun: dict[Permit, asyncio.Future[None]] = {}
        self._ready: dict[str, None] = {}
        self._sleeping: set[str] = set()

    @asynccontextmanager
    async def turn(self, host: str) -> AsyncIterator[Permit]:
        """The right to ask `host` once, while the context lasts.

        Raises:
            HostUnavailable: the host is not asked for now.
        """
        turn = self._hosts.queue(host, self._clock.now())
        begun = self._begun[turn] = asyncio.get_running_loop().create_future()
        self._look_at(host)
        try:
            await begun
        finally:
            del self._begun[turn]
            self._hosts.leave(turn)
        try:
            yield turn
        finally:
            self._end(turn)

    def is_cut(self) -> bool:
        """Say whether nobody at all can be reached, so that no failure to do so counts."""
        return self._hosts.is_cut()

    def go_on(self) -> None:
        """Begin as many turns as there is room for."""
        while self._ready and self._has_room():
            host = next(iter(self._ready))
            del self._ready[host]
            if self._begin_one(host):
                self._ready[host] = None  # behind the others

    def _look_at(self, *hosts: str) -> None:
        for host in hosts:
            self._ready.setdefault(host)
        self.go_on()

    def _begin_one(self, host: str) -> bool:
        """Begin the host's next turn, or see to it that it is looked at again in time."""
        while turn := self._hosts.first(host):
            try:
                seconds = self._hosts.wait(turn, self._clock.now())
            except HostUnavailable as given_up:
                self._hosts.leave(turn)
                _settle(self._begun[turn], given_up)
                continue
            if seconds == 0:
                self.in_flight += 1
                _settle(self._begun[turn])
                return True
            if seconds < math.inf and host not in self._sleeping:
                self._sleeping.add(host)
                self._clock.later(seconds, partial(self._wake, host))
            return False
        return False

    def _wake(self, host: str) -> None:
        self._sleeping.discard(host)
        self._look_at(host)

    def _end(self, turn: Permit) -> None:
        was_cut = self._hosts.is_cut()
        self._hosts.end(turn, self._clock.now())
        self.in_flight -= 1
        mended = self._sleeping if was_cut and not self._hosts.is_cut() else ()
        self._look_at(turn.host, *mended)


def _settle(begun: asyncio.Future[None], error: HostUnavailable | None = None) -> None:
    if begun.done():
        return  # nobody waits any more
    if error:
        begun.set_exception(error)
    else:
        begun.set_result(None)
