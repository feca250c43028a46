"""Addresses to bytes over HTTP, politely, within limits, and never where nobody may be sent.

`FetchClient.fetch` is the interface: an address in, bytes or a `RecordError` out, hundreds at once.
It decides which host gets a request, when, and whether again.
"""

import asyncio
import atexit
import random
import resource
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Generic, Self, TypeVar

from pmd_pipeline.base.user_agent import user_agent
from pmd_pipeline.contract.errors import PmdError, RecordError
from pmd_pipeline.images.fetch.addresses import ConnectError, FetchError, Origin, Target, joined
from pmd_pipeline.images.fetch.byte_budget import ByteBudget
from pmd_pipeline.images.fetch.engine import LONGEST_CONNECT, Engine, Head, Response
from pmd_pipeline.images.fetch.rate_limiter import (
    Clock,
    Hosts,
    HostUnavailable,
    Permit,
    RateLimiter,
    RequestResult,
)
from pmd_pipeline.images.fetch.responses import (
    busy_kind,
    image_body,
    is_placeholder_url,
    location,
    retry_after,
    robots_rules,
    wanted_bytes,
)
from pmd_pipeline.images.fetch.robots import ROBOTS_BYTES, Robots, RobotsCache
from pmd_pipeline.images.fetch.routes import Router, environment_proxies
from pmd_pipeline.recipe import SIGNALS, Fetch, Images, Signal

_BODIES = 96 << 20
"""Bytes that bodies may take, from their first byte until they are pictures."""

_EXPECTED = 64 << 20
"""Bytes that bodies are expected to take at most; they are larger than the mean now and then."""

_GLANCE = 0.01
"""Seconds after which those who wait for memory look again."""

_OTHER_FILES = 256
"""Files that a process has open besides connections in flight and idle ones."""

_MOST_REDIRECTS = 5
_LONGEST_ROBOTS = 10.0

_UNKNOWN = frozenset({"connect", "dns", "http_429", "http_5xx", "timeout", "tls"})
"""Ways to get no robots.txt that say nothing about what it forbids (RFC 9309, section 2.3.1.4)."""

_Taken = TypeVar("_Taken")

_kept: dict[Hashable, "FetchClient"] = {}


@dataclass(frozen=True)
class Fetched:
    """The bytes of an image and where they came from at last.

    Args:
        sha256: of the bytes as fetched, where somebody else fetched them and stored them otherwise.
        original_size: width and height as fetched, likewise.
        attempts: how often its address was asked, redirects not counted.
    """

    body: bytes
    final_url: str | None = None
    sha256: str | None = None
    original_size: tuple[int, int] | None = None
    attempts: int = 0


