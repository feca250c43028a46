"""Laws of asking: never too many, never too early, everybody in turn, no host stalls another."""

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


def begun(hosts, name="a", now=0.0):
    turn = hosts.enqueue(name, now)
    assert hosts.try_start(turn, now) == 0
    return turn


def ended(hosts, turn, ending, now=0.0, kind="connect", retry_after=None):
    turn.result, turn.kind, turn.retry_after = ending, kind, retry_after
    hosts.finish(turn, now)


def room(hosts, name="a", now=0.0):
    """How many more requests the host may have in flight."""
    turns = []
    while True:
        turn = hosts.enqueue(name, now)
        if hosts.try_start(turn, now):
            hosts.leave(turn)
            break
        turns.append(turn)
    for turn in turns:
        ended(hosts, turn, RequestResult.NOT_SENT, now)
    return len(turns)


def wait_of(hosts, name="a", now=0.0):
    turn = hosts.enqueue(name, now)
    try:
        seconds = hosts.try_start(turn, now)
    finally:
        hosts.leave(turn)
    if seconds == 0:
        ended(hosts, turn, RequestResult.NOT_SENT, now)
    return seconds


def in_trouble(hosts, times, ending=RequestResult.INCOMPLETE, now=0.0):
    for _ in range(times):
        ended(hosts, begun(hosts, now=now), ending, now)


def rested(hosts, times):
    """The time after so many rests in a row, none of which helped."""
    now = 0.0
    in_trouble(hosts, MAX_FAILURES)
    for _ in range(times - 1):
        now += MAX_WAIT_SECONDS
        in_trouble(hosts, 1, now=now)
    return now


class Requests:
    """Requests that come, begin and end, and what must be true of them at all times."""

    def __init__(self, most, delay):
        self.most, self.delay = most, delay
        self.hosts = HostQueues(most, lambda _: delay)
        self.now = 0.0
        self.waiting, self.active, self.held, self.last = [], [], {}, {}

    def come(self, name):
        self.waiting.append(self.hosts.enqueue(name, self.now))

    def end(self, number, ending, retry_after):
        if self.active:
            turn = self.active.pop(number % len(self.active))
            if ending is RequestResult.BUSY and retry_after is not None:
                until = self.now + retry_after
                self.held[turn.host] = max(self.held.get(turn.host, 0), until)
            ended(self.hosts, turn, ending, self.now, retry_after=retry_after)

    def look(self):
        """Call everybody, the last first, until nobody goes any more; how many went."""
        went = 0
        progress = True
        while progress:
            progress = False
            for turn in self.waiting[::-1]:
                try:
                    seconds = self.hosts.try_start(turn, self.now)
                except HostUnavailable:
                    self.hosts.leave(turn)
                    self.waiting.remove(turn)
                    continue
                if seconds == 0:
                    self.begin(turn)
                    progress = True
                    went += 1
        return went

    def begin(self, turn):
        assert next(t for t in self.waiting if t.host == turn.host) is turn
        assert self.now >= self.held.get(turn.host, 0)
        assert self.now >= self.last.get(turn.host, -math.inf) + self.delay
        self.waiting.remove(turn)
        self.active.append(turn)
        self.last[turn.host] = self.now
        assert sum(t.host == turn.host for t in self.active) <= self.most


names = st.sampled_from("abc")
steps = st.one_of(
    st.tuples(st.just("come"), names),
    st.tuples(
        st.just("end"),
        st.integers(0, 9),
        st.sampled_from(RequestResult),
        st.none() | st.integers(0, 100),
    ),
    st.tuples(st.just("pass"), st.floats(0, 100)),
)


@settings(max_examples=300)
@given(st.integers(1, 4), st.sampled_from([0.0, 1.5]), st.lists(steps, max_size=60))
def test_never_too_many_never_too_early_and_everybody_in_turn(most, delay, taken):
    requests = Requests(most, delay)

    for step, *details in taken:
        if step == "come":
            requests.come(*details)
        elif step == "end":
            requests.end(*details)
        else:
            requests.now += details[0]
        requests.look()

    for _ in range(len(taken) * 2):  # everybody gets an end
        while requests.active:
            requests.end(0, RequestResult.ANSWERED, None)
        requests.now += MAX_OFFLINE_SECONDS
        requests.look()
    assert not requests.waiting


def test_a_busy_host_is_asked_by_half_as_many_once_for_all_in_flight():
    hosts = HostQueues(8)
    for turn in [begun(hosts) for _ in range(8)]:
        ended(hosts, turn, RequestResult.BUSY, now=1, kind="http_429", retry_after=0)

    assert room(hosts, now=2) == 4


