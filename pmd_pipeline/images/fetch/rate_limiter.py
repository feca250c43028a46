"""Rate limits of each host, and detection of a network outage.

`HostQueues` is a state machine: it gets the time and the results of requests, and neither waits nor
sends. `RateLimiter` lets coroutines wait for it.
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

MAX_WAIT_SECONDS = 60.0
"""Longest time that a request waits for its host; a host that asks for more is unavailable."""

MAX_FAILURES = 10
"""Failures in a row after which the circuit of a host opens."""

MAX_COOLDOWNS = 6
"""Cooldowns in a row that requests wait for if the host has ever answered; later they fail."""

OFFLINE_FAILURES = 10
"""Failures in a row to connect, of as many hosts, that mean a network outage."""

MAX_OFFLINE_SECONDS = 300.0
"""Time that a network outage is waited for; then failures to connect count for their hosts."""

_FIRST_COOLDOWN_SECONDS = 15.0
_FIRST_OFFLINE_SECONDS = 5.0
_MAX_BACKOFF_SECONDS = 30.0
_MAX_HOSTS = 20_000


class RequestResult(Enum):
    """The result of a request as far as the rate limit of its host is concerned."""

    NOT_SENT = auto()
    ANSWERED = auto()
    BUSY = auto()
    """The host asks for fewer requests (429, 503)."""
    INCOMPLETE = auto()
    """The connection was made, but no complete response came."""
    UNREACHABLE = auto()
    """No connection could be made."""


class HostUnavailable(Exception):
    """The host gets no requests for now; `kind` is its last failure reason."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(eq=False)
class Permit:
    """The right to send one request, or the place in the queue for it.

    The caller that sends the request sets the result.

    Args:
        kind: failure reason, one of `FAILURE_REASONS`.
        retry_after: seconds that the host asks to wait.
        started_at: time at which the request was allowed.
    """

    host: str
    result: RequestResult = RequestResult.NOT_SENT
    kind: str = ""
    retry_after: float | None = None
    started_at: float = -math.inf


@dataclass
class _HostState:
    """One host.

    Args:
        limit: of requests in flight (AIMD).
        blocked_until: by Retry-After, by backoff or by a cooldown.
        next_start: earliest start of the next request, by the minimum delay.
        reduced_at: time of the last reduction of `limit`.
        failures: in a row.
        cooldowns: in a row; above 0, the circuit is open or half-open.
        kind: last failure reason.
    """

    limit: float
    queue: deque[Permit] = field(default_factory=deque)
    in_flight: int = 0
    blocked_until: float = -math.inf
    next_start: float = -math.inf
    reduced_at: float = -math.inf
    failures: int = 0
    cooldowns: int = 0
    has_answered: bool = False
    kind: str = ""

    def max_in_flight(self) -> int:
        """Requests that may be in flight; a half-open circuit allows one, as a probe."""
        return 1 if self.cooldowns else int(self.limit)

    def can_be_forgotten(self, now: float) -> bool:
        """True if the state limits no future request."""
        return (
            not (self.queue or self.in_flight or self.cooldowns)
            and max(self.blocked_until, self.next_start) <= now
        )


@dataclass
class _NetworkState:
    """Failures to connect since the last response of any host.

    Args:
        paused_until: no request starts before.
        paused_seconds: sum of all pauses.
    """

    hosts: set[str] = field(default_factory=set)
    failures: int = 0
    paused_until: float = -math.inf
    pauses: int = 0
    paused_seconds: float = 0.0

    def is_offline(self) -> bool:
        return self.pauses > 0 and self.paused_seconds < MAX_OFFLINE_SECONDS

    def add_failure(self, permit: Permit, now: float, num_hosts: int) -> None:
        if permit.started_at < self.paused_until or self.paused_seconds >= MAX_OFFLINE_SECONDS:
            return  # sent before the pause: it has nothing new about the network
        self.failures += 1
        self.hosts.add(permit.host)
        is_outage = self.failures >= OFFLINE_FAILURES and len(self.hosts) >= min(
            OFFLINE_FAILURES, num_hosts
        )
        if self.pauses or is_outage:
            seconds = min(
                _FIRST_OFFLINE_SECONDS * 2**self.pauses,
                MAX_WAIT_SECONDS,
                MAX_OFFLINE_SECONDS - self.paused_seconds,
            )
            self.paused_until = now + seconds
            self.paused_seconds += seconds
            self.pauses += 1