class FetchClient:
    """An HTTP client for images, on an event loop of its own in a thread of its own.

    The time allowed for an address is spent by asking, redirects and further attempts included,
    and not by waiting for a turn at its host, for memory, between attempts, or for a cut network.

    `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` are respected. What a name behind a
    proxy leads to is then the proxy's to check; addresses in numbers are checked here all the same.

    Args:
        manners: how often and how long to ask.
        max_bytes: bodies above this are given up.
        respect: signals of those who publish an image that are obeyed.
        clock: what attempts, hosts and a cut network are waited for with; the time allowed for an
            address is not measured by it.
        workers: how many clients ask the same hosts at a time. Each takes its share of `per_host`,
            at least one request in flight, and waits so many times the delays, so that together
            they ask a host no more often than one would.

    Raises:
        PmdError: `contact` cannot be sent, `connect_to` or a proxy is no address, or the system
            does not allow so many connections.
    """

    def __init__(
        self,
        manners: Fetch,
        max_bytes: int,
        respect: Collection[Signal] = SIGNALS,
        clock: Clock | None = None,
        workers: int = 1,
    ) -> None:
        self._manners = manners
        self._workers = workers
        self.per_host = max(1, manners.per_host // workers)
        self._max_bytes = max_bytes
        self._respect = respect
        self._clock = clock or Clock()
        self._turns = RateLimiter(Hosts(self.per_host, self._delay), self._clock, self._has_room)
        self._robots = RobotsCache()
        self._asking: dict[str, asyncio.Task[Robots]] = {}
        self._image = _Errand(self._admit, self._wanted, self._fetched)
        self._rules = _Errand(
            _admit_all,
            lambda _: ROBOTS_BYTES + 1,
            lambda _, answer: robots_rules(answer),
            takes_parts=True,
        )
        diverted = {
            pattern: Origin.of(place, f"fetch.connect_to, {pattern!r}")
            for pattern, place in manners.connect_to.items()
        }
        agent = user_agent(manners.contact)
        _allow_files(2 * manners.concurrency + _OTHER_FILES)
        self._ways = Router(diverted, environment_proxies())
        self.memory = ByteBudget(_BODIES)
        self._is_looking = False
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="web", daemon=True)
        self._thread.start()
        self._engine: Engine = self._awaited(self._new_engine(agent))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Break off all that is asked; nothing can be asked any more."""
        if self.loop.is_closed():
            return
        self._awaited(self._stopped())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def is_idle(self) -> bool:
        """Say whether nothing is in flight, and all that was fetched has been given back."""
        return not (self._turns.in_flight or self.memory.used)

    def is_cut(self) -> bool:
        """Say whether nobody can be reached, and all requests wait for the network."""
        return self._turns.is_cut()

    def get(self, url: str) -> Fetched:
        """As `fetch`, for any thread but the event loop's own."""
        fetched: Fetched = self._awaited(self.fetch(url))
        self.memory.give(len(fetched.body))
        return fetched

    async def fetch(self, url: str) -> Fetched:
        """The body behind `url`, after redirects; its bytes are taken from `memory`.

        Raises:
            RecordError: there is none to be had; `kind` is one of `format.FAILED`.
        """
        allowance = _Allowance(self._manners.timeout)
        attempt = 1
        while True:
            try:
                fetched = await self._followed(url, allowance, self._image)
                return replace(fetched, attempts=attempt)
            except HostUnavailable as given_up:
                detail = "the host is in trouble and left alone for now"
                raise RecordError(given_up.kind, detail, attempt) from given_up
            except FetchError as refusal:
                if isinstance(refusal, ConnectError) and self._turns.is_cut():
                    allowance = _Allowance(self._manners.timeout)
                    continue  # it says nothing of this address, and the next turn waits
                last = attempt > self._manners.retries or allowance.seconds <= 0
                if last or not refusal.may_pass:
                    raise RecordError(refusal.kind, refusal.detail, attempt) from refusal
                if refusal.retry_after is None:  # else the next turn waits
                    await self._clock.sleep(2.0 ** (attempt - 1) * random.uniform(0.5, 1.0))
            attempt += 1

    async def _followed(
        self, url: str, allowance: "_Allowance", errand: "_Errand[_Taken]"
    ) -> _Taken:
        """What the errand makes of the last answer."""
        for _ in range(_MOST_REDIRECTS + 1):
            target = Target.of(url)
            await errand.admit(target, allowance)
            found = await self._asked(target, allowance, errand)
            if not isinstance(found, _Moved):
                return found
            url = joined(target.url, found.to)
        raise FetchError("redirects", f"more than {_MOST_REDIRECTS} redirects")

    async def _asked(
        self, target: Target, allowance: "_Allowance", errand: "_Errand[_Taken]"
    ) -> "_Taken | _Moved":
        async with self._turns.turn(target.host) as turn:
            with _noted(turn):
                with allowance.spent() as seconds:
                    way = await self._ways.to(target, min(seconds, LONGEST_CONNECT))
                with allowance.spent() as seconds:
                    answer = await self._engine.ask(
                        way, seconds, errand.most, takes_parts=errand.takes_parts
                    )
                turn.ending = RequestResult.ANSWERED
                if kind := busy_kind(answer.head):
                    turn.ending, turn.kind = RequestResult.BUSY, kind
                    turn.retry_after = retry_after(answer.head)
                try:
                    to = location(answer.head)
                    return _Moved(to) if to else errand.take(target, answer)
                finally:
                    self.memory.give(len(answer.body))

    async def _admit(self, target: Target, allowance: "_Allowance") -> None:
        if is_placeholder_url(target.url):
            raise FetchError("placeholder", "the address is that of a removed picture")
        if "robots" in self._respect:
            robots = await self._robots_of(target, allowance)
            if not robots.allows(target.path):
                raise FetchError("robots", f"robots.txt of {target.host} forbids it")

    def _wanted(self, head: Head) -> int:
        return wanted_bytes(head, self._max_bytes, self._respect)

    def _fetched(self, target: Target, answer: Response) -> Fetched:
        body = image_body(answer, self._max_bytes, self._respect)
        self.memory.take(len(body))
        return Fetched(body, target.url)

    async def _robots_of(self, target: Target, allowance: "_Allowance") -> Robots:
        """The rules of a host, asked once for all who want to know them at the time."""
        origin = target.origin
        robots = self._robots.get(origin, time.monotonic())
        if robots is not None:
            return robots
        if origin not in self._asking:
            self._asking[origin] = asyncio.create_task(self._asked_robots(origin, allowance))
            self._asking[origin].add_done_callback(lambda _: self._asking.pop(origin))
        return await asyncio.shield(self._asking[origin])

    async def _asked_robots(self, origin: str, allowance: "_Allowance") -> Robots:
        seconds = min(_LONGEST_ROBOTS, allowance.left())
        mine = _Allowance(seconds)
        try:
            robots = await self._followed(f"{origin}/robots.txt", mine, self._rules)
        except FetchError as refusal:
            if refusal.kind in _UNKNOWN:
                raise
            robots = Robots()
        finally:
            allowance.seconds -= seconds - mine.seconds
        self._robots.put(origin, robots, time.monotonic())
        return robots

    def _delay(self, host: str) -> float:
        """The least seconds between our requests: what the host wishes, and the recipe says of it.

        The recipe speaks of the host itself, not of who stands in for it.
        """
        origins = (f"{scheme}://{host}" for scheme in ("http", "https"))
        known = (self._robots.get(origin, time.monotonic()) for origin in origins)
        delays = [robots.delay for robots in known if robots]
        if not self._ways.origin(host):
            delays += (d for p, d in self._manners.delay.items() if fnmatchcase(host, p))
        return self._workers * max(delays, default=0.0)

    def _has_room(self) -> bool:
        """Say whether one more request may be in flight."""
        now = self._turns.in_flight
        if now >= self._manners.concurrency:
            return False
        if now and self.memory.used + (now + 1) * self._engine.mean_bytes > _EXPECTED:
            self._look_again()
            return False
        return True

    def _look_again(self) -> None:
        if not self._is_looking:
            self._is_looking = True
            self.loop.call_later(_GLANCE, self._look)

    def _look(self) -> None:
        self._is_looking = False
        self._turns.go_on()

    async def _new_engine(self, agent: str) -> Engine:
        manners = self._manners
        return Engine(agent, manners.least_rate, manners.concurrency, self.memory)

    async def _stopped(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._engine.close()
        self._ways.close()

    def _awaited(self, asked: Coroutine[Any, Any, _Taken]) -> _Taken:
        return asyncio.run_coroutine_threadsafe(asked, self.loop).result()


@contextmanager
def fetch_client(manners: Fetch, images: Images, workers: int = 1) -> Iterator[FetchClient]:
    """The client of this process for these manners and rules.

    It stays for the next who wants the same, with its connections, names and what it knows of
    hosts, unless it was left in the middle of something, or another was wanted in between.
    """
    proxies = tuple(environment_proxies().items())
    key = (manners.model_dump_json(), images.max_bytes, tuple(images.respect), proxies, workers)
    if key not in _kept:
        _close_kept()
        _kept[key] = FetchClient(manners, images.max_bytes, images.respect, workers=workers)
    try:
        yield _kept[key]
    finally:
        if key in _kept and not _kept[key].is_idle():
            _close_kept()


def _allow_files(count: int) -> None:
    """Have the system allow so many open files, which often it does only when asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= count or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise PmdError(
            f"fetch.concurrency needs {count} open files, and this system allows {hard}: "
            "lower it, or raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@dataclass
class _Allowance:
    """The seconds that asking for one address may still take."""

    seconds: float

    def left(self) -> float:
        """The seconds, of which there are some."""
        if self.seconds <= 0:
            raise FetchError("timeout", "no whole answer in the time allowed")
        return self.seconds

    @contextmanager
    def spent(self) -> Iterator[float]:
        """The seconds there are; those that the context takes are gone."""
        left = self.left()
        started = time.monotonic()
        try:
            yield left
        finally:
            self.seconds -= time.monotonic() - started


@dataclass(frozen=True)
class _Errand(Generic[_Taken]):
    """What is asked for.

    Args:
        admit: refuses addresses on the way.
        most: bytes of the body that are wanted, given the head.
        take: what the last answer comes to.
        takes_parts: the beginning of a body that is too long is worth having.
    """

    admit: Callable[[Target, _Allowance], Coroutine[Any, Any, None]]
    most: Callable[[Head], int]
    take: Callable[[Target, Response], _Taken]
    takes_parts: bool = False


@dataclass(frozen=True)
class _Moved:
    to: str


async def _admit_all(_target: Target, _allowance: _Allowance) -> None:
    """Refuse no address."""


@contextmanager
def _noted(turn: Permit) -> Iterator[None]:
    """Note in the turn what went wrong with its request, if it is the host's trouble."""
    try:
        yield
    except FetchError as refusal:
        if refusal.kind in {"connect", "dns", "timeout"}:
            turn.kind = refusal.kind
            turn.ending = (
                RequestResult.SILENT if isinstance(refusal, ConnectError) else RequestResult.BROKEN
            )
        raise


@atexit.register
def _close_kept() -> None:
    while _kept:
        _kept.popitem()[1].close()