def test_a_host_that_answers_is_asked_by_one_more_after_each_round():
    hosts = HostQueues(8)
    for now in range(5):
        ended(hosts, begun(hosts, now=now), RequestResult.BUSY, now, retry_after=0)
    assert room(hosts, now=5) == 1

    rooms = []
    for _ in range(40):
        ended(hosts, begun(hosts, now=5), RequestResult.ANSWERED, 5)
        rooms.append(room(hosts, now=5))

    assert rooms == sorted(rooms)
    assert rooms[0] == 2
    assert rooms[:5].count(3) >= 2
    assert rooms[-1] == 8


def test_what_one_request_is_told_to_wait_is_waited_by_all_and_by_no_other_host():
    hosts = HostQueues(4)
    ended(hosts, begun(hosts), RequestResult.BUSY, retry_after=20)
    ended(hosts, begun(hosts, "b"), RequestResult.ANSWERED)

    assert wait_of(hosts, now=5) == 15
    assert wait_of(hosts, "b", now=5) == 0
    assert wait_of(hosts, now=20) == 0


def test_a_shorter_wait_does_not_end_a_longer_one():
    hosts = HostQueues(4)
    first, second, third = (begun(hosts) for _ in range(3))
    ended(hosts, first, RequestResult.BUSY, retry_after=20)
    ended(hosts, second, RequestResult.BUSY, retry_after=1)
    ended(hosts, third, RequestResult.ANSWERED)

    assert wait_of(hosts) == 20


def test_a_busy_host_that_names_no_time_is_left_alone_longer_each_time():
    hosts, now, waits = HostQueues(1), 0.0, []
    for _ in range(9):
        ended(hosts, begun(hosts, now=now), RequestResult.BUSY, now)
        waits.append(wait_of(hosts, now=now))
        now += waits[-1]

    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_host_that_wants_more_time_than_there_is_is_given_up_until_then():
    hosts = HostQueues(4)
    ended(
        hosts, begun(hosts), RequestResult.BUSY, kind="http_429", retry_after=MAX_WAIT_SECONDS + 10
    )

    with pytest.raises(HostUnavailable, match="http_429"):
        wait_of(hosts)
    assert wait_of(hosts, now=10) == MAX_WAIT_SECONDS


def test_requests_to_a_host_keep_their_distance():
    hosts = HostQueues(4, {"a": 2.0, "b": 0.0}.__getitem__)
    begun(hosts)
    begun(hosts, "b")

    assert wait_of(hosts, now=0.5) == 1.5
    assert wait_of(hosts, "b", now=0.5) == 0


def test_a_host_in_trouble_is_left_alone_and_then_asked_by_one():
    hosts = HostQueues(4)
    ended(hosts, begun(hosts), RequestResult.ANSWERED)
    in_trouble(hosts, MAX_FAILURES - 1)
    assert wait_of(hosts) == 0
    in_trouble(hosts, 1)

    rest = wait_of(hosts)
    assert rest > 0
    assert room(hosts, now=rest) == 1


def test_one_answer_brings_a_host_back():
    hosts = HostQueues(4)
    now = rested(hosts, 3) + MAX_WAIT_SECONDS
    ended(hosts, begun(hosts, now=now), RequestResult.ANSWERED, now)

    in_trouble(hosts, MAX_FAILURES - 1, now=now)

    assert wait_of(hosts, now=now) == 0


def test_rests_grow_to_the_longest_wait():
    waits = []
    for rests in range(1, MAX_COOLDOWNS + 1):
        hosts = HostQueues(4)
        ended(hosts, begun(hosts), RequestResult.ANSWERED)
        now = rested(hosts, rests)
        waits.append(wait_of(hosts, now=now))

    assert waits == [15, 30, 60, 60, 60, 60]


def test_a_host_that_never_worked_is_not_waited_for():
    hosts = HostQueues(4)
    now = rested(hosts, 1)

    with pytest.raises(HostUnavailable, match="connect"):
        wait_of(hosts, now=now)


def test_a_host_that_worked_is_waited_for_only_so_long():
    hosts = HostQueues(4)
    ended(hosts, begun(hosts), RequestResult.ANSWERED)
    now = rested(hosts, MAX_COOLDOWNS + 1)

    with pytest.raises(HostUnavailable):
        wait_of(hosts, now=now)
    probe = begun(hosts, now=now + MAX_WAIT_SECONDS)
    with pytest.raises(HostUnavailable):
        wait_of(hosts, now=now + MAX_WAIT_SECONDS)
    ended(hosts, probe, RequestResult.ANSWERED, now + MAX_WAIT_SECONDS)
    assert wait_of(hosts, now=now + MAX_WAIT_SECONDS) == 0


def test_those_in_flight_at_a_rest_make_no_further_rests():
    hosts = HostQueues(20)
    ended(hosts, begun(hosts), RequestResult.ANSWERED)
    for turn in [begun(hosts) for _ in range(20)]:
        ended(hosts, turn, RequestResult.INCOMPLETE, now=1)

    assert wait_of(hosts, now=1) == 15
    assert room(hosts, now=16) == 1


