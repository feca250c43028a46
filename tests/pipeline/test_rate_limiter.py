"""Rate limits: never too many requests, never too early, in order, each host apart."""

import asyncio
import math
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_host import (
    BODY,
    FakeClock,
    FakeHost,
    client_for,
    failure_kind,
    in_sequence,
    new_client,
    response,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pmd_pipeline.images.fetch import rate_limiter
from pmd_pipeline.images.fetch.rate_limiter import (
    MAX_COOLDOWNS,
    MAX_FAILURES,
    MAX_OFFLINE_SECONDS,
    MAX_WAIT_SECONDS,
    OFFLINE_FAILURES,
    Clock,
    HostQueues,
    HostUnavailable,
    RateLimiter,
    RequestResult,
)
from pmd_pipeline.recipe import Fetch


def started(queues, name="a", now=0.0):
    permit = queues.enqueue(name, now)
    assert queues.try_start(permit, now) == 0
    return permit


def finish(queues, permit, result, now=0.0, kind="connect", retry_after=None):
    permit.result, permit.kind, permit.retry_after = result, kind, retry_after
    queues.finish(permit, now)


def num_free(queues, name="a", now=0.0):
    """Requests that the host may have in flight in addition."""
    permits = []
    while True:
        permit = queues.enqueue(name, now)
        if queues.try_start(permit, now):
            queues.leave(permit)
            break
        permits.append(permit)
    for permit in permits:
        finish(queues, permit, RequestResult.NOT_SENT, now)
    return len(permits)


def wait_seconds(queues, name="a", now=0.0):
    permit = queues.enqueue(name, now)
    try:
        seconds = queues.try_start(permit, now)
    finally:
        queues.leave(permit)
    if seconds == 0:
        finish(queues, permit, RequestResult.NOT_SENT, now)
    return seconds


def fail(queues, times, result=RequestResult.INCOMPLETE, now=0.0):
    for _ in range(times):
        finish(queues, started(queues, now=now), result, now)


def after_cooldowns(queues, times):
    """The time at the start of the last of so many cooldowns in a row."""
    now = 0.0
    fail(queues, MAX_FAILURES)
    for _ in range(times - 1):
        now += MAX_WAIT_SECONDS
        fail(queues, 1, now=now)
    return now


class Requests:
    """Requests in all states, with the invariants of their starts."""

    def __init__(self, most, delay):
        self.most, self.delay = most, delay
        self.queues = HostQueues(most, lambda _: delay)
        self.now = 0.0
        self.waiting, self.active, self.blocked_until, self.last_start = [], [], {}, {}

    def enqueue(self, name):
        self.waiting.append(self.queues.enqueue(name, self.now))

    def finish(self, number, result, retry_after):
        if self.active:
            permit = self.active.pop(number % len(self.active))
            if result is RequestResult.BUSY and retry_after is not None:
                until = self.now + retry_after
                self.blocked_until[permit.host] = max(self.blocked_until.get(permit.host, 0), until)
            finish(self.queues, permit, result, self.now, retry_after=retry_after)

    def start_all(self):
        """Try to start every request, the last first, until none starts."""
        progress = True
        while progress:
            progress = False
            for permit in self.waiting[::-1]:
                try:
                    seconds = self.queues.try_start(permit, self.now)
                except HostUnavailable:
                    self.queues.leave(permit)
                    self.waiting.remove(permit)
                    continue
                if seconds == 0:
                    self.start(permit)
                    progress = True

    def start(self, permit):
        assert next(t for t in self.waiting if t.host == permit.host) is permit
        assert self.now >= self.blocked_until.get(permit.host, 0)
        assert self.now >= self.last_start.get(permit.host, -math.inf) + self.delay
        self.waiting.remove(permit)
        self.active.append(permit)
        self.last_start[permit.host] = self.now
        assert sum(t.host == permit.host for t in self.active) <= self.most


names = st.sampled_from("abc")
steps = st.one_of(
    st.tuples(st.just("enqueue"), names),
    st.tuples(
        st.just("finish"),
        st.integers(0, 9),
        st.sampled_from(RequestResult),
        st.none() | st.integers(0, 100),
    ),
    st.tuples(st.just("wait"), st.floats(0, 100)),
)


@settings(max_examples=300)
@given(st.integers(1, 4), st.sampled_from([0.0, 1.5]), st.lists(steps, max_size=60))
def test_requests_are_never_too_many_never_too_early_and_first_in_first_out(most, delay, taken):
    requests = Requests(most, delay)

    for step, *details in taken:
        if step == "enqueue":
            requests.enqueue(*details)
        elif step == "finish":
            requests.finish(*details)
        else:
            requests.now += details[0]
        requests.start_all()

    for _ in range(len(taken) * 2):  # every request finishes
        while requests.active:
            requests.finish(0, RequestResult.ANSWERED, None)
        requests.now += MAX_OFFLINE_SECONDS
        requests.start_all()
    assert not requests.waiting


def test_a_busy_response_halves_the_limit_once_for_all_in_flight():
    queues = HostQueues(8)
    for permit in [started(queues) for _ in range(8)]:
        finish(queues, permit, RequestResult.BUSY, now=1, kind="http_429", retry_after=0)

    assert num_free(queues, now=2) == 4


def test_the_limit_grows_by_one_for_each_round_of_responses():
    queues = HostQueues(8)
    for now in range(5):
        finish(queues, started(queues, now=now), RequestResult.BUSY, now, retry_after=0)
    assert num_free(queues, now=5) == 1

    limits = []
    for _ in range(40):
        finish(queues, started(queues, now=5), RequestResult.ANSWERED, 5)
        limits.append(num_free(queues, now=5))

    assert limits == sorted(limits)
    assert limits[0] == 2
    assert limits[:5].count(3) >= 2
    assert limits[-1] == 8


def test_retry_after_blocks_all_requests_to_the_host_and_no_other():
    queues = HostQueues(4)
    finish(queues, started(queues), RequestResult.BUSY, retry_after=20)
    finish(queues, started(queues, "b"), RequestResult.ANSWERED)

    assert wait_seconds(queues, now=5) == 15
    assert wait_seconds(queues, "b", now=5) == 0
    assert wait_seconds(queues, now=20) == 0


def test_a_shorter_retry_after_does_not_end_a_longer_one():
    queues = HostQueues(4)
    first, second, third = (started(queues) for _ in range(3))
    finish(queues, first, RequestResult.BUSY, retry_after=20)
    finish(queues, second, RequestResult.BUSY, retry_after=1)
    finish(queues, third, RequestResult.ANSWERED)

    assert wait_seconds(queues) == 20


def test_backoff_doubles_up_to_its_limit_without_retry_after():
    queues, now, waits = HostQueues(1), 0.0, []
    for _ in range(9):
        finish(queues, started(queues, now=now), RequestResult.BUSY, now)
        waits.append(wait_seconds(queues, now=now))
        now += waits[-1]

    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_retry_after_beyond_the_limit_makes_the_host_unavailable():
    queues = HostQueues(4)
    finish(
        queues,
        started(queues),
        RequestResult.BUSY,
        kind="http_429",
        retry_after=MAX_WAIT_SECONDS + 10,
    )

    with pytest.raises(HostUnavailable, match="http_429"):
        wait_seconds(queues)
    assert wait_seconds(queues, now=10) == MAX_WAIT_SECONDS


def test_requests_to_a_host_respect_the_minimum_delay():
    queues = HostQueues(4, {"a": 2.0, "b": 0.0}.__getitem__)
    started(queues)
    started(queues, "b")

    assert wait_seconds(queues, now=0.5) == 1.5
    assert wait_seconds(queues, "b", now=0.5) == 0


def test_the_circuit_opens_after_failures_and_then_allows_one_probe():
    queues = HostQueues(4)
    finish(queues, started(queues), RequestResult.ANSWERED)
    fail(queues, MAX_FAILURES - 1)
    assert wait_seconds(queues) == 0
    fail(queues, 1)

    rest = wait_seconds(queues)
    assert rest > 0
    assert num_free(queues, now=rest) == 1


def test_one_response_closes_the_circuit():
    queues = HostQueues(4)
    now = after_cooldowns(queues, 3) + MAX_WAIT_SECONDS
    finish(queues, started(queues, now=now), RequestResult.ANSWERED, now)

    fail(queues, MAX_FAILURES - 1, now=now)

    assert wait_seconds(queues, now=now) == 0


def test_cooldowns_double_up_to_the_longest_wait():
    waits = []
    for rests in range(1, MAX_COOLDOWNS + 1):
        queues = HostQueues(4)
        finish(queues, started(queues), RequestResult.ANSWERED)
        now = after_cooldowns(queues, rests)
        waits.append(wait_seconds(queues, now=now))

    assert waits == [15, 30, 60, 60, 60, 60]


def test_a_host_that_never_answered_is_not_waited_for():
    queues = HostQueues(4)
    now = after_cooldowns(queues, 1)

    with pytest.raises(HostUnavailable, match="connect"):
        wait_seconds(queues, now=now)


def test_a_host_that_answered_is_waited_for_a_limited_number_of_cooldowns():
    queues = HostQueues(4)
    finish(queues, started(queues), RequestResult.ANSWERED)
    now = after_cooldowns(queues, MAX_COOLDOWNS + 1)

    with pytest.raises(HostUnavailable):
        wait_seconds(queues, now=now)
    probe = started(queues, now=now + MAX_WAIT_SECONDS)
    with pytest.raises(HostUnavailable):
        wait_seconds(queues, now=now + MAX_WAIT_SECONDS)
    finish(queues, probe, RequestResult.ANSWERED, now + MAX_WAIT_SECONDS)
    assert wait_seconds(queues, now=now + MAX_WAIT_SECONDS) == 0


def test_requests_in_flight_when_the_circuit_opens_add_no_cooldown():
    queues = HostQueues(20)
    finish(queues, started(queues), RequestResult.ANSWERED)
    for permit in [started(queues) for _ in range(20)]:
        finish(queues, permit, RequestResult.INCOMPLETE, now=1)

    assert wait_seconds(queues, now=1) == 15
    assert num_free(queues, now=16) == 1


def test_requests_in_flight_at_a_busy_response_count_as_one_failure():
    queues = HostQueues(20)
    for permit in [started(queues) for _ in range(20)]:
        finish(queues, permit, RequestResult.BUSY, now=1, retry_after=0)

    assert num_free(queues, now=1) == 10


def fail_to_connect(queues, names, now=0.0):
    for name in names:
        finish(queues, started(queues, name, now), RequestResult.UNREACHABLE, now)


def test_many_unreachable_hosts_and_no_response_mean_a_network_outage():
    queues = HostQueues(4)
    finish(queues, started(queues, "reachable"), RequestResult.ANSWERED)
    fail_to_connect(queues, range(OFFLINE_FAILURES - 1))
    assert not queues.is_offline()
    fail_to_connect(queues, [OFFLINE_FAILURES - 1])

    assert queues.is_offline()
    assert wait_seconds(queues, "reachable") == wait_seconds(queues, "new") == 5
    assert wait_seconds(queues, "new", now=5) == 0


def test_requests_in_flight_at_an_outage_make_the_pause_no_longer():
    queues = HostQueues(4)
    for permit in [started(queues, name) for name in range(5 * OFFLINE_FAILURES)]:
        finish(queues, permit, RequestResult.UNREACHABLE, now=1)

    assert wait_seconds(queues, "new", now=1) == 5


def test_a_response_in_between_means_no_outage():
    queues = HostQueues(4)
    fail_to_connect(queues, range(OFFLINE_FAILURES - 1))
    finish(queues, started(queues, "reachable"), RequestResult.ANSWERED)
    fail_to_connect(queues, range(OFFLINE_FAILURES - 1))

    assert not queues.is_offline()


def test_one_unreachable_host_is_no_outage():
    queues = HostQueues(4)
    for name in "bcd":
        finish(queues, started(queues, name), RequestResult.ANSWERED)
    fail_to_connect(queues, ["a"] * MAX_FAILURES)

    assert not queues.is_offline()
    with pytest.raises(HostUnavailable):
        wait_seconds(queues)


def test_an_outage_ends_with_a_response():
    queues = HostQueues(4)
    fail_to_connect(queues, range(OFFLINE_FAILURES))
    finish(queues, started(queues, "reachable", 5), RequestResult.ANSWERED, 5)

    assert not queues.is_offline()
    assert wait_seconds(queues, "new", now=5) == 0


def test_an_outage_is_waited_for_up_to_the_limit_then_failures_count():
    queues = HostQueues(4)
    fail_to_connect(queues, range(OFFLINE_FAILURES))
    now = 0.0
    while queues.is_offline() and now < 2 * MAX_OFFLINE_SECONDS:
        now += wait_seconds(queues, "new", now)
        fail_to_connect(queues, ["new"], now)

    assert now <= MAX_OFFLINE_SECONDS
    assert now + MAX_WAIT_SECONDS > MAX_OFFLINE_SECONDS
    fail_to_connect(queues, ["new"] * (MAX_FAILURES - 1), now + MAX_WAIT_SECONDS)
    with pytest.raises(HostUnavailable):
        wait_seconds(queues, "new", now + MAX_WAIT_SECONDS)


def test_hosts_without_limiting_state_are_forgotten(monkeypatch):
    monkeypatch.setattr(rate_limiter, "_MAX_HOSTS", 5)
    queues = HostQueues(4)
    finish(queues, started(queues, "blocked"), RequestResult.BUSY, retry_after=50)
    started(queues, "busy")

    for number in range(100):
        finish(queues, started(queues, number), RequestResult.ANSWERED)

    assert len(queues._hosts) <= 5
    assert wait_seconds(queues, "blocked") == 50
    assert num_free(queues, "busy") == 3


def new_limiter(queues, has_room=lambda: True):
    return RateLimiter(queues, Clock(), has_room)


def test_the_next_request_starts_when_one_finishes():
    order = []

    async def send(limiter, number):
        async with limiter.permit("a") as permit:
            order.append(number)
            await asyncio.sleep(0)
            permit.result = RequestResult.ANSWERED

    async def send_all():
        limiter = new_limiter(HostQueues(1))
        await asyncio.gather(*[send(limiter, number) for number in range(6)])

    asyncio.run(send_all())

    assert order == list(range(6))


def test_hosts_take_turns_for_the_shared_room():
    order, in_flight, peaks = [], [], []

    async def send(limiter, host):
        async with limiter.permit(host) as permit:
            order.append(host)
            in_flight.append(host)
            peaks.append(len(in_flight))
            await asyncio.sleep(0)
            in_flight.remove(host)
            permit.result = RequestResult.ANSWERED

    async def send_all():
        limiter = new_limiter(HostQueues(8), lambda: limiter.in_flight < 2)
        await asyncio.gather(*[send(limiter, host) for host in "aaaaaaaabc"])

    asyncio.run(send_all())

    assert max(peaks) == 2
    assert set(order[:5]) == {"a", "b", "c"}


def test_all_waiting_requests_start_at_once_when_the_network_is_back():
    async def send(limiter, host, result):
        async with limiter.permit(host) as permit:
            permit.result, permit.kind = result, "connect"

    async def send_all():
        queues = HostQueues(2)
        limiter = new_limiter(queues)
        first = limiter.permit("reachable")
        permit = await first.__aenter__()
        for number in range(OFFLINE_FAILURES):
            await send(limiter, str(number), RequestResult.UNREACHABLE)
        assert queues.is_offline()
        late = asyncio.create_task(send(limiter, "late", RequestResult.ANSWERED))
        await asyncio.sleep(0)
        permit.result = RequestResult.ANSWERED
        await first.__aexit__(None, None, None)
        await asyncio.wait_for(late, 1)

    asyncio.run(send_all())


def test_a_url_waits_for_the_retry_after_of_another():
    waits = []
    with FakeHost(in_sequence(response(429, Retry_After="40"), response())) as host:
        client = client_for(host, waits, retries=0)

        assert failure_kind(client) == "http_429"
        assert waits == []
        assert client.get("http://a.example/2.jpg").body == BODY

    assert waits == [40]


def test_an_unreachable_host_gets_no_more_requests_but_others_do():
    with FakeHost(response()) as closed:
        pass
    waits = []
    with FakeHost(response()) as host:
        servers = {"dead.example": closed.origin, "*": host.origin}
        client = client_for(host, waits, retries=0, connect_to=servers)
        for number in range(30):
            assert client.get(f"http://{number}.example/").body == BODY
            assert failure_kind(client, f"http://dead.example/{number}") == "connect"

    assert waits == []
    assert client._limiter._queues._hosts["dead.example"].failures == MAX_FAILURES


def test_an_outage_fails_only_the_requests_that_reveal_it(monkeypatch):
    resolve, lookups, waits = socket.getaddrinfo, [], []

    def fail_at_first(*args, **keywords):
        lookups.append(args)
        if len(lookups) <= OFFLINE_FAILURES + 3:
            raise socket.gaierror(socket.EAI_AGAIN, "no name server")
        return resolve("127.0.0.1", None, **keywords)

    with FakeHost(response()) as host:
        servers = {"*": f"http://somewhere.example:{host.port}"}
        client = client_for(host, waits, retries=0, connect_to=servers)
        monkeypatch.setattr(socket, "getaddrinfo", fail_at_first)
        for number in range(OFFLINE_FAILURES - 1):
            assert failure_kind(client, f"http://{number}.example/") == "dns"
        for number in range(OFFLINE_FAILURES):
            assert client.get(f"http://reachable-{number}.example/").body == BODY

    assert waits == [5, 10, 20, 40]


def test_a_long_outage_fails_in_the_end(monkeypatch):
    def fail_at_first(*_args, **_keywords):
        raise socket.gaierror(socket.EAI_AGAIN, "no name server")

    monkeypatch.setattr(socket, "getaddrinfo", fail_at_first)
    clock = FakeClock()
    client = new_client(clock=clock)

    kinds = {
        failure_kind(client, f"http://{number}.example/") for number in range(2 * OFFLINE_FAILURES)
    }

    assert kinds == {"dns"}
    assert MAX_OFFLINE_SECONDS <= sum(clock.waits) <= 2 * MAX_OFFLINE_SECONDS


def test_the_recipes_delay_is_for_the_hosts_that_it_names():
    client = new_client(Fetch(delay={"*.imgur.com": 0.5}))

    assert client._min_delay("i.imgur.com") == 0.5
    assert client._min_delay("imgur.example") == 0
    with FakeHost(response()) as host:
        assert client_for(host, delay={"*": 0.5})._min_delay("i.imgur.com") == 0


@pytest.mark.slow
@pytest.mark.parametrize("rate", [10, 40])
def test_a_host_with_a_rate_limit_serves_all_and_its_retry_after_is_respected(rate):
    requested, refused = [], []

    def limited(head):
        now = time.monotonic()
        requested.append(now)
        if sum(now - 1 < one for one in requested if one not in refused) > rate:
            refused.append(now)
            return response(429, Retry_After="1")
        return response()

    urls = [f"http://a.example/{number}.jpg" for number in range(5 * rate)]
    with FakeHost(limited) as host, ThreadPoolExecutor(64) as pool:
        client = new_client(Fetch(connect_to={"*": host.origin}), clock=Clock())
        bodies = [fetched.body for fetched in pool.map(client.get, urls)]

    early = [(no, one) for no in refused for one in requested if no + 0.2 < one < no + 1]
    assert bodies == [BODY] * len(urls)
    assert refused
    assert not early
