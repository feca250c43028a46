"""The fetch pipeline keeps the order, fetches each key once, and bounds requests and memory."""

import asyncio
import random
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmd_pipeline.contract.errors import PmdError, RecordError
from pmd_pipeline.contract.image_format import JPEG
from pmd_pipeline.images.decode.processor import ImageResult
from pmd_pipeline.images.decode.stored_image import StoredImage
from pmd_pipeline.images.fetch.byte_budget import ByteBudget
from pmd_pipeline.images.fetch.client import FetchedImage
from pmd_pipeline.shards.pipeline import FetchPipeline
from pmd_pipeline.shards.reorder_buffer import ReorderBuffer


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def process(_item, fetched):
    if isinstance(fetched, RecordError):
        return ImageResult(status="failed_to_download", reason=fetched.kind)
    return ImageResult(StoredImage(fetched.body, JPEG, 1, 1))


def pipeline_of(loop, fetch, **options):
    """A pipeline whose `fetch` acquires the bytes that it returns."""
    byte_budget = ByteBudget(1 << 30)

    async def fetch_within_budget(item):
        fetched = await fetch(item)
        byte_budget.acquire(len(fetched.body))
        return fetched

    limits = {"max_in_flight": 20, "max_per_host": 2, **options}
    return FetchPipeline(loop, byte_budget, fetch_within_budget, process, **limits)


def no_host(_item):
    return None


@settings(max_examples=50, deadline=None)
@given(
    hosts=st.lists(st.sampled_from("abc") | st.none(), max_size=40),
    max_in_flight=st.integers(1, 12),
    max_per_host=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_results_come_in_order_and_fetches_stay_within_their_limits(
    loop, hosts, max_in_flight, max_per_host, seed
):
    now, peak, rng = Counter(), Counter(), random.Random(seed)

    async def fetch(item):
        number, host = item
        now[host] += 1
        now["all"] += 1
        peak[host] = max(peak[host], now[host])
        peak["all"] = max(peak["all"], now["all"])
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        now[host] -= 1
        now["all"] -= 1
        if number % 5 == 4:
            raise RecordError("http_404", "")
        return FetchedImage(b"%d" % number)

    pipeline = pipeline_of(loop, fetch, max_in_flight=max_in_flight, max_per_host=max_per_host)
    items = list(enumerate(hosts))

    results = list(pipeline.results(items, lambda item: item[1], lambda item: item[0]))

    assert len(results) == len(items)
    for (number, _), result in zip(items, results, strict=True):
        if number % 5 == 4:
            assert result.reason == "http_404"
        else:
            assert result.image.content == b"%d" % number
    assert peak["all"] <= max_in_flight
    assert all(peak[host] <= max_per_host for host in "abc")
    assert pipeline.byte_budget.used == 0


def test_a_host_that_stalls_does_not_stall_the_others(loop):
    others_done, done = asyncio.Event(), []

    async def fetch(item):
        if item[1] == "slow":
            await asyncio.wait_for(others_done.wait(), 10)
        else:
            done.append(item)
            if len(done) == 8:
                others_done.set()
        return FetchedImage(b"%d" % item[0])

    items = list(enumerate(["slow"] * 8 + list(range(8))))
    pipeline = pipeline_of(loop, fetch, max_in_flight=4)

    results = pipeline.results(items, lambda item: str(item[1]), lambda item: item)

    assert [int(result.image.content) for result in results] == list(range(16))


def test_items_of_one_key_are_fetched_once(loop):
    fetched = []

    async def fetch(item):
        fetched.append(item)
        return FetchedImage(item.encode())

    items = ["a", "b", "a", "c", "a", "b"]

    results = list(pipeline_of(loop, fetch).results(items, no_host, str))

    assert [result.image.content.decode() for result in results] == items
    assert sorted(fetched) == ["a", "b", "c"]


def test_a_slow_item_stalls_no_other_and_the_results_behind_it_go_to_disk(
    loop, monkeypatch, tmp_path
):
    monkeypatch.setattr("pmd_pipeline.shards.pipeline._MAX_BUFFERED_BYTES", 1000)
    others_done, done, buffered_bytes = asyncio.Event(), [], []

    async def fetch(number):
        if number == 0:
            await asyncio.wait_for(others_done.wait(), 10)
        else:
            done.append(number)
            if len(done) == 199:
                others_done.set()
        return FetchedImage(b"%100d" % number)

    put = ReorderBuffer.put

    def measured_put(buffer, number, result):
        put(buffer, number, result)
        buffered_bytes.append(sum(len(one.image.content) for one in buffer._results.values()))

    monkeypatch.setattr(ReorderBuffer, "put", measured_put)
    pipeline = pipeline_of(loop, fetch, max_in_flight=10, folder=str(tmp_path))

    results = list(pipeline.results(range(200), no_host, int))

    assert [int(result.image.content) for result in results] == list(range(200))
    assert max(buffered_bytes) == 1000


@pytest.mark.parametrize("error", [ZeroDivisionError, PmdError])
def test_an_error_of_a_fetch_that_is_no_record_error_is_raised(loop, error):
    async def fetch(item):
        raise error

    with pytest.raises(error):
        list(pipeline_of(loop, fetch).results(range(100), no_host, int))


def test_an_error_of_processing_is_raised(loop):
    async def fetch(item):
        return FetchedImage(b"")

    def failing_process(_item, fetched):
        raise ZeroDivisionError

    pipeline = FetchPipeline(
        loop, ByteBudget(1), fetch, failing_process, max_in_flight=3, max_per_host=1
    )

    with pytest.raises(ZeroDivisionError):
        list(pipeline.results(range(100), no_host, int))


def test_closing_the_results_ends_the_fetches(loop):
    fetched = []

    async def fetch(item):
        fetched.append(item)
        await asyncio.sleep(0)
        return FetchedImage(b"")

    results = pipeline_of(loop, fetch, max_in_flight=5).results(range(10_000), no_host, int)
    next(results)
    results.close()
    num_before = len(fetched)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), loop).result()

    assert len(fetched) == num_before < 10_000
