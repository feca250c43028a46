"""Transfers and their byte budget: bodies wait for it without timing out, and release all bytes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_host import FakeHost, client_for, failure_kind, response

from pmd_pipeline.images.fetch import client as client_module

LARGE = bytes(range(256)) * 1000


@pytest.fixture
def small_budget(monkeypatch):
    """A budget below one large body."""
    monkeypatch.setattr(client_module, "_MAX_BODY_BYTES", len(LARGE) // 2)


def test_bodies_above_the_budget_arrive_one_after_the_other(small_budget):
    with FakeHost(response(body=LARGE)) as host, ThreadPoolExecutor(8) as pool:
        client = client_for(host, max_bytes=1 << 20)
        urls = [f"http://a.example/{number}.jpg" for number in range(24)]
        bodies = [fetched.body for fetched in pool.map(client.get, urls)]

        assert bodies == [LARGE] * 24
        assert client.is_idle()


def test_a_body_waits_for_the_budget_without_timing_out(
    small_budget,
):
    with FakeHost(response(body=LARGE)) as host, ThreadPoolExecutor(1) as pool:
        client = client_for(host, max_bytes=1 << 20, timeout=0.3)
        client.byte_budget.acquire(len(LARGE) // 2)  # as by a slow decoder
        waiting = pool.submit(client.get, "http://a.example/1.jpg")
        threading.Event().wait(0.6)

        assert not waiting.done()
        client.byte_budget.release(len(LARGE) // 2)
        assert waiting.result(5).body == LARGE
        assert client.is_idle()


@pytest.mark.parametrize(
    "failure",
    [
        response(404, LARGE[:5000]),
        response(body=LARGE[:900], Content_Length=1000, Connection="close"),
        response(body=b""),
        response(body=b"x" * 5000),
        response(body=b"x" * 5000, Content_Length=""),
        response(302, b"moved", Location="/again"),
    ],
)
def test_a_failed_response_releases_all_its_bytes(failure):
    with FakeHost(failure) as host:
        client = client_for(host, retries=0)
        failure_kind(client)

        assert client.is_idle()


def test_a_stated_length_acquires_no_bytes_in_advance():
    started, finish = threading.Event(), threading.Event()

    def drip(connection):
        connection.sendall(response(body=b"a", Content_Length=60 << 20))
        started.set()
        finish.wait(5)

    with FakeHost(lambda _head: drip) as host, ThreadPoolExecutor(1) as pool:
        client = client_for(host, max_bytes=64 << 20, retries=0)
        future = pool.submit(failure_kind, client)
        started.wait(5)
        while not client.byte_budget.used:
            pass
        used = client.byte_budget.used
        finish.set()

        assert future.result(5) == "connect"
        assert used < 1 << 20
        assert client.is_idle()


def test_a_closed_client_leaves_no_thread():
    before = threading.active_count()
    with FakeHost(response()) as host:
        client = client_for(host)
        client.get("http://a.example/1.jpg")
        client.close()
        client.close()

    assert threading.active_count() == before
