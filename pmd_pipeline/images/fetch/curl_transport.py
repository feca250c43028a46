"""Concurrent HTTP requests over libcurl; the only module that uses it.

Everything here runs on the thread of one event loop. robots.txt, redirects and rate limits are in
`FetchClient`.
"""

import asyncio
import selectors
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import certifi
import pycurl

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.images.fetch.addresses import is_public
from pmd_pipeline.images.fetch.byte_budget import ByteBudget
from pmd_pipeline.images.fetch.errors import ConnectError, FetchError
from pmd_pipeline.images.fetch.routes import Route

MAX_CONNECT_SECONDS = 10.0

_BUFFER_BYTES = 1 << 18
_SUPPRESS_CONNECT_HEADERS = 265  # pycurl lacks the name
_LOW_SPEED_SECONDS = 15
_MAX_HEADER_BYTES = 1 << 18
_GRANT_BYTES = 1 << 18
"""Bytes of the budget that a body may acquire before they have arrived."""

_INITIAL_MEAN_BYTES = 1 << 18
_SOCKET_POLL_SECONDS = 0.005
"""Interval at which sockets are read: the cost is per poll, whatever the number of ready ones."""

_BUDGET_POLL_SECONDS = 0.01
"""Interval at which paused transfers check the byte budget."""

_MEAN_WEIGHT = 0.05
"""Weight of the latest body in the running mean of their sizes."""

_BROKEN_CONNECTION = (FetchError, "connect", "the connection to {host} broke")
_ERRORS: dict[int, tuple[type[FetchError], str, str]] = {
    pycurl.E_COULDNT_CONNECT: (ConnectError, "connect", "no connection to {host}"),
    pycurl.E_COULDNT_RESOLVE_HOST: (ConnectError, "dns", "{host} has no address"),
    pycurl.E_COULDNT_RESOLVE_PROXY: (ConnectError, "dns", "the proxy has no address"),
    pycurl.E_OPERATION_TIMEDOUT: (FetchError, "timeout", "no whole answer in the time allowed"),
    pycurl.E_URL_MALFORMAT: (FetchError, "blocked_address", "not an address that can be asked"),
    **dict.fromkeys(
        (35, 51, 53, 54, 58, 59, 60, 64, 66, 80, 82, 83, 90, 91),  # all of curl's SSL errors
        (FetchError, "tls", "TLS with {host} failed"),
    ),
}
"""curl's error numbers; all others are broken connections."""

_INTERNAL_ERRORS = frozenset({2, 27, 41, 43, 48})
"""curl's error numbers that no host can cause: wrong use of the API, or lack of memory."""

_BROKEN_HANDSHAKE = ("SSL_ERROR_SYSCALL", "unexpected eof", "Connection reset")
"""Parts of curl's messages for a handshake whose connection broke; TLS itself did not fail."""


class ResponseHead:
    """Status and headers of a response."""

    def __init__(self, status: int, lines: list[bytes]) -> None:
        self.status = status
        self._headers: dict[str, list[str]] = {}
        for line in lines:
            name, colon, value = line.decode("latin-1").partition(":")
            if colon:
                self._headers.setdefault(name.strip().lower(), []).append(value.strip())

    def all(self, name: str) -> list[str]:
        """The values of all headers of a name, which is given in lower case."""
        return self._headers.get(name, [])

    def get(self, name: str) -> str:
        """The values of a header, joined; empty if there is none."""
        return ", ".join(self.all(name))

    def content_length(self) -> int:
        """Content-Length in bytes; 0 without a valid one."""
        value = self.get("content-length")
        return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else 0


@dataclass
class Response:
    """A response whose head has arrived.

    Args:
        body: complete, or cut at the limit, or empty. Its bytes are acquired from the budget; the
            caller releases them.
        error: what failed after the head.
        is_too_long: the body exceeds the limit.
    """

    head: ResponseHead
    body: bytes
    error: Exception | None
    is_too_long: bool


