"""The HTTP client, over real sockets to servers on loopback."""

import asyncio
import gzip
import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_host import (
    BODY,
    FakeHost,
    by_path,
    client_for,
    failure_detail,
    failure_kind,
    in_sequence,
    new_client,
    redirect,
    response,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pmd_pipeline.contract.errors import PmdError, RecordError
from pmd_pipeline.contract.reasons import FAILURE_REASONS
from pmd_pipeline.images.fetch import client as client_module
from pmd_pipeline.images.fetch import responses
from pmd_pipeline.images.fetch.client import FetchClient, fetch_client
from pmd_pipeline.recipe import Fetch, Images


def test_a_body_comes_with_its_final_url():
    with FakeHost(response()) as host:
        fetched = client_for(host).get("http://a.example/1.jpg")

    assert fetched.body == BODY
    assert fetched.final_url == "http://a.example/1.jpg"
    assert "Host: a.example\r\n" in host.requests[0]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "http_4xx"),
        (401, "http_4xx"),
        (403, "http_403"),
        (404, "http_404"),
        (410, "http_410"),
        (451, "http_4xx"),
        (304, "http_4xx"),
        (206, "http_4xx"),
        (999, "http_4xx"),
    ],
)
def test_a_final_response_is_not_retried(status, kind):
    body = b"" if status == 304 else BODY
    with FakeHost(response(status, body)) as host:
        assert failure_kind(client_for(host)) == kind

    assert len(host.requests) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_temporary_failure_is_retried(status):
    waits = []
    with FakeHost(in_sequence(response(status), response(status), response())) as host:
        fetched = client_for(host, waits).get("http://a.example/1.jpg")

    assert (fetched.body, fetched.attempts) == (BODY, 3)
    assert len(host.requests) == 3
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2


@pytest.mark.parametrize(("status", "kind"), [(503, "http_5xx"), (429, "http_429")])
def test_a_lasting_failure_ends_after_the_last_attempt(status, kind):
    with FakeHost(response(status)) as host, pytest.raises(RecordError) as caught:
        client_for(host, retries=3).get("http://a.example/1.jpg")

    assert (caught.value.kind, caught.value.attempts) == (kind, 4)
    assert len(host.requests) == 4


def test_retry_after_is_waited_for():
    waits = []
    with FakeHost(
        in_sequence(response(429, Retry_After="7"), response(503, Retry_After="0"), response())
    ) as host:
        client_for(host, waits).get("http://a.example/1.jpg")

    assert waits == [7]


def test_retry_after_may_be_a_date():
    waits = []
    past = response(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")
    future = response(429, Retry_After="Wed, 21 Oct 2115 07:28:00 GMT")
    with FakeHost(in_sequence(past, future)) as host:
        assert failure_kind(client_for(host, waits)) == "http_429"

    assert waits == []


def test_a_retry_after_beyond_the_limit_is_not_waited_for():
    waits = []
    with FakeHost(response(429, Retry_After="3600")) as host:
        assert failure_kind(client_for(host, waits)) == "http_429"

    assert waits == []


@pytest.mark.parametrize("value", ["soon", "-1", "²", "9" * 5000, "1e9", "Wed, 99 Foo"])
def test_an_invalid_retry_after_is_replaced_by_backoff(value):
    waits = []
    with FakeHost(in_sequence(response(503, Retry_After=value), response())) as host:
        client_for(host, waits).get("http://a.example/1.jpg")

    assert 0.5 <= waits[0] <= 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status):
    responses_by_path = {"/1.jpg": redirect("https://b.example:8443/2.jpg?x=1#y", status)}
    responses_by_path["/2.jpg?x=1"] = response()
    with FakeHost(by_path(responses_by_path)) as host:
        fetched = client_for(host).get("http://a.example/1.jpg")

    assert fetched.final_url == "https://b.example:8443/2.jpg?x=1"
    assert "Host: b.example:8443\r\n" in host.requests[1]


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("/x/2.jpg", "/x/2.jpg"),
        ("2.jpg", "/a/2.jpg"),
        ("../2.jpg", "/2.jpg"),
        ("?n=2", "/a/1.jpg?n=2"),
        ("//b.example/3.jpg", "/3.jpg"),
        ("/a b.jpg", "/a%20b.jpg"),
        ("/é.jpg", "/%C3%A9.jpg"),
        ("/é.jpg".encode().decode("latin-1"), "/%C3%A9.jpg"),
        ("/%C3%A9.jpg", "/%C3%A9.jpg"),
    ],
)
def test_a_redirect_may_be_relative_and_badly_spelled(location, path):
    responses_by_path = {"/a/1.jpg": redirect(location), path: response()}
    with FakeHost(by_path(responses_by_path)) as host:
        client_for(host).get("http://a.example/a/1.jpg")

    assert host.paths == ["/a/1.jpg", path]


