"""HTTP servers on loopback with prepared responses, and clients that connect to them."""

import asyncio
import functools
import http.server
import socket
import threading
from contextlib import contextmanager, suppress

import pytest

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.reasons import FAILURE_REASONS
from pmd_pipeline.images.fetch.client import FetchClient
from pmd_pipeline.images.fetch.rate_limiter import Clock
from pmd_pipeline.recipe import Fetch

BODY = b"\xff\xd8 not really a picture \xff\xd9"


class FakeHost:
    """A server whose response is bytes, or a function that returns bytes for the head of a request.

    The function may also return a function of the connection, which sends what it likes.
    `requests` has the head of each request, `connections` is their number so far.
    """

    def __init__(self, response, tls=None):
        self._response = response
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.origin = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        self.requests = []
        self.connections = 0
        self._open = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    @property
    def paths(self):
        return [request.split(" ")[1] for request in self.requests]

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection):
        with connection, suppress(OSError):  # the client may have closed it
            if self._tls:
                connection = self._tls.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
            self._open.append(connection)
            with connection:
                self._respond(connection)

    def _respond(self, connection):
        if self._tls:
            connection.do_handshake()
        with connection.makefile("rb") as lines:
            while head := self._read_head(lines):
                self.requests.append(head)
                content = self._response
                content = content(head) if callable(content) else content
                if callable(content):
                    content(connection)
                    return
                connection.sendall(content)
                if b"Connection: close" in content:
                    return

    @staticmethod
    def _read_head(lines):
        head = b""
        while line := lines.readline():
            if line == b"\r\n":
                return head.decode("latin-1")
            head += line
        return ""


def response(status=200, body=BODY, **headers):
    """The bytes of a response; an empty header is left out."""
    headers = {"Content_Length": len(body), **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items() if value != ""]
    return "\r\n".join([f"HTTP/1.1 {status} x", *lines, "", ""]).encode("latin-1") + body


def redirect(location, status=302, body=b"moved"):
    return response(status, body, Location=location)


def by_path(responses):
    return lambda head: responses[head.split(" ")[1]]


def in_sequence(*responses):
    remaining = iter(responses)
    return lambda _head: next(remaining)


def drip(head):
    """Sends `head`, then one byte at a time, slowly."""

    def send(connection):
        connection.sendall(head)
        while True:
            connection.sendall(b"a")
            pause.wait(0.05)

    pause = threading.Event()
    return lambda _head: send


class FakeClock(Clock):
    """A clock that advances only by waiting; `waits` are the seconds."""

    def __init__(self, waits=None):
        self.time = 1000.0
        self.waits = [] if waits is None else waits

    def now(self):
        return self.time

    def call_later(self, seconds, callback):
        self.waits.append(seconds)
        self.time += seconds
        asyncio.get_running_loop().call_soon(callback)


CLIENTS = []
"""Clients that `new_client` made; `conftest.py` closes them."""


def new_client(politeness=None, max_bytes=1000, respect=(), clock=None, workers=1):
    client = FetchClient(politeness or Fetch(), max_bytes, respect, clock or FakeClock(), workers)
    CLIENTS.append(client)
    return client


def client_for(host, waits=None, max_bytes=1000, respect=(), workers=1, **politeness):
    """A client that connects to `host` for every URL."""
    politeness = {"connect_to": {"*": host.origin}, **politeness}
    return new_client(Fetch(**politeness), max_bytes, respect, FakeClock(waits), workers)


def failure_kind(client, url="http://a.example/1.jpg"):
    with pytest.raises(RecordError) as caught:
        client.get(url)
    assert caught.value.kind in FAILURE_REASONS
    return caught.value.kind


def failure_detail(client, url="http://a.example/1.jpg"):
    with pytest.raises(RecordError) as caught:
        client.get(url)
    return caught.value.detail


@contextmanager
def serve_folder(folder, num_requests=None):
    """The origin of a file server; requests are counted by path in the Counter `num_requests`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if num_requests is not None:
                num_requests[self.path] += 1
            super().do_GET()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
