"""HTTP client for images.

`FetchClient.fetch` takes a URL and returns bytes or raises `RecordError`, for hundreds of URLs
concurrently. It holds the rate limits of each host, obeys robots.txt, retries, and connects to
public addresses only.
"""

import asyncio
import atexit
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
from pmd_pipeline.images.fetch.addresses import HostOverride, Target, redirect_url
from pmd_pipeline.images.fetch.byte_budget import ByteBudget
from pmd_pipeline.images.fetch.curl_transport import (
    MAX_CONNECT_SECONDS,
    CurlTransport,
    Response,
    ResponseHead,
)
from pmd_pipeline.images.fetch.errors import ConnectError, FetchError
from pmd_pipeline.images.fetch.rate_limiter import (
    Clock,
    HostQueues,
    HostUnavailable,
    Permit,
    RateLimiter,
    RequestResult,
)
from pmd_pipeline.images.fetch.responses import (
    busy_kind,
    image_body,
    is_placeholder_url,
    max_body_bytes,
    parse_robots,
    redirect_location,
    retry_after_seconds,
)
from pmd_pipeline.images.fetch.retry import backoff_seconds
from pmd_pipeline.images.fetch.robots import MAX_ROBOTS_BYTES, RobotsCache, RobotsRules
from pmd_pipeline.images.fetch.routes import Router, environment_proxies
from pmd_pipeline.recipe import SIGNALS, Fetch, Images, Signal

_MAX_BODY_BYTES = 96 << 20
"""Bytes of memory for bodies, from their first byte until they are decoded."""

_MAX_EXPECTED_BYTES = 64 << 20
"""The same, as expected from the mean size of bodies; lower, because some are much larger."""

_POLL_SECONDS = 0.01
"""Interval at which requests that wait for memory check the budget again."""

_OTHER_OPEN_FILES = 256
"""Open files of a process besides its connections."""

_MAX_REDIRECTS = 5
_MAX_ROBOTS_SECONDS = 10.0

_UNREACHABLE_KINDS = frozenset({"connect", "dns", "http_429", "http_5xx", "timeout", "tls"})
"""Failures to get a robots.txt after which its rules are unknown (RFC 9309, section 2.3.1.4); after
any other failure there are none."""

_Result = TypeVar("_Result")

_cached_clients: dict[Hashable, "FetchClient"] = {}
"""At most one, for `fetch_client`."""


@dataclass(frozen=True)
class FetchedImage:
    """The bytes of an image file.

    Args:
        final_url: after redirects.
        sha256: of the fetched bytes, where another program fetched and re-encoded them.
        original_size: width and height before re-encoding, likewise.
        attempts: requests for the URL, redirects not counted.
    """

    body: bytes
    final_url: str | None = None
    sha256: str | None = None
    original_size: tuple[int, int] | None = None
    attempts: int = 0


