"""Many HTTP requests at once over libcurl; the only file that knows it.

Everything here happens on the thread of one event loop. What to ask and what to make of answers is
for `fetch` to say.
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
from pmd_pipeline.images.fetch.addresses import ConnectError, FetchError, is_public
from pmd_pipeline.images.fetch.byte_budget import ByteBudget
from pmd_pipeline.images.fetch.routes import Route

LONGEST_CONNECT = 10.0

_BUFFER = 1 << 18
_SUPPRESS_CONNECT_HEADERS = 265  # pycurl lacks the name
_SLOW_SECONDS = 15
_MOST_HEADER_BYTES = 1 << 18
_GRANT = 1 << 18
"""Bytes of memory that a body may get ahead of those that have come."""

_FIRST_GUESS = 1 << 18
_BREATH = 0.005
"""Seconds between looks at the sockets: a look costs as much for many as for one."""

_GLANCE = 0.01
"""Seconds between looks at what waits for something of ours."""

_NEWS = 0.05
"""Weight of the latest body in the mean size."""

_BROKEN = (FetchError, "connect", "the connection to {host} broke")
_MEANING: dict[int, tuple[type[FetchError], str, str]] = {
    pycurl.E_COULDNT_CONNECT: (ConnectError, "connect", "no connection to {host}"),
    pycurl.E_COULDNT_RESOLVE_HOST: (ConnectError, "dns", "{host} has no address"),
    pycurl.E_COULDNT_RESOLVE_PROXY: (ConnectError, "dns", "the proxy has no address"),
    pycurl.E_OPERATION_TIMEDOUT: (FetchError, "timeout", "no whole answer in the time allowed"),
    pycurl.E_URL_MALFORMAT: (FetchError, "blocked_address", "not an address that can be asked"),
    **dict.fromkeys(
        (35, 51, 53, 54, 58, 59, 60, 64, 66, 80, 82, 83, 90, 91),  # all that curl calls SSL
        (FetchError, "tls", "TLS with {host} failed"),
    ),
}
"""What curl's errors mean; all others are broken connections."""

_OURS = frozenset({2, 27, 41, 43, 48})
"""curl's numbers for what no host can bring about: our mistakes, or no memory at all."""

_CUT_OFF = ("SSL_ERROR_SYSCALL", "unexpected eof", "Connection reset")
"""What curl says of a handshake that was not refused, but broken off."""


class Head:
    """Status and headers of an answer."""

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

    def length(self) -> int:
        """How long the body says it is, in bytes; 0 if it does not say."""
        stated = self.get("content-length")
        return int(stated) if stated.isascii() and stated.isdigit() and len(stated) < 19 else 0


@dataclass
class Response:
    """What came of a request that was answered.

    Args:
        body: the whole, or as much of it as was wanted, or nothing of it. Its bytes are taken from
            the memory until the caller gives them back.
        trouble: what went wrong after the head.
        is_cut: there was more than was wanted.
    """

    head: Head
    body: bytes
    trouble: Exception | None
    is_cut: bool


