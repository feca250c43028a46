"""A server for all hosts of the sample world, on one port of this machine."""

import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pmd_pipeline.demo.world.responses import (
    REMOVED,
    UNAVAILABLE,
    SampleResponse,
    placeholder,
    respond,
)
from pmd_pipeline.demo.world.world import World


@contextmanager
def serve(world: World) -> Iterator[str]:
    """Serve the world's images while the context lasts; gives the origin, `http://127.0.0.1:PORT`.

    The host is that of the `Host` header, as with the recipe's
    `connect_to = {"*" = "http://127.0.0.1:PORT"}`. A response depends only on host and path, except
    for those that fail at the first attempt.
    """
    with _Server(world) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.hang_up()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for the threads, once their connections have ended
    request_queue_size = 256

    def __init__(self, world: World) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self._world = world
        self._requested: set[str] = set()
        self._lock = threading.Lock()
        self._open: set[Any] = set()

    def response_to(self, address: str) -> SampleResponse:
        """The response to a request for `address` (host and path)."""
        if address in {REMOVED, UNAVAILABLE}:
            return placeholder()
        entry = self._world.web.get(address)
        if entry is None:
            return SampleResponse(HTTPStatus.NOT_FOUND)
        with self._lock:
            first = address not in self._requested
            self._requested.add(address)
        return respond(entry.response, address, entry.scene, first=first)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as above it
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 - as above it
        with self._lock:
            self._open.discard(request)
        self.close_request(request)  # without the shutdown before it, which a reset does not have

    def hang_up(self) -> None:
        """End the connections that clients keep alive, so that their threads end."""
        with self._lock:
            for request in self._open:
                try:
                    request.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # the client has closed it

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as above it
        """Ignore a client that closes its connection; print other errors."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "sample"
    sys_version = ""
    wbufsize = 1 << 16  # one packet for headers and body, because delayed acknowledgements are slow
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        response = self.server.response_to(self.headers.get("Host", "").lower() + self.path)
        if response.status is None:
            self._reset()
            return
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        self.wfile.write(response.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401
        """Log nothing."""

    def _reset(self) -> None:
        """Close the connection with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
