"""Hosts on loopback to be asked, and how tests ask them."""

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


class Host:
    """A host whose answers are bytes, or functions that are given the connection.

    `requests` has the head of each request, `connections` their number so far.
    """

    def __init__(self, answer, tls=None):
        self._answer = answer
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
            self._threads.append(threading.Thread(target=self._talk, args=(connection,)))
            self._threads[-1].start()

    def _talk(self, connection):
        with connection, suppress(OSError):  # the client may be gone
            if self._tls:
                connection = self._tls.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                )
            self._open.append(connection)
            with connection:
                self._converse(connection)

    def _converse(self, connection):
        if self._tls:
            connection.do_handshake()
        with connection.makefile("rb") as lines:
            while head := self._head(lines):
                self.requests.append(head)
                answer = self._answer
                answer = answer(head) if callable(answer) else answer
                if callable(answer):
                    answer(connection)
                    return
                connection.sendall(answer)
                if b"Connection: close" in answer:
                    return

    @staticmethod
    def _head(lines):
        head = b""
        while line := lines.readline():
            if line == b"\r\n":
                return head.decode("latin-1")
            head += line
        return ""


def answer(status=200, body=BODY, **headers):
    headers = {"Content_Length": len(body), **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items() if value != ""]
    return "\r\n".join([f"HTTP/1.1 {status} x", *lines, "", ""]).encode("latin-1") + body


def redirect(to, status=302, body=b"moved"):
    return answer(status, body, Location=to)


def by_path(answers):
    return lambda head: answers[head.split(" ")[1]]


def in_turn(*answers):
    left = iter(answers)
    return lambda _head: next(left)


def drip(head):
    """Sends `head`, then a byte whenever the client may have given up hope."""

    def send(connection):
        connection.sendall(head)
        while True:
            connection.sendall(b"a")
            pause.wait(0.05)

    pause = threading.Event()
    return lambda _head: send


class Still(Clock):
    """Time that passes only by waiting; `waits` are the seconds."""

    def __init__(self, waits=None):
        self.time = 1000.0
        self.waits = [] if waits is None else waits

    def now(self):
        return self.time

    def later(self, seconds, what):
        self.waits.append(seconds)
        self.time += seconds
        asyncio.get_running_loop().call_soon(what)


CLIENTS = []
"""Clients that were made here and must be closed."""


def new_web(manners=None, max_bytes=1000, respect=(), clock=None, workers=1):
    made = FetchClient(manners or Fetch(), max_bytes, respect, clock or Still(), workers)
    CLIENTS.append(made)
    return made


def web(host, waits=None, max_bytes=1000, respect=(), workers=1, **manners):
    manners = {"connect_to": {"*": host.origin}, **manners}
    return new_web(Fetch(**manners), max_bytes, respect, Still(waits), workers)


def kind_of(client, url="http://a.example/1.jpg"):
    with pytest.raises(RecordError) as caught:
        client.get(url)
    assert caught.value.kind in FAILURE_REASONS
    return caught.value.kind


def detail_of(client, url="http://a.example/1.jpg"):
    with pytest.raises(RecordError) as caught:
        client.get(url)
    return caught.value.detail


@contextmanager
def served(folder, asked=None):
    """The origin of a server of files; the Counter `asked` is told every path."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if asked is not None:
                asked[self.path] += 1
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