class FetchClient:
    """An HTTP client for images, with its own event loop in its own thread.

    The timeout of a URL covers its requests, including redirects and retries. The time that it
    waits for a permit, for memory, between attempts or for the network does not count.

    `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` are used. Behind a proxy, the proxy
    resolves names and has to block private addresses; URLs with an IP address are checked here.

    Args:
        politeness: rates and timeouts.
        max_bytes: a larger body is an error.
        respect: opt-out signals that are obeyed.
        clock: measures and waits for delays, backoff and network outages, but not the timeout.
        workers: number of clients that fetch from the same hosts at a time. Each takes its share of
            `per_host`, at least one request in flight, and multiplies the delays by `workers`, so
            that the sum over all clients respects the limits.

    Raises:
        PmdError: `contact` is no header value, `connect_to` or a proxy is malformed, or the system
            does not allow as many connections.
    """

    def __init__(
        self,
        politeness: Fetch,
        max_bytes: int,
        respect: Collection[Signal] = SIGNALS,
        clock: Clock | None = None,
        workers: int = 1,
    ) -> None:
        self._politeness = politeness
        self._workers = workers
        self.per_host = max(1, politeness.per_host // workers)
        self._max_bytes = max_bytes
        self._respect = respect
        self._clock = clock or Clock()
        queues = HostQueues(self.per_host, self._min_delay)
        self._limiter = RateLimiter(queues, self._clock, self._has_room)
        self._robots = RobotsCache()
        self._robots_tasks: dict[str, asyncio.Task[RobotsRules]] = {}
        self._image_request = _RequestKind(self._check_target, self._max_image, self._parse_image)
        self._robots_request = _RequestKind(
            _allow_target,
            lambda _: MAX_ROBOTS_BYTES + 1,
            lambda _, response: parse_robots(response),
            accepts_partial=True,
        )
        overrides = {
            pattern: HostOverride.parse(server, f"fetch.connect_to, {pattern!r}")
            for pattern, server in politeness.connect_to.items()
        }
        agent = user_agent(politeness.contact)
        _raise_open_file_limit(2 * politeness.concurrency + _OTHER_OPEN_FILES)
        self._router = Router(overrides, environment_proxies())
        self.byte_budget = ByteBudget(_MAX_BODY_BYTES)
        self._is_polling = False
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="fetch", daemon=True)
        self._thread.start()
        self._transport: CurlTransport = self._run(self._open_transport(agent))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all requests; the client cannot be used afterwards."""
        if self.loop.is_closed():
            return
        self._run(self._shut_down())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def is_idle(self) -> bool:
        """True if no request is in flight, and the bytes of all bodies have been released."""
        return not (self._limiter.in_flight or self.byte_budget.used)

    def is_offline(self) -> bool:
        """True if no host can be reached, and all requests wait for the network."""
        return self._limiter.is_offline()

    def get(self, url: str) -> FetchedImage:
        """As `fetch`, for every thread except the event loop's own."""
        fetched: FetchedImage = self._run(self.fetch(url))
        self.byte_budget.release(len(fetched.body))
        return fetched

    async def fetch(self, url: str) -> FetchedImage:
        """The image file at `url`, after redirects and retries.

        Its bytes are acquired from `byte_budget`; the caller releases them.

        Raises:
            RecordError: the last attempt failed; `kind` is one of `FAILURE_REASONS`.
        """
        time_budget = _TimeBudget(self._politeness.timeout)
        attempt = 1
        while True:
            try:
                fetched = await self._follow_redirects(url, time_budget, self._image_request)
                return replace(fetched, attempts=attempt)
            except HostUnavailable as unavailable:
                detail = "the host is in trouble and left alone for now"
                raise RecordError(unavailable.kind, detail, attempt) from unavailable
            except FetchError as error:
                if isinstance(error, ConnectError) and self._limiter.is_offline():
                    time_budget = _TimeBudget(self._politeness.timeout)
                    continue  # this attempt does not count, and the next permit waits
                is_last = attempt > self._politeness.retries or time_budget.seconds <= 0
                if is_last or not error.is_retryable:
                    raise RecordError(error.kind, error.detail, attempt) from error
                if error.retry_after is None:  # otherwise the next permit waits
                    await self._clock.sleep(backoff_seconds(attempt))
            attempt += 1

    async def _follow_redirects(
        self, url: str, time_budget: "_TimeBudget", kind: "_RequestKind[_Result]"
    ) -> _Result:
        """The parsed response at the end of the redirects."""
        for _ in range(_MAX_REDIRECTS + 1):
            target = Target.parse(url)
            await kind.check_target(target, time_budget)
            result = await self._request(target, time_budget, kind)
            if not isinstance(result, _Redirect):
                return result
            url = redirect_url(target.url, result.location)
        raise FetchError("redirects", f"more than {_MAX_REDIRECTS} redirects")

    async def _request(
        self, target: Target, time_budget: "_TimeBudget", kind: "_RequestKind[_Result]"
    ) -> "_Result | _Redirect":
        async with self._limiter.permit(target.host) as permit:
            with _recording_failure(permit):
                with time_budget.spend() as seconds:
                    route = await self._router.route(target, min(seconds, MAX_CONNECT_SECONDS))
                with time_budget.spend() as seconds:
                    response = await self._transport.get(
                        route, seconds, kind.max_bytes, accepts_partial=kind.accepts_partial
                    )
                permit.result = RequestResult.ANSWERED
                if reason := busy_kind(response.head):
                    permit.result, permit.kind = RequestResult.BUSY, reason
                    permit.retry_after = retry_after_seconds(response.head)
                try:
                    location = redirect_location(response.head)
                    return _Redirect(location) if location else kind.parse(target, response)
                finally:
                    self.byte_budget.release(len(response.body))

    async def _check_target(self, target: Target, time_budget: "_TimeBudget") -> None:
        if is_placeholder_url(target.url):
            raise FetchError("placeholder", "the address is that of a removed picture")
        if "robots" in self._respect:
            rules = await self._robots_rules(target, time_budget)
            if not rules.allows(target.path):
                raise FetchError("robots", f"robots.txt of {target.host} forbids it")

    def _max_image(self, head: ResponseHead) -> int:
        return max_body_bytes(head, self._max_bytes, self._respect)

    def _parse_image(self, target: Target, response: Response) -> FetchedImage:
        body = image_body(response, self._max_bytes, self._respect)
        self.byte_budget.acquire(len(body))
        return FetchedImage(body, target.url)

    async def _robots_rules(self, target: Target, time_budget: "_TimeBudget") -> RobotsRules:
        """The rules of an origin; concurrent callers share one request."""
        origin = target.origin
        rules = self._robots.get(origin, time.monotonic())
        if rules is not None:
            return rules
        if origin not in self._robots_tasks:
            task = asyncio.create_task(self._fetch_robots(origin, time_budget))
            self._robots_tasks[origin] = task
            task.add_done_callback(lambda _: self._robots_tasks.pop(origin))
        return await asyncio.shield(self._robots_tasks[origin])

    async def _fetch_robots(self, origin: str, time_budget: "_TimeBudget") -> RobotsRules:
        seconds = min(_MAX_ROBOTS_SECONDS, time_budget.remaining())
        own_budget = _TimeBudget(seconds)
        try:
            rules = await self._follow_redirects(
                f"{origin}/robots.txt", own_budget, self._robots_request
            )
        except FetchError as error:
            if error.kind in _UNREACHABLE_KINDS:
                raise
            rules = RobotsRules()
        finally:
            time_budget.seconds -= seconds - own_budget.seconds
        self._robots.put(origin, rules, time.monotonic())
        return rules

    def _min_delay(self, host: str) -> float:
        """Seconds between our requests to `host`: its Crawl-delay or the recipe's, the larger.

        The recipe's delay is not for a server that `connect_to` names in place of the host.
        """
        origins = (f"{scheme}://{host}" for scheme in ("http", "https"))
        cached = (self._robots.get(origin, time.monotonic()) for origin in origins)
        delays = [rules.delay for rules in cached if rules]
        if not self._router.override(host):
            delays += (d for p, d in self._politeness.delay.items() if fnmatchcase(host, p))
        return self._workers * max(delays, default=0.0)

    def _has_room(self) -> bool:
        """True if one more request may be in flight."""
        in_flight = self._limiter.in_flight
        if in_flight >= self._politeness.concurrency:
            return False
        expected = (in_flight + 1) * self._transport.mean_bytes
        if in_flight and self.byte_budget.used + expected > _MAX_EXPECTED_BYTES:
            self._schedule_poll()
            return False
        return True

    def _schedule_poll(self) -> None:
        if not self._is_polling:
            self._is_polling = True
            self.loop.call_later(_POLL_SECONDS, self._poll)

    def _poll(self) -> None:
        self._is_polling = False
        self._limiter.start_ready()

    async def _open_transport(self, agent: str) -> CurlTransport:
        politeness = self._politeness
        return CurlTransport(agent, politeness.least_rate, politeness.concurrency, self.byte_budget)

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._transport.close()
        self._router.close()

    def _run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()