def test_those_in_flight_at_a_refusal_are_one_trouble():
    hosts = HostQueues(20)
    for turn in [begun(hosts) for _ in range(20)]:
        ended(hosts, turn, RequestResult.BUSY, now=1, retry_after=0)

    assert room(hosts, now=1) == 10


def silence(hosts, names, now=0.0):
    for name in names:
        ended(hosts, begun(hosts, name, now), RequestResult.UNREACHABLE, now)


def test_many_silent_hosts_and_no_answer_mean_that_the_network_is_offline():
    hosts = HostQueues(4)
    ended(hosts, begun(hosts, "well"), RequestResult.ANSWERED)
    silence(hosts, range(OFFLINE_FAILURES - 1))
    assert not hosts.is_offline()
    silence(hosts, [OFFLINE_FAILURES - 1])

    assert hosts.is_offline()
    assert wait_of(hosts, "well") == wait_of(hosts, "new") == 5
    assert wait_of(hosts, "new", now=5) == 0


def test_those_in_flight_when_the_network_is_cut_make_no_longer_pause():
    hosts = HostQueues(4)
    for turn in [begun(hosts, name) for name in range(5 * OFFLINE_FAILURES)]:
        ended(hosts, turn, RequestResult.UNREACHABLE, now=1)

    assert wait_of(hosts, "new", now=1) == 5


def test_an_answer_between_means_that_it_is_not():
    hosts = HostQueues(4)
    silence(hosts, range(OFFLINE_FAILURES - 1))
    ended(hosts, begun(hosts, "well"), RequestResult.ANSWERED)
    silence(hosts, range(OFFLINE_FAILURES - 1))

    assert not hosts.is_offline()


def test_one_dead_host_among_others_is_its_own_trouble():
    hosts = HostQueues(4)
    for name in "bcd":
        ended(hosts, begun(hosts, name), RequestResult.ANSWERED)
    silence(hosts, ["a"] * MAX_FAILURES)

    assert not hosts.is_offline()
    with pytest.raises(HostUnavailable):
        wait_of(hosts)


def test_a_cut_network_ends_with_an_answer():
    hosts = HostQueues(4)
    silence(hosts, range(OFFLINE_FAILURES))
    ended(hosts, begun(hosts, "well", 5), RequestResult.ANSWERED, 5)

    assert not hosts.is_offline()
    assert wait_of(hosts, "new", now=5) == 0


def test_a_cut_network_is_waited_for_only_so_long_and_then_failures_count():
    hosts = HostQueues(4)
    silence(hosts, range(OFFLINE_FAILURES))
    now = 0.0
    while hosts.is_offline() and now < 2 * MAX_OFFLINE_SECONDS:
        now += wait_of(hosts, "new", now)
        silence(hosts, ["new"], now)

    assert now <= MAX_OFFLINE_SECONDS
    assert now + MAX_WAIT_SECONDS > MAX_OFFLINE_SECONDS
    silence(hosts, ["new"] * (MAX_FAILURES - 1), now + MAX_WAIT_SECONDS)
    with pytest.raises(HostUnavailable):
        wait_of(hosts, "new", now + MAX_WAIT_SECONDS)


def test_hosts_without_a_past_are_forgotten(monkeypatch):
    monkeypatch.setattr(rate_limiter, "_MAX_HOSTS", 5)
    hosts = HostQueues(4)
    ended(hosts, begun(hosts, "held"), RequestResult.BUSY, retry_after=50)
    begun(hosts, "asked")

    for number in range(100):
        ended(hosts, begun(hosts, number), RequestResult.ANSWERED)

    assert len(hosts._hosts) <= 5
    assert wait_of(hosts, "held") == 50
    assert room(hosts, "asked") == 3


def turns_of(hosts, has_room=lambda: True):
    return RateLimiter(hosts, Clock(), has_room)


def test_who_waits_goes_when_another_ends():
    order = []

    async def ask(turns, number):
        async with turns.permit("a") as turn:
            order.append(number)
            await asyncio.sleep(0)
            turn.result = RequestResult.ANSWERED

    async def ask_all():
        turns = turns_of(HostQueues(1))
        await asyncio.gather(*[ask(turns, number) for number in range(6)])

    asyncio.run(ask_all())

    assert order == list(range(6))


def test_no_host_keeps_the_room_that_all_share():
    order, now, most = [], [], []

    async def ask(turns, host):
        async with turns.permit(host) as turn:
            order.append(host)
            now.append(host)
            most.append(len(now))
            await asyncio.sleep(0)
            now.remove(host)
            turn.result = RequestResult.ANSWERED

    async def ask_all():
        turns = turns_of(HostQueues(8), lambda: turns.in_flight < 2)
        await asyncio.gather(*[ask(turns, host) for host in "aaaaaaaabc"])

    asyncio.run(ask_all())

    assert max(most) == 2
    assert set(order[:5]) == {"a", "b", "c"}