class Engine:
    """Requests in flight, on the running event loop.

    Connections are used again, certificates are read once, and a body for which there is no memory
    waits in the network, one at a time excepted; that time does not count.

    Args:
        agent: the User-Agent.
        least_rate: bytes a second; a request that is slower for a while times out.
        most_connections: kept open for later requests.
        memory: which the bodies take their bytes from.
    """

    def __init__(
        self, agent: str, least_rate: int, most_connections: int, memory: ByteBudget
    ) -> None:
        self.memory = memory
        self.mean_bytes = float(_FIRST_GUESS)
        self._agent = agent
        self._least_rate = least_rate
        self._loop = asyncio.get_running_loop()
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._on_progress)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, most_connections)
        self._timer: asyncio.Handle | None = None
        # one entry for the event loop instead of one for each connection
        self._sockets = selectors.DefaultSelector()
        self._loop.add_reader(self._sockets, self._sockets_are_ready)
        self._idle: list[_Slot] = []
        self._busy: dict[pycurl.Curl, _Slot] = {}
        self._paused: deque[_Slot] = deque()
        self._exceeding: _Slot | None = None

    async def ask(
        self, way: Route, seconds: float, most: Callable[[Head], int], *, takes_parts: bool = False
    ) -> Response:
        """The answer to a GET, redirects not followed.

        Args:
            seconds: for the whole answer.
            most: how many bytes of the body are wanted, given its head; 0 breaks the answer off.
            takes_parts: give what was wanted of a body that has more; else it is given up.

        Raises:
            FetchError: there is no answer.
        """
        slot = self._idle.pop() if self._idle else _Slot(self, self._agent, self._least_rate)
        slot.start(way, seconds, most)
        slot.takes_parts = takes_parts
        self._busy[slot.curl] = slot
        self._multi.add_handle(slot.curl)
        slot.deadline = self._loop.time() + seconds
        slot.expiry = self._loop.call_at(slot.deadline, self._expire, slot)
        try:
            return await slot.done
        finally:
            if slot.curl in self._busy:  # nobody waits any more
                self._end(slot)
                self.memory.give(slot.granted)
            self._idle.append(slot)

    def close(self) -> None:
        """Break all connections off."""
        for slot in list(self._busy.values()):
            self._end(slot)
        if self._timer:
            self._timer.cancel()
        self._multi.close()
        self._loop.remove_reader(self._sockets)
        self._sockets.close()

    def may_take(self, slot: "_Slot", num_bytes: int) -> bool:
        """Take more memory for a body, if there is room; else it is asked again soon."""
        if self._exceeding is not slot and not self.memory.has_room(num_bytes):
            if not self._is_stuck():
                self._pause(slot)
                return False
            self._exceeding = slot
        self.memory.take(num_bytes)
        return True

    def _pause(self, slot: "_Slot") -> None:
        slot.paused_at = self._loop.time()
        if not self._paused:
            self._loop.call_later(_GLANCE, self._resume)
        self._paused.append(slot)

    def _resume(self) -> None:
        """Let bodies go on that waited for memory, if only to wait again."""
        waiting, self._paused = self._paused, deque()
        for slot in waiting:
            if slot.curl in self._busy:
                slot.deadline += self._loop.time() - slot.paused_at
                slot.paused_at = 0.0
                slot.curl.pause(pycurl.PAUSE_CONT)

    def _is_stuck(self) -> bool:
        """Say whether bodies wait only for each other."""
        in_flight = sum(slot.granted for slot in self._busy.values())
        return self._exceeding is None and self.memory.used == in_flight

    def _on_progress(self, what: int, fd: int, _multi: object, _state: object) -> None:
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
            self._timer = self._loop.call_soon(self._time_has_come)
        elif milliseconds > 0:
            self._timer = self._loop.call_later(milliseconds / 1000, self._time_has_come)

    def _time_has_come(self) -> None:
        self._timer = None
        self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        self._collect()

    def _sockets_are_ready(self) -> None:
        self._loop.remove_reader(self._sockets)
        self._loop.call_later(_BREATH, self._look)

    def _look(self) -> None:
        for key, events in self._sockets.select(0):
            self._multi.socket_action(key.fd, events)
        self._collect()
        self._loop.add_reader(self._sockets, self._sockets_are_ready)

    def _collect(self) -> None:
        left = 1
        while left:
            left, good, bad = self._multi.info_read()
            for curl in good:
                self._finish(self._busy[curl], 0, "")
            for curl, number, message in bad:
                self._finish(self._busy[curl], number, message)

    def _finish(self, slot: "_Slot", number: int, message: str) -> None:
        self._end(slot)
        if slot.done.cancelled():
            self.memory.give(slot.granted)
            return
        if slot.head is None or number in _OURS:
            self.memory.give(slot.granted)
            slot.done.set_exception(slot.failure(number, message))
            return
        body = slot.body()
        self.memory.give(slot.granted - len(body))
        if body and slot.head.status == 200:
            self.mean_bytes += _NEWS * (len(body) - self.mean_bytes)
        failure = slot.failure(number, message) if number and not slot.is_cut else None
        slot.done.set_result(Response(slot.head, body, failure, slot.is_cut))

    def _expire(self, slot: "_Slot") -> None:
        """End a request whose time is over; it has more if it waited for us."""
        left = slot.deadline - self._loop.time()
        if left > 0:
            slot.expiry = self._loop.call_later(left, self._expire, slot)
        else:
            self._finish(slot, pycurl.E_OPERATION_TIMEDOUT, "")

    def _end(self, slot: "_Slot") -> None:
        del self._busy[slot.curl]
        self._multi.remove_handle(slot.curl)
        slot.end()
        if self._exceeding is slot:
            self._exceeding = None


class _Place(Protocol):
    """Where curl is about to connect to."""

    family: int
    socktype: int
    protocol: int
    addr: tuple[str | int, ...]