class HostQueues:
    """A FIFO queue of requests for each host, with its rate limit.

    - AIMD limit of requests in flight: grows by 1/limit for each response up to `max_in_flight`,
      halves on 429, 503 or failure, once for all requests in flight at that time.
    - Retry-After of one response blocks all requests to its host.
    - Circuit breaker: after `MAX_FAILURES` in a row the host gets no requests for a cooldown, then
      one probe.
    - When no host can be reached, all hosts are paused (`is_offline`).

    Args:
        max_in_flight: requests in flight to one host.
        min_delay: least seconds between the starts of requests to a host.
    """

    def __init__(
        self, max_in_flight: int, min_delay: Callable[[str], float] = lambda _: 0.0
    ) -> None:
        self._max_in_flight = max_in_flight
        self._min_delay = min_delay
        self._hosts: dict[str, _HostState] = {}
        self._network = _NetworkState()

    def enqueue(self, name: str, now: float) -> Permit:
        """A permit at the end of the host's queue."""
        if len(self._hosts) >= _MAX_HOSTS and name not in self._hosts:
            self._hosts = {
                n: host for n, host in self._hosts.items() if not host.can_be_forgotten(now)
            }
        permit = Permit(name)
        self._hosts.setdefault(name, _HostState(float(self._max_in_flight))).queue.append(permit)
        return permit

    def try_start(self, permit: Permit, now: float) -> float:
        """Start the request and return 0, or return the seconds after which to try again.

        Infinity means: after the next change of the host's state.

        Raises:
            HostUnavailable: the host is not waited for.
        """
        host = self._hosts[permit.host]
        is_waited_for = not host.cooldowns or (
            host.has_answered and host.cooldowns <= MAX_COOLDOWNS
        )
        if not is_waited_for and (now < host.blocked_until or host.in_flight):
            raise HostUnavailable(host.kind)
        if host.blocked_until - now > MAX_WAIT_SECONDS:
            raise HostUnavailable(host.kind)
        until = max(host.blocked_until, host.next_start, self._network.paused_until)
        if until > now:
            return until - now
        if host.in_flight >= host.max_in_flight() or host.queue[0] is not permit:
            return math.inf
        host.queue.popleft()
        host.in_flight += 1
        host.next_start = now + self._min_delay(permit.host)
        permit.started_at = now
        return 0.0

    def first(self, name: str) -> Permit | None:
        """The first permit in the host's queue."""
        host = self._hosts.get(name)
        return host.queue[0] if host and host.queue else None

    def leave(self, permit: Permit) -> None:
        """Remove a permit from its queue; no effect if its request has started."""
        queue = self._hosts[permit.host].queue
        if permit in queue:
            queue.remove(permit)

    def finish(self, permit: Permit, now: float) -> None:
        """Update the host's state with the result of a request that had started."""
        host = self._hosts[permit.host]
        host.in_flight -= 1
        if permit.result in {RequestResult.ANSWERED, RequestResult.BUSY}:
            self._network = _NetworkState()
        if permit.result is RequestResult.ANSWERED:
            host.limit = min(self._max_in_flight, host.limit + 1 / host.limit)
            host.failures = host.cooldowns = 0
            host.has_answered = True
        elif permit.result is RequestResult.UNREACHABLE:
            self._network.add_failure(permit, now, len(self._hosts))
            if not self.is_offline():  # during an outage the host is not the cause
                _add_failure(host, permit, now)
        elif permit.result is not RequestResult.NOT_SENT:
            _add_failure(host, permit, now)

    def is_offline(self) -> bool:
        """True if no host can be reached, so that failures to connect do not count."""
        return self._network.is_offline()