def test_a_network_that_is_back_is_asked_at_once_by_all_who_waited():
    async def ask(turns, host, ending):
        async with turns.permit(host) as turn:
            turn.result, turn.kind = ending, "connect"

    async def ask_all():
        hosts = HostQueues(2)
        turns = turns_of(hosts)
        first = turns.permit("well")
        went = await first.__aenter__()
        for number in range(OFFLINE_FAILURES):
            await ask(turns, str(number), RequestResult.UNREACHABLE)
        assert hosts.is_offline()
        late = asyncio.create_task(ask(turns, "late", RequestResult.ANSWERED))
        await asyncio.sleep(0)
        went.result = RequestResult.ANSWERED
        await first.__aexit__(None, None, None)
        await asyncio.wait_for(late, 1)

    asyncio.run(ask_all())


def test_a_url_waits_as_long_as_another_was_told_to():
    waits = []
    with FakeHost(in_sequence(response(429, Retry_After="40"), response())) as host:
        client = client_for(host, waits, retries=0)

        assert failure_kind(client) == "http_429"
        assert waits == []
        assert client.get("http://a.example/2.jpg").body == BODY

    assert waits == [40]


def test_a_dead_host_is_asked_no_more_and_others_are():
    with FakeHost(response()) as gone:
        pass
    waits = []
    with FakeHost(response()) as host:
        places = {"dead.example": gone.origin, "*": host.origin}
        client = client_for(host, waits, retries=0, connect_to=places)
        for number in range(30):
            assert client.get(f"http://{number}.example/").body == BODY
            assert failure_kind(client, f"http://dead.example/{number}") == "connect"

    assert waits == []
    assert client._limiter._queues._hosts["dead.example"].failures == MAX_FAILURES


def test_a_cut_network_loses_no_more_than_showed_it(monkeypatch):
    lead, asked, waits = socket.getaddrinfo, [], []

    def cut(*args, **keywords):
        asked.append(args)
        if len(asked) <= OFFLINE_FAILURES + 3:
            raise socket.gaierror(socket.EAI_AGAIN, "no name server")
        return lead("127.0.0.1", None, **keywords)

    with FakeHost(response()) as host:
        places = {"*": f"http://somewhere.example:{host.port}"}
        client = client_for(host, waits, retries=0, connect_to=places)
        monkeypatch.setattr(socket, "getaddrinfo", cut)
        for number in range(OFFLINE_FAILURES - 1):
            assert failure_kind(client, f"http://{number}.example/") == "dns"
        for number in range(OFFLINE_FAILURES):
            assert client.get(f"http://well-{number}.example/").body == BODY

    assert waits == [5, 10, 20, 40]


def test_a_network_that_stays_cut_is_a_failure_at_last(monkeypatch):
    def cut(*_args, **_keywords):
        raise socket.gaierror(socket.EAI_AGAIN, "no name server")

    monkeypatch.setattr(socket, "getaddrinfo", cut)
    clock = FakeClock()
    client = new_client(clock=clock)

    kinds = {
        failure_kind(client, f"http://{number}.example/") for number in range(2 * OFFLINE_FAILURES)
    }

    assert kinds == {"dns"}
    assert MAX_OFFLINE_SECONDS <= sum(clock.waits) <= 2 * MAX_OFFLINE_SECONDS


def test_the_least_delay_is_for_the_hosts_that_the_recipe_names():
    client = new_client(Fetch(delay={"*.imgur.com": 0.5}))

    assert client._min_delay("i.imgur.com") == 0.5
    assert client._min_delay("imgur.example") == 0
    with FakeHost(response()) as host:
        assert client_for(host, delay={"*": 0.5})._min_delay("i.imgur.com") == 0


@pytest.mark.slow
@pytest.mark.parametrize("rate", [10, 40])
def test_a_host_that_bears_so_many_a_second_gives_all_and_is_asked_by_nobody_too_early(rate):
    asked, refused = [], []

    def limited(head):
        now = time.monotonic()
        asked.append(now)
        if sum(now - 1 < one for one in asked if one not in refused) > rate:
            refused.append(now)
            return response(429, Retry_After="1")
        return response()

    urls = [f"http://a.example/{number}.jpg" for number in range(5 * rate)]
    with FakeHost(limited) as host, ThreadPoolExecutor(64) as pool:
        client = new_client(Fetch(connect_to={"*": host.origin}), clock=Clock())
        bodies = [fetched.body for fetched in pool.map(client.get, urls)]

    early = [(no, one) for no in refused for one in asked if no + 0.2 < one < no + 1]
    assert bodies == [BODY] * len(urls)
    assert refused
    assert not early