class _Slot:
    """A curl handle, and what it knows of the request that it makes now."""

    curl: pycurl.Curl
    done: asyncio.Future[Response]
    head: Head | None
    expiry: asyncio.TimerHandle | None = None
    deadline = 0.0
    paused_at = 0.0
    takes_parts = False

    def __init__(self, engine: "Engine", agent: str, least_rate: int) -> None:
        self._engine = engine
        self.curl = _handle(agent, least_rate)
        self.curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)
        self.curl.setopt(pycurl.HEADERFUNCTION, self._take_line)
        self.curl.setopt(pycurl.WRITEFUNCTION, self._take_chunk)
        self._opened = list[socket.socket]()

    def start(self, way: Route, seconds: float, most: Callable[[Head], int]) -> None:
        """Forget the last request and be ready for this one."""
        self.done = asyncio.get_running_loop().create_future()
        self.head = None
        self.granted = 0
        self._chunks = list[bytes]()
        self._size = 0
        self.is_cut = False
        self.paused_at = 0.0
        self._way = way
        self._most = most
        self._wanted = 0
        self._lines = list[bytes]()
        self._head_bytes = 0
        self._num_refused = self._num_opened = 0
        setopt = self.curl.setopt
        setopt(pycurl.URL, way.url)
        setopt(pycurl.CONNECTTIMEOUT_MS, max(1, int(1000 * min(seconds, LONGEST_CONNECT))))
        place = f"{_bracketed(way.host)}:{way.port}"
        setopt(pycurl.CONNECT_TO, [f"::{place}"] if way.is_diverted else [])
        found = ",".join(map(_bracketed, way.found))
        setopt(pycurl.RESOLVE, [f"+{place}:{found}"] if found else [])
        setopt(pycurl.PROXY, way.proxy)

    def body(self) -> bytes:
        """What has come, which is then nobody's but the caller's."""
        body = b"" if self.is_cut and not self.takes_parts else b"".join(self._chunks)
        self._chunks.clear()
        return body

    def end(self) -> None:
        """Let go of what the request held."""
        for opened in self._opened:
            opened.close()
        self._opened.clear()
        if self.expiry:
            self.expiry.cancel()

    def failure(self, number: int, message: str) -> Exception:
        """What curl's error means, in words that are the same on every run."""
        if number in _OURS:
            return _error(number, message)
        if number == pycurl.E_SSL_CACERT_BADFILE:
            return PmdError(f"{_certificates()} holds no certificates: put SSL_CERT_FILE right")
        raised, kind, detail = _MEANING.get(number, _BROKEN)
        if number == pycurl.E_OPERATION_TIMEDOUT and self._is_unreached():
            raised, kind, detail = ConnectError, "timeout", "no connection to {host}"
        elif number == pycurl.E_COULDNT_CONNECT and self._num_refused and not self._num_opened:
            raised, kind, detail = (
                FetchError,
                "blocked_address",
                "{host} is not on the public internet",
            )
        elif kind == "tls" and any(words in message for words in _CUT_OFF):
            raised, kind, detail = _BROKEN
        return raised(kind, detail.format(host=urlsplit(self._way.url).hostname))

    def _is_unreached(self) -> bool:
        return self._num_opened > 0 and not self.curl.getinfo(pycurl.CONNECT_TIME)

    def _open_socket(self, _purpose: int, address: _Place) -> socket.socket | int:
        if self._way.is_guarded and not is_public(str(address.addr[0])):
            self._num_refused += 1
            return int(pycurl.SOCKET_BAD)
        opened = socket.socket(address.family, address.socktype, address.protocol)
        self._opened.append(opened)  # curl has a copy of its own
        self._num_opened += 1
        return opened

    def _take_line(self, line: bytes) -> int | None:
        """A line of a head; those after the last head are trailers, and said too late."""
        if self.head:
            return None
        self._head_bytes += len(line)
        if self._head_bytes > _MOST_HEADER_BYTES:
            return -1
        if line.strip():
            if line.startswith(b"HTTP/"):
                self._lines.clear()
            self._lines.append(line)
            return None
        status = int(self._lines[0].split()[1][:3])  # curl has read it before us
        if status >= 200:
            self.head = Head(status, self._lines[1:])
            self._wanted = self._most(self.head)
            self.is_cut = not self._wanted
        return -1 if self.is_cut else None

    def _take_chunk(self, chunk: bytes) -> int | None:
        """A piece of the body; only what goes beyond the bytes granted so far needs a thought."""
        self._size += len(chunk)
        if self._size > self.granted:
            return self._take_beyond(chunk)
        self._chunks.append(chunk)
        return None

    def _take_beyond(self, chunk: bytes) -> int | None:
        assert self.head is not None
        too_much = max(self._size - self._wanted, 0)
        least = self._size - too_much - self.granted
        # a host may state any length: little is believed of it before it comes
        stated = max(self.head.length() - self.granted, 0) or _GRANT
        more = min(max(least, min(stated, _GRANT)), self._wanted - self.granted)
        if not self._engine.may_take(self, more):
            self._size -= len(chunk)
            return int(pycurl.WRITEFUNC_PAUSE)
        self.granted += more
        self._chunks.append(chunk[: len(chunk) - too_much])
        self.is_cut = too_much > 0
        return -1 if too_much else None


def _error(number: int, message: str) -> Exception:
    error: Exception = pycurl.error(number, message)
    return error


def _handle(agent: str, least_rate: int) -> pycurl.Curl:
    curl = pycurl.Curl()
    for option, value in {
        pycurl.NOSIGNAL: 1,
        pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
        pycurl.HTTP09_ALLOWED: 0,
        pycurl.USERAGENT: agent,
        pycurl.HTTPHEADER: ["Accept-Encoding: identity"],
        pycurl.BUFFERSIZE: _BUFFER,
        pycurl.CAINFO: _certificates(),
        pycurl.NOPROXY: "",  # who asks for us is decided elsewhere
        pycurl.LOW_SPEED_LIMIT: least_rate,
        pycurl.LOW_SPEED_TIME: _SLOW_SECONDS,
        _SUPPRESS_CONNECT_HEADERS: 1,
    }.items():
        curl.setopt(option, value)
    return curl


def _certificates() -> str:
    """The file of certificates that this machine trusts, or else Mozilla's."""
    return ssl.get_default_verify_paths().cafile or certifi.where()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