@pytest.mark.parametrize(
    "removed",
    [
        "https://i.imgur.com/removed.png",
        "https://s.yimg.com/pw/images/en-us/photo_unavailable.png",
        "https://s.yimg.com/pw/images/photo_unavailable_l.png?x=1",
    ],
)
def test_the_url_of_a_placeholder_is_recognised(removed):
    with FakeHost(redirect(removed)) as host:
        assert failure_kind(client_for(host)) == "placeholder"

    assert len(host.requests) == 1


def test_the_bytes_of_a_placeholder_are_recognised(monkeypatch):
    removed = hashlib.md5(BODY, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(responses, "PLACEHOLDER_MD5", {removed})
    with FakeHost(response()) as host:
        assert failure_kind(client_for(host)) == "placeholder"


def test_a_body_whose_stated_length_is_too_large_is_not_read():
    received = []

    def send(connection):
        connection.sendall(response(body=b"", Content_Length=1 << 40))
        received.append(connection.recv(1))  # returns when the client closes

    with FakeHost(lambda _head: send) as host:
        assert failure_kind(client_for(host)) == "too_large"

    assert received == [b""]


def test_a_body_of_exactly_the_limit_is_accepted():
    with FakeHost(in_sequence(response(body=bytes(1000)), response(body=bytes(1001)))) as host:
        client = client_for(host)

        assert len(client.get("http://a.example/1.jpg").body) == 1000
        assert failure_kind(client) == "too_large"


@pytest.mark.parametrize("status", [200, 204])
def test_a_response_without_a_body_is_empty(status):
    with FakeHost(response(status, b"")) as host:
        assert failure_kind(client_for(host)) == "empty"


def test_a_chunked_body_is_joined():
    chunked = response(body=b"", Content_Length="", Transfer_Encoding="chunked")
    with FakeHost(chunked + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: 1\r\n\r\n") as host:
        client = client_for(host)

        assert [client.get("http://a.example/1.jpg").body for _ in range(2)] == [b"abcde"] * 2

    assert host.connections == 1


def test_a_host_that_does_not_listen_is_a_failure_to_connect():
    with FakeHost(response()) as host:
        client = client_for(host)

    assert failure_kind(client) == "connect"
    assert host.connections == 0


def test_waiting_for_a_permit_does_not_count_towards_the_timeout():
    pause = threading.Event()

    def slow(_head):
        pause.wait(0.2)
        return response()

    with FakeHost(slow) as host, ThreadPoolExecutor(5) as pool:
        client = client_for(host, per_host=1, timeout=0.5)
        bodies = list(pool.map(client.get, ["http://a.example/1.jpg"] * 5))

    assert [fetched.body for fetched in bodies] == [BODY] * 5


def test_the_user_agent_has_our_name_and_the_contact():
    with FakeHost(response()) as host:
        client_for(host, contact="mailto:us@lab.example").get("http://a.example/1.jpg")

    agent = next(line for line in host.requests[0].split("\r\n") if line.startswith("User-Agent: "))
    assert agent.startswith("User-Agent: pmd-flava/")
    assert "mailto:us@lab.example" in agent
    assert "Mozilla" not in agent


@pytest.mark.parametrize("contact", ["us\r\nX-Evil: 1", "jörg@lab.example"])
def test_a_contact_that_is_no_header_value_is_a_mistake_of_the_recipe(contact):
    with pytest.raises(PmdError, match=r"fetch\.contact"):
        FetchClient(Fetch(contact=contact), 1000)


def test_connections_are_reused():
    responses_by_path = {
        "/1.jpg": response(),
        "/gone.jpg": response(404, b"x" * 5000),
        "/moved.jpg": redirect("/1.jpg", body=b"x" * 5000),
    }
    with FakeHost(by_path(responses_by_path)) as host:
        client = client_for(host)
        for _ in range(3):
            assert client.get("http://a.example/1.jpg").body == BODY
            assert client.get("http://a.example/moved.jpg").body == BODY
            assert failure_kind(client, "http://a.example/gone.jpg") == "http_404"

    assert len(host.requests) == 12
    assert host.connections == 1


def test_the_body_of_a_redirect_is_not_read_as_the_next_response():
    responses_by_path = {
        "/1.jpg": redirect("/2.jpg", body=response(body=b"evil") * 5000),
        "/2.jpg": response(),
    }
    with FakeHost(by_path(responses_by_path)) as host:
        client = client_for(host)

        assert [client.get("http://a.example/1.jpg").body for _ in range(3)] == [BODY] * 3


def test_bytes_after_the_stated_length_are_discarded():
    with FakeHost(response() + response(body=b"evil")) as host:
        client = client_for(host, retries=0)

        for _ in range(3):
            assert client.get("http://a.example/1.jpg").body == BODY


def test_a_host_gets_at_most_per_host_requests_at_once():
    lock, pause = threading.Lock(), threading.Event()
    in_flight, peaks = [], []

    def busy(head):
        with lock:
            in_flight.append(head)
            peaks.append(len(in_flight))
        pause.wait(0.01)
        with lock:
            in_flight.remove(head)
        return response()

    urls = [f"http{'s' * (n % 2)}://a.example:{n % 3 + 80}/{n}.jpg" for n in range(60)]
    with FakeHost(busy) as host, ThreadPoolExecutor(16) as pool:
        client = client_for(host, per_host=3)
        list(pool.map(client.get, urls))

    assert max(peaks) == 3
    assert len(host.requests) == 60


def test_many_threads_each_get_their_own_bytes():
    def own(head):
        return response(body=head.split(" ")[1].encode())

    urls = [f"http://{n % 7}.example/{n}.jpg" for n in range(300)]
    with FakeHost(own) as host, ThreadPoolExecutor(16) as pool:
        client = client_for(host)
        fetched = list(pool.map(client.get, urls))

    assert [one.body.decode() for one in fetched] == [f"/{n}.jpg" for n in range(300)]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "1.jpg",
        "/etc/passwd",
        "file:///etc/passwd",
        "ftp://a.example/1.jpg",
        "http://",
        "http://someone@127.0.0.1/",
        "http://someone:secret@a.example/",
        "http://[::1",
        "http://a.example:99999/",
        "http://a.example:x/",
    ],
)
def test_a_url_that_is_not_http_is_blocked(url):
    with FakeHost(response()) as host:
        assert failure_kind(client_for(host), url) == "blocked_address"

    assert host.connections == 0