class CurlTransport:
    """HTTP requests on the running event loop.

    Connections are reused, and certificates are read once. A body for which the budget has no room
    is not read from its socket, one body at a time excepted; that time is added to its deadline.

    Args:
        agent: the User-Agent header.
        least_rate: bytes a second; a slower response times out.
        max_connections: kept open for later requests.
        byte_budget: bodies acquire their bytes from it.
    """

    def __init__(
        self, agent: str, least_rate: int, max_connections: int, byte_budget: ByteBudget
    ) -> None:
        self.byte_budget = byte_budget
        self.mean_bytes = float(_INITIAL_MEAN_BYTES)
        self._agent = agent
        self._least_rate = least_rate
        self._loop = asyncio.get_running_loop()
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch_socket)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, max_connections)
        self._timer: asyncio.Handle | None = None
        # one entry for the event loop instead of one for each connection
        self._sockets = selectors.DefaultSelector()
        self._loop.add_reader(self._sockets, self._on_sockets_ready)
        self._idle: list[_Transfer] = []
        self._active: dict[pycurl.Curl, _Transfer] = {}
        self._paused: deque[_Transfer] = deque()
        self._over_budget: _Transfer | None = None

    async def get(
        self,
        route: Route,
        seconds: float,
        max_bytes: Callable[[ResponseHead], int],
        *,
        accepts_partial: bool = False,
    ) -> Response:
        """The response to a GET; redirects are not followed.

        Args:
            seconds: for the whole response.
            max_bytes: limit of the body, given its head; 0 aborts the transfer.
            accepts_partial: return the first bytes of a body above the limit; otherwise none.

        Raises:
            FetchError: there is no response.
        """
        if self._idle:
            transfer = self._idle.pop()
        else:
            transfer = _Transfer(self, self._agent, self._least_rate)
        transfer.start(route, seconds, max_bytes)
        transfer.accepts_partial = accepts_partial
        self._active[transfer.curl] = transfer
        self._multi.add_handle(transfer.curl)
        transfer.deadline = self._loop.time() + seconds
        transfer.expiry = self._loop.call_at(transfer.deadline, self._expire, transfer)
        try:
            return await transfer.done
        finally:
            if transfer.curl in self._active:  # the caller was cancelled
                self._end(transfer)
                self.byte_budget.release(transfer.granted)
            self._idle.append(transfer)

    def close(self) -> None:
        """Close all connections."""
        for transfer in list(self._active.values()):
            self._end(transfer)
        if self._timer:
            self._timer.cancel()
        self._multi.close()
        self._loop.remove_reader(self._sockets)
        self._sockets.close()

    def acquire_bytes(self, transfer: "_Transfer", num_bytes: int) -> bool:
        """Acquire bytes for a body if the budget has room; otherwise pause the transfer."""
        if self._over_budget is not transfer and not self.byte_budget.has_room(num_bytes):
            if not self._is_deadlocked():
                self._pause(transfer)
                return False
            self._over_budget = transfer
        self.byte_budget.acquire(num_bytes)
        return True

    def _pause(self, transfer: "_Transfer") -> None:
        transfer.paused_at = self._loop.time()
        if not self._paused:
            self._loop.call_later(_BUDGET_POLL_SECONDS, self._resume)
        self._paused.append(transfer)

    def _resume(self) -> None:
        """Continue the paused transfers; those without room pause again."""
        transfers, self._paused = self._paused, deque()
        for transfer in transfers:
            if transfer.curl in self._active:
                transfer.deadline += self._loop.time() - transfer.paused_at
                transfer.paused_at = 0.0
                transfer.curl.pause(pycurl.PAUSE_CONT)

    def _is_deadlocked(self) -> bool:
        """True if incomplete bodies hold the whole budget, so that none can finish."""
        in_flight = sum(transfer.granted for transfer in self._active.values())
        return self._over_budget is None and self.byte_budget.used == in_flight

    def _watch_socket(self, what: int, fd: int, _multi: object, _state: object) -> None:
        if what == pycurl.POLL_REMOVE:
            self._sockets.unregister(fd)
            return
        events = what & (pycurl.POLL_IN | pycurl.POLL_OUT)
        if fd not in self._sockets.get_map():
            self._sockets.register(fd, events)
        else:
            self._sockets.modify(fd, events)

    def _set_timer(self, milliseconds: int) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if milliseconds == 0:
            self._timer = self._loop.call_soon(self._on_timer)
        elif milliseconds > 0:
            self._timer = self._loop.call_later(milliseconds / 1000, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        self._collect()

    def _on_sockets_ready(self) -> None:
        self._loop.remove_reader(self._sockets)
        self._loop.call_later(_SOCKET_POLL_SECONDS, self._poll_sockets)

    def _poll_sockets(self) -> None:
        for key, events in self._sockets.select(0):
            self._multi.socket_action(key.fd, events)
        self._collect()
        self._loop.add_reader(self._sockets, self._on_sockets_ready)

    def _collect(self) -> None:
        num_queued = 1
        while num_queued:
            num_queued, succeeded, failed = self._multi.info_read()
            for curl in succeeded:
                self._finish(self._active[curl], 0, "")
            for curl, number, message in failed:
                self._finish(self._active[curl], number, message)

    def _finish(self, transfer: "_Transfer", number: int, message: str) -> None:
        self._end(transfer)
        if transfer.done.cancelled():
            self.byte_budget.release(transfer.granted)
            return
        if transfer.head is None or number in _INTERNAL_ERRORS:
            self.byte_budget.release(transfer.granted)
            transfer.done.set_exception(transfer.failure(number, message))
            return
        body = transfer.body()
        self.byte_budget.release(transfer.granted - len(body))
        if body and transfer.head.status == 200:
            self.mean_bytes += _MEAN_WEIGHT * (len(body) - self.mean_bytes)
        has_failed = number and not transfer.is_too_long
        error = transfer.failure(number, message) if has_failed else None
        transfer.done.set_result(Response(transfer.head, body, error, transfer.is_too_long))

    def _expire(self, transfer: "_Transfer") -> None:
        """End a transfer at its deadline, which a pause may have moved."""
        remaining = transfer.deadline - self._loop.time()
        if remaining > 0:
            transfer.expiry = self._loop.call_later(remaining, self._expire, transfer)
        else:
            self._finish(transfer, pycurl.E_OPERATION_TIMEDOUT, "")

    def _end(self, transfer: "_Transfer") -> None:
        del self._active[transfer.curl]
        self._multi.remove_handle(transfer.curl)
        transfer.end()
        if self._over_budget is transfer:
            self._over_budget = None


class _SocketAddress(Protocol):
    """The address that curl is about to connect to."""

    family: int
    socktype: int
    protocol: int
    addr: tuple[str | int, ...]


class _Transfer:
    """A curl handle and the state of its current request; handles are reused."""

    curl: pycurl.Curl
    done: asyncio.Future[Response]
    head: ResponseHead | None
    expiry: asyncio.TimerHandle | None = None
    deadline = 0.0
    paused_at = 0.0
    accepts_partial = False

    def __init__(self, transport: CurlTransport, agent: str, least_rate: int) -> None:
        self._transport = transport
        self.curl = _new_handle(agent, least_rate)
        self.curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)
        self.curl.setopt(pycurl.HEADERFUNCTION, self._on_header)
        self.curl.setopt(pycurl.WRITEFUNCTION, self._on_chunk)
        self._open_sockets = list[socket.socket]()

    def start(self, route: Route, seconds: float, max_bytes: Callable[[ResponseHead], int]) -> None:
        """Reset the state and set the handle up for a request."""
        self.done = asyncio.get_running_loop().create_future()
        self.head = None
        self.granted = 0
        self._chunks = list[bytes]()
        self._size = 0
        self.is_too_long = False
        self.paused_at = 0.0
        self._route = route
        self._max_bytes_of = max_bytes
        self._max_bytes = 0
        self._lines = list[bytes]()
        self._head_bytes = 0
        self._num_refused = self._num_opened = 0
        setopt = self.curl.setopt
        setopt(pycurl.URL, route.url)
        setopt(pycurl.CONNECTTIMEOUT_MS, max(1, int(1000 * min(seconds, MAX_CONNECT_SECONDS))))
        server = f"{_bracketed(route.host)}:{route.port}"
        setopt(pycurl.CONNECT_TO, [f"::{server}"] if route.is_overridden else [])
        addresses = ",".join(map(_bracketed, route.addresses))
        setopt(pycurl.RESOLVE, [f"+{server}:{addresses}"] if addresses else [])
        setopt(pycurl.PROXY, route.proxy)

    def body(self) -> bytes:
        """The bytes of the body; they are handed over to the caller."""
        is_discarded = self.is_too_long and not self.accepts_partial
        body = b"" if is_discarded else b"".join(self._chunks)
        self._chunks.clear()
        return body

    def end(self) -> None:
        """Release the sockets and the timer."""
        for opened in self._open_sockets:
            opened.close()
        self._open_sockets.clear()
        if self.expiry:
            self.expiry.cancel()

    def failure(self, number: int, message: str) -> Exception:
        """The exception for curl's error, with a text that is the same on every run."""
        if number in _INTERNAL_ERRORS:
            return _curl_error(number, message)
        if number == pycurl.E_SSL_CACERT_BADFILE:
            return PmdError(
                f"{_certificates()} holds no certificates: set SSL_CERT_FILE to a file that does"
            )
        error, kind, detail = _ERRORS.get(number, _BROKEN_CONNECTION)
        if number == pycurl.E_OPERATION_TIMEDOUT and self._is_unconnected():
            error, kind, detail = ConnectError, "timeout", "no connection to {host}"
        elif number == pycurl.E_COULDNT_CONNECT and self._num_refused and not self._num_opened:
            error, kind, detail = (
                FetchError,
                "blocked_address",
                "{host} is not on the public internet",
            )
        elif kind == "tls" and any(text in message for text in _BROKEN_HANDSHAKE):
            error, kind, detail = _BROKEN_CONNECTION
        return error(kind, detail.format(host=urlsplit(self._route.url).hostname))

    def _is_unconnected(self) -> bool:
        return self._num_opened > 0 and not self.curl.getinfo(pycurl.CONNECT_TIME)

    def _open_socket(self, _purpose: int, address: _SocketAddress) -> socket.socket | int:
        if self._route.is_public_only and not is_public(str(address.addr[0])):
            self._num_refused += 1
            return int(pycurl.SOCKET_BAD)
        opened = socket.socket(address.family, address.socktype, address.protocol)
        self._open_sockets.append(opened)  # curl duplicates it
        self._num_opened += 1
        return opened

    def _on_header(self, line: bytes) -> int | None:
        """Take a line of a head; lines after the last head are trailers, which are ignored."""
        if self.head:
            return None
        self._head_bytes += len(line)
        if self._head_bytes > _MAX_HEADER_BYTES:
            return -1
        if line.strip():
            if line.startswith(b"HTTP/"):
                self._lines.clear()
            self._lines.append(line)
            return None
        status = int(self._lines[0].split()[1][:3])  # curl has checked that it is a number
        if status >= 200:
            self.head = ResponseHead(status, self._lines[1:])
            self._max_bytes = self._max_bytes_of(self.head)
            self.is_too_long = not self._max_bytes
        return -1 if self.is_too_long else None

    def _on_chunk(self, chunk: bytes) -> int | None:
        """Take a chunk of the body; the fast path is for bytes that are granted already."""
        self._size += len(chunk)
        if self._size > self.granted:
            return self._on_ungranted_chunk(chunk)
        self._chunks.append(chunk)
        return None

    def _on_ungranted_chunk(self, chunk: bytes) -> int | None:
        assert self.head is not None
        excess = max(self._size - self._max_bytes, 0)
        least = self._size - excess - self.granted
        # a host may state any length, so only a little is granted before it arrives
        stated = max(self.head.content_length() - self.granted, 0) or _GRANT_BYTES
        more = min(max(least, min(stated, _GRANT_BYTES)), self._max_bytes - self.granted)
        if not self._transport.acquire_bytes(self, more):
            self._size -= len(chunk)
            return int(pycurl.WRITEFUNC_PAUSE)
        self.granted += more
        self._chunks.append(chunk[: len(chunk) - excess])
        self.is_too_long = excess > 0
        return -1 if excess else None


def _curl_error(number: int, message: str) -> Exception:
    error: Exception = pycurl.error(number, message)
    return error


def _new_handle(agent: str, least_rate: int) -> pycurl.Curl:
    curl = pycurl.Curl()
    for option, value in {
        pycurl.NOSIGNAL: 1,
        pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
        pycurl.HTTP09_ALLOWED: 0,
        pycurl.USERAGENT: agent,
        pycurl.HTTPHEADER: ["Accept-Encoding: identity"],
        pycurl.BUFFERSIZE: _BUFFER_BYTES,
        pycurl.CAINFO: _certificates(),
        pycurl.NOPROXY: "",  # `Router` chooses the proxy
        pycurl.LOW_SPEED_LIMIT: least_rate,
        pycurl.LOW_SPEED_TIME: _LOW_SPEED_SECONDS,
        _SUPPRESS_CONNECT_HEADERS: 1,
    }.items():
        curl.setopt(option, value)
    return curl


def _certificates() -> str:
    """The file of certificates that this machine trusts, or else Mozilla's."""
    return ssl.get_default_verify_paths().cafile or certifi.where()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