@contextmanager
def fetch_client(politeness: Fetch, images: Images, workers: int = 1) -> Iterator[FetchClient]:
    """The client of this process for these settings.

    It stays open for the next caller with the same settings, with its connections, resolved names
    and the state of hosts, unless requests are still in flight or another client was opened since.
    """
    proxies = tuple(environment_proxies().items())
    key = (politeness.model_dump_json(), images.max_bytes, tuple(images.respect), proxies, workers)
    if key not in _cached_clients:
        _close_cached_clients()
        _cached_clients[key] = FetchClient(
            politeness, images.max_bytes, images.respect, workers=workers
        )
    try:
        yield _cached_clients[key]
    finally:
        if key in _cached_clients and not _cached_clients[key].is_idle():
            _close_cached_clients()


def _raise_open_file_limit(count: int) -> None:
    """Raise the soft limit of open files to `count`, which the hard limit often allows."""
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
class _TimeBudget:
    """Seconds that the requests for one URL may still take."""

    seconds: float

    def remaining(self) -> float:
        """The seconds left.

        Raises:
            FetchError: `timeout` if there are none.
        """
        if self.seconds <= 0:
            raise FetchError("timeout", "no whole answer in the time allowed")
        return self.seconds

    @contextmanager
    def spend(self) -> Iterator[float]:
        """The seconds left; the duration of the context is subtracted from them."""
        remaining = self.remaining()
        started = time.monotonic()
        try:
            yield remaining
        finally:
            self.seconds -= time.monotonic() - started


@dataclass(frozen=True)
class _RequestKind(Generic[_Result]):
    """How a request for an image differs from one for robots.txt.

    Args:
        check_target: raises FetchError for a URL, also of a redirect, that is not requested.
        max_bytes: bytes of the body to read, given the head.
        parse: the result of the last response.
        accepts_partial: the beginning of a body that is too long is used.
    """

    check_target: Callable[[Target, _TimeBudget], Coroutine[Any, Any, None]]
    max_bytes: Callable[[ResponseHead], int]
    parse: Callable[[Target, Response], _Result]
    accepts_partial: bool = False


@dataclass(frozen=True)
class _Redirect:
    location: str


async def _allow_target(_target: Target, _time_budget: _TimeBudget) -> None:
    """Allow every URL."""


@contextmanager
def _recording_failure(permit: Permit) -> Iterator[None]:
    """Record a failure of the host in the permit."""
    try:
        yield
    except FetchError as error:
        if error.kind in {"connect", "dns", "timeout"}:
            is_connect = isinstance(error, ConnectError)
            permit.kind = error.kind
            permit.result = RequestResult.UNREACHABLE if is_connect else RequestResult.INCOMPLETE
        raise


@atexit.register
def _close_cached_clients() -> None:
    while _cached_clients:
        _cached_clients.popitem()[1].close()