@pytest.mark.parametrize(
    "url", ["http://a..b/", "http://.a/", "http://a b/", f"http://{'a' * 64}/"]
)
def test_an_impossible_host_name_fails_as_dns(url):
    with FakeHost(response()) as host:
        assert failure_kind(client_for(host), url) == "dns"

    assert host.connections == 0


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://a.example/é b.jpg?q=ü x#f", "/%C3%A9%20b.jpg?q=%C3%BC%20x"),
        ("  HTTP://A.Example:80/x%20y%2Fz.jpg ", "/x%20y%2Fz.jpg"),
        ("http://a.example", "/"),
        ("http://a.example/日本/画像.jpg", "/%E6%97%A5%E6%9C%AC/%E7%94%BB%E5%83%8F.jpg"),
        ("http://bücher.example/1.jpg", "/1.jpg"),
        ("http://a_b.example./1.jpg", "/1.jpg"),
        ("http://[2606:4700::1111]/1.jpg", "/1.jpg"),
    ],
)
def test_urls_are_requested_whatever_their_spelling(url, path):
    with FakeHost(response()) as host:
        fetched = client_for(host).get(url)

    assert host.paths == [path]
    assert fetched.final_url.isascii()


@pytest.fixture(scope="module")
def any_host():
    with FakeHost(response()) as host, client_for(host) as client:
        yield client


@settings(max_examples=150, deadline=None)
@given(url=st.text(max_size=40) | st.from_regex(r"https?://[^/]{1,20}(/.{0,20})?"))
def test_no_url_raises_another_error(any_host, url):
    try:
        assert any_host.get(url).body == BODY
    except RecordError as error:
        assert error.kind in {"blocked_address", "dns"}  # noqa: PT017 - one of two ways


@pytest.fixture(scope="module")
def strange_host():
    contents = []
    send = lambda connection: connection.sendall(contents[-1])  # noqa: E731 - it is one line
    with FakeHost(lambda _head: send) as host, client_for(host, retries=0) as client:
        yield client, contents