def _add_failure(host: _HostState, permit: Permit, now: float) -> None:
    host.kind = permit.kind
    is_new = permit.started_at >= host.reduced_at  # not in flight at the last reduction
    if permit.result is RequestResult.BUSY:
        backoff = min(2.0**host.failures / 2, _MAX_BACKOFF_SECONDS)
        seconds = backoff if permit.retry_after is None else permit.retry_after
        host.blocked_until = max(host.blocked_until, now + seconds)
    if is_new or permit.result is not RequestResult.BUSY:
        host.failures += 1
    if is_new:
        host.limit = max(1.0, host.limit / 2)
        host.reduced_at = now
    if is_new if host.cooldowns else host.failures >= MAX_FAILURES:
        cooldown = min(_FIRST_COOLDOWN_SECONDS * 2**host.cooldowns, MAX_WAIT_SECONDS)
        host.blocked_until = max(host.blocked_until, now + cooldown)
        host.reduced_at = now
        host.cooldowns += 1


class Clock:
    """Time and timers of an event loop; tests substitute their own."""

    def now(self) -> float:
        """Seconds since an arbitrary moment."""
        return time.monotonic()

    def call_later(self, seconds: float, callback: Callable[[], object]) -> None:
        """Call `callback` after so many seconds."""
        asyncio.get_running_loop().call_later(seconds, callback)

    async def sleep(self, seconds: float) -> None:
        """Wait for so many seconds."""
        woken = asyncio.Event()
        self.call_later(seconds, woken.set)
        await woken.wait()


class RateLimiter:
    """`HostQueues` for coroutines, which wait until their request may start.

    A request starts only while `has_room` is true, whichever its host; hosts that wait for room
    take turns (round robin).
    """

    def __init__(self, queues: HostQueues, clock: Clock, has_room: Callable[[], bool]) -> None:
        self.in_flight = 0
        self._queues = queues
        self._clock = clock
        self._has_room = has_room
        self._started: dict[Permit, asyncio.Future[None]] = {}
        self._ready: dict[str, None] = {}
        self._delayed: set[str] = set()

    @asynccontextmanager
    async def permit(self, host: str) -> AsyncIterator[Permit]:
        """The right to send one request to `host` within the context.

        Raises:
            HostUnavailable: the host gets no requests for now.
        """
        permit = self._queues.enqueue(host, self._clock.now())
        started = self._started[permit] = asyncio.get_running_loop().create_future()
        self._check(host)
        try:
            await started
        finally:
            del self._started[permit]
            self._queues.leave(permit)
        try:
            yield permit
        finally:
            self._finish(permit)

    def is_offline(self) -> bool:
        """True if no host can be reached, so that failures to connect do not count."""
        return self._queues.is_offline()

    def start_ready(self) -> None:
        """Start as many requests as there is room for."""
        while self._ready and self._has_room():
            host = next(iter(self._ready))
            del self._ready[host]
            if self._start_one(host):
                self._ready[host] = None  # behind the other hosts

    def _check(self, *hosts: str) -> None:
        for host in hosts:
            self._ready.setdefault(host)
        self.start_ready()

    def _start_one(self, host: str) -> bool:
        """Start the next request to the host, or set a timer to try again."""
        while permit := self._queues.first(host):
            try:
                seconds = self._queues.try_start(permit, self._clock.now())
            except HostUnavailable as error:
                self._queues.leave(permit)
                _resolve(self._started[permit], error)
                continue
            if seconds == 0:
                self.in_flight += 1
                _resolve(self._started[permit])
                return True
            if seconds < math.inf and host not in self._delayed:
                self._delayed.add(host)
                self._clock.call_later(seconds, partial(self._wake, host))
            return False
        return False

    def _wake(self, host: str) -> None:
        self._delayed.discard(host)
        self._check(host)

    def _finish(self, permit: Permit) -> None:
        was_offline = self._queues.is_offline()
        self._queues.finish(permit, self._clock.now())
        self.in_flight -= 1
        is_back = was_offline and not self._queues.is_offline()
        self._check(permit.host, *(self._delayed if is_back else ()))


def _resolve(started: asyncio.Future[None], error: HostUnavailable | None = None) -> None:
    if started.done():
        return  # the coroutine was cancelled
    if error:
        started.set_exception(error)
    else:
        started.set_result(None)
