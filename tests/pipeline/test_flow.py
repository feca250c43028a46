"""Laws of the flow: in order, each key once, nobody keeps others waiting, memory is bounded."""

import asyncio
import random
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmd_pipeline.build import reorder_buffer as piles
from pmd_pipeline.build.pipeline import FetchPipeline
from pmd_pipeline.build.reorder_buffer import ReorderBuffer
from pmd_pipeline.contract.errors import PmdError, RecordError
from pmd_pipeline.contract.image_format import JPEG
from pmd_pipeline.images.decode.processor import ImageResult
from pmd_pipeline.images.decode.stored_image import StoredImage
from pmd_pipeline.images.fetch.byte_budget import ByteBudget
from pmd_pipeline.images.fetch.client import FetchedImage


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def drawn(_item, found):
    if isinstance(found, RecordError):
        return ImageResult(status="failed_to_download", reason=found.kind)
    return ImageResult(StoredImage(found.body, JPEG, 1, 1))


def flow_of(loop, ask, **changes):
    memory = ByteBudget(1 << 30)

    async def asked(item):
        found = await ask(item)
        memory.acquire(len(found.body))
        return found

    return FetchPipeline(loop, memory, asked, drawn, **{"ahead": 20, "per_host": 2, **changes})


def no_host(_item):
    return None


@settings(max_examples=50, deadline=None)
@given(
    hosts=st.lists(st.sampled_from("abc") | st.none(), max_size=40),
    ahead=st.integers(1, 12),
    per_host=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_outcomes_come_in_order_and_no_host_is_asked_by_more_than_it_may(
    loop, hosts, ahead, per_host, seed
):
    now, most, dice = Counter(), Counter(), random.Random(seed)

    async def ask(item):
        number, host = item
        now[host] += 1
        now["all"] += 1
        most[host] = max(most[host], now[host])
        most["all"] = max(most["all"], now["all"])
        for _ in range(dice.randrange(4)):
            await asyncio.sleep(0)
        now[host] -= 1
        now["all"] -= 1
        if number % 5 == 4:
            raise RecordError("http_404", "")
        return FetchedImage(b"%d" % number)

    flow = flow_of(loop, ask, ahead=ahead, per_host=per_host)
    items = list(enumerate(hosts))

    outcomes = list(flow.outcomes(items, lambda item: item[1], lambda item: item[0]))

    assert len(outcomes) == len(items)
    for (number, _), outcome in zip(items, outcomes, strict=True):
        if number % 5 == 4:
            assert outcome.reason == "http_404"
        else:
            assert outcome.image.content == b"%d" % number
    assert most["all"] <= ahead
    assert all(most[host] <= per_host for host in "abc")
    assert flow.memory.used == 0


def test_a_host_that_stalls_does_not_stall_the_others(loop):
    others, done = asyncio.Event(), []

    async def ask(item):
        if item[1] == "slow":
            await asyncio.wait_for(others.wait(), 10)
        else:
            done.append(item)
            if len(done) == 8:
                others.set()
        return FetchedImage(b"%d" % item[0])

    items = list(enumerate(["slow"] * 8 + list(range(8))))
    flow = flow_of(loop, ask, ahead=4)

    outcomes = flow.outcomes(items, lambda item: str(item[1]), lambda item: item)

    assert [int(outcome.image.content) for outcome in outcomes] == list(range(16))


def test_what_several_items_share_is_asked_for_once(loop):
    asked = []

    async def ask(item):
        asked.append(item)
        return FetchedImage(item.encode())

    items = ["a", "b", "a", "c", "a", "b"]

    outcomes = list(flow_of(loop, ask).outcomes(items, no_host, str))

    assert [outcome.image.content.decode() for outcome in outcomes] == items
    assert sorted(asked) == ["a", "b", "c"]


def test_one_that_is_slow_keeps_nobody_waiting_and_takes_no_memory(loop, monkeypatch, tmp_path):
    monkeypatch.setattr("pmd_pipeline.build.pipeline._PILED", 1000)
    others, done, held = asyncio.Event(), [], []

    async def ask(number):
        if number == 0:
            await asyncio.wait_for(others.wait(), 10)
        else:
            done.append(number)
            if len(done) == 199:
                others.set()
        return FetchedImage(b"%100d" % number)

    put = ReorderBuffer.put

    def watched(pile, number, outcome):
        put(pile, number, outcome)
        held.append(sum(len(one.image.content) for one in pile._outcomes.values()))

    monkeypatch.setattr(ReorderBuffer, "put", watched)
    flow = flow_of(loop, ask, ahead=10, folder=str(tmp_path))

    outcomes = list(flow.outcomes(range(200), no_host, int))

    assert [int(outcome.image.content) for outcome in outcomes] == list(range(200))
    assert max(held) == 1000


@pytest.mark.parametrize("error", [ZeroDivisionError, PmdError])
def test_an_error_that_is_no_records_flies(loop, error):
    async def ask(item):
        raise error

    with pytest.raises(error):
        list(flow_of(loop, ask).outcomes(range(100), no_host, int))


def test_an_error_in_making_flies(loop):
    async def ask(item):
        return FetchedImage(b"")

    def make(_item, found):
        raise ZeroDivisionError

    flow = FetchPipeline(loop, ByteBudget(1), ask, make, ahead=3, per_host=1)

    with pytest.raises(ZeroDivisionError):
        list(flow.outcomes(range(100), no_host, int))


def test_who_stops_listening_stops_the_asking(loop):
    asked = []

    async def ask(item):
        asked.append(item)
        await asyncio.sleep(0)
        return FetchedImage(b"")

    outcomes = flow_of(loop, ask, ahead=5).outcomes(range(10_000), no_host, int)
    next(outcomes)
    outcomes.close()
    before = len(asked)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), loop).result()

    assert len(asked) == before < 10_000


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=20),
    st.integers(0, 500),
    st.integers(0, 99),
)
def test_a_pile_gives_back_what_was_put(sizes, limit, seed):
    dice = random.Random(seed)
    uses = [dice.randrange(1, 4) for _ in sizes]
    takes = [number for number, count in enumerate(uses) for _ in range(count)]
    dice.shuffle(takes)
    contents = [dice.randbytes(size) for size in sizes]

    with ReorderBuffer(dict(enumerate(uses)), None, limit) as pile:
        for number, content in enumerate(contents):
            pile.put(number, ImageResult(StoredImage(content, JPEG, 1, 1)))
            assert pile._held <= limit
        for number in takes:
            assert pile.take(number).image.content == contents[number]

        assert not pile._outcomes
        assert pile._held == 0


def test_a_pile_that_finds_no_room_says_so(monkeypatch, tmp_path):
    def full(*_args, **_keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(piles.tempfile, "TemporaryFile", full)
    with (
        ReorderBuffer({0: 1}, str(tmp_path), 0) as pile,
        pytest.raises(PmdError, match="No space left"),
    ):
        pile.put(0, ImageResult(StoredImage(b"a", JPEG, 1, 1)))