headers = st.sampled_from(
    [b"Content-Length", b"Transfer-Encoding", b"Content-Encoding", b"Location", b"Retry-After"]
)
values = st.sampled_from([b"chunked", b"gzip", b"deflate", b"-1", b"\xb2"]) | st.binary(max_size=20)
strange_responses = st.builds(
    b"HTTP/1.1 %d OK\r\n%b: %b\r\n\r\n%b".__mod__,
    st.tuples(st.sampled_from([200, 302, 404, 503]), headers, values, st.binary(max_size=60)),
)


@settings(max_examples=150, deadline=None)
@given(content=strange_responses | st.binary(max_size=60))
def test_no_response_raises_another_error(strange_host, content):
    client, contents = strange_host
    contents.append(content)

    try:
        client.get("http://a.example/1.jpg")
    except RecordError as error:
        assert error.kind in FAILURE_REASONS  # noqa: PT017 - one of two ways


def test_a_compressed_body_is_decompressed():
    with FakeHost(response(body=gzip.compress(BODY), Content_Encoding="gzip")) as host:
        assert client_for(host).get("http://a.example/1.jpg").body == BODY

    assert "Accept-Encoding: identity\r\n" in host.requests[0]


def test_a_body_with_a_wrong_content_encoding_stays_as_it_is():
    with FakeHost(response(Content_Encoding="gzip")) as host:
        assert client_for(host).get("http://a.example/1.jpg").body == BODY


@pytest.mark.parametrize(
    "failure",
    [
        response(503),
        response(Content_Length=len(BODY) + 9, Connection="close"),
        response(body=bytes(1001)),
        response(body=b""),
        redirect("file:///etc/passwd"),
        redirect("/again"),
    ],
)
def test_details_of_failures_are_the_same_on_every_run(failure):
    details = set()
    for _ in range(2):
        with FakeHost(failure) as host:
            details.add(failure_detail(client_for(host)))

    detail = details.pop()
    assert not details
    assert not any(word in detail for word in (str(host.port), "127.0.0.1", "0x", " at "))


def test_the_detail_of_a_failed_connection_is_the_same_on_every_run():
    details = set()
    for _ in range(2):
        with FakeHost(response()) as host:
            client = client_for(host)
        details.add(failure_detail(client))

    assert details == {"no connection to a.example"}


@pytest.mark.parametrize(("workers", "most"), [(1, 8), (3, 2), (8, 1), (100, 1)])
def test_the_limits_of_a_host_hold_for_the_sum_over_workers(workers, most):
    in_flight = peak = 0
    lock, all_here = threading.Lock(), threading.Event()

    def slow(_head):
        nonlocal in_flight, peak
        with lock:
            in_flight += 1
            peak = max(peak, in_flight)
            if in_flight == most:
                all_here.set()
        all_here.wait(5)
        time.sleep(0.02)  # time for a request too many to arrive
        with lock:
            in_flight -= 1
        return response()

    async def fetch_all(client):
        await asyncio.gather(*(client.fetch(f"http://a.example/{n}.jpg") for n in range(24)))

    with FakeHost(slow) as host:
        client = client_for(host, workers=workers, per_host=8)
        asyncio.run_coroutine_threadsafe(fetch_all(client), client.loop).result()
        client.byte_budget.release(24 * len(BODY))

    assert peak == most
    client = new_client(Fetch(delay={"*.imgur.com": 0.5}), workers=workers)
    assert client._min_delay("i.imgur.com") == 0.5 * workers


def test_the_cached_client_is_reused_unless_its_settings_differ_or_it_is_not_idle():
    with fetch_client(Fetch(), Images()) as first:
        pass
    with fetch_client(Fetch(), Images()) as again:
        again.byte_budget.acquire(1)  # and never releases it
    with fetch_client(Fetch(), Images()) as fresh:
        pass
    with fetch_client(Fetch(timeout=1), Images()) as other:
        pass

    assert first is again
    assert fresh is not first
    assert first.loop.is_closed()
    assert fresh.loop.is_closed()
    assert not other.loop.is_closed()


def test_the_limit_of_open_files_is_raised_and_too_many_are_a_mistake(monkeypatch):
    limits = [(300, 1000)]
    monkeypatch.setattr(client_module.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(client_module.resource, "setrlimit", lambda _, both: limits.append(both))

    client_module._raise_open_file_limit(256)
    client_module._raise_open_file_limit(700)

    assert limits == [(300, 1000), (700, 1000)]
    with pytest.raises(PmdError, match=r"fetch\.concurrency needs 1001 open files"):
        client_module._raise_open_file_limit(1001)
