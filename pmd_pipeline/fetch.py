"""Addresses to bytes over HTTP, politely, within limits, and never where nobody may be sent.

`Web.get` is the seam: an address in, bytes or a `RecordError` out. It is safe to call from many
threads.
"""

import fnmatch
import hashlib
import ipaddress
import random
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from pmd_pipeline.errors import RecordError
from pmd_pipeline.recipe import Fetch
from pmd_pipeline.record import url_id

RETRY = frozenset({"connect", "timeout", "http_429", "http_5xx"})
"""Kinds that may pass on their own; any other answer is final, so asking again is rude."""

PLACEHOLDER_URLS = ("imgur.com/removed.png", "/photo_unavailable.png", "/photo_unavailable_l.png")
"""Ends of the addresses that Imgur and Flickr send to in place of a removed picture."""

PLACEHOLDER_MD5 = frozenset({"d835884373f4d6c8f24742ceabe74946"})
"""md5 of Imgur's `removed.png`, which some mirrors answer under the picture's own address."""

_MOST_REDIRECTS = 5
_LONGEST_WAIT = 60.0
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Fetched:
    """The bytes of an image and where they came from at last.

    Args:
        sha256: of the bytes as fetched, where somebody else fetched them and stored them otherwise.
        original_size: width and height as fetched, likewise.
    """

    body: bytes
    final_url: str | None = None
    sha256: str | None = None
    original_size: tuple[int, int] | None = None


class Web:
    """An HTTP client for images.

    Args:
        manners: how often and how long to ask.
        max_bytes: bodies above this are given up.
        wait: sleeps between attempts; tests put a clock here.
    """

    def __init__(
        self, manners: Fetch, max_bytes: int, wait: Callable[[float], None] = time.sleep
    ) -> None:
        self._manners = manners
        self._max_bytes = max_bytes
        self._wait = wait
        self._turns: defaultdict[str, threading.Semaphore] = defaultdict(
            lambda: threading.Semaphore(manners.per_host)
        )
        self._guarded = _pools(manners, guarded=True)
        self._diverted = _pools(manners, guarded=False)

    def get(self, url: str) -> Fetched:
        """The body behind `url`, after redirects.

        Raises:
            RecordError: there is none to be had; `kind` is one of `format.FAILED`.
        """
        attempt = 0
        while True:
            try:
                return self._followed(url)
            except _Refused as refusal:
                if refusal.kind not in RETRY or attempt == self._manners.retries:
                    raise RecordError(refusal.kind, refusal.detail) from refusal
                pause = refusal.retry_after
                if pause is None:
                    pause = 2.0**attempt * random.uniform(0.5, 1.0)
                if pause > _LONGEST_WAIT:
                    raise RecordError(refusal.kind, refusal.detail) from refusal
            self._wait(pause)
            attempt += 1

    def _followed(self, url: str) -> Fetched:
        deadline = time.monotonic() + self._manners.timeout
        for _ in range(_MOST_REDIRECTS + 1):
            if url.endswith(PLACEHOLDER_URLS):
                raise _Refused("placeholder", "the address is that of a removed picture")
            with self._asked(url, deadline) as response:
                target = response.get_redirect_location()
                if not target:
                    body = self._body(response, deadline)
                    if hashlib.md5(body, usedforsecurity=False).hexdigest() in PLACEHOLDER_MD5:
                        raise _Refused("placeholder", "the bytes are those of a removed picture")
                    return Fetched(body, url)
            url = urljoin(url, target)
        raise _Refused("redirects", f"more than {_MOST_REDIRECTS} redirects")

    @contextmanager
    def _asked(self, url: str, deadline: float) -> Iterator[urllib3.BaseHTTPResponse]:
        address, host, diverted = self._target(url)
        pools = self._diverted if diverted else self._guarded
        with self._turns[host], _as_refusals(host):
            left = deadline - time.monotonic()
            if left <= 0:
                raise _Refused("timeout", "no whole answer in the time allowed")
            response = pools.request(
                "GET",
                address,
                headers={"Host": host} if diverted else None,
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(connect=min(left, 10.0), read=left),
                preload_content=False,
                decode_content=False,
            )
            try:
                yield response
                response.drain_conn() if response.get_redirect_location() else None
            finally:
                if not _is_read(response):
                    response.close()  # a connection with an unread body serves nobody
                response.release_conn()

    def _target(self, url: str) -> tuple[str, str, bool]:
        """The address to ask, the host it stands for, and whether the recipe sends it elsewhere."""
        address = url_id(url)
        parts = urlsplit(address)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise _Refused("blocked_address", "only http and https addresses are asked")
        if parts.username is not None or parts.password is not None:
            raise _Refused("blocked_address", "an address with a user name")
        for pattern, origin in self._manners.connect_to.items():
            if fnmatch.fnmatchcase(parts.hostname, pattern):
                path = parts._replace(scheme="", netloc="").geturl()
                return origin.rstrip("/") + path, parts.netloc, True
        return address, parts.netloc, False

    def _body(self, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        if response.status != 200:
            kind = _kind_of(response.status)
            raise _Refused(kind, f"HTTP {response.status}", _retry_after(response))
        stated = response.headers.get("Content-Length", "")
        if stated.isdigit() and int(stated) > self._max_bytes:
            raise _Refused("too_large", f"more than {self._max_bytes} bytes")
        body = bytearray()
        while chunk := response.read1(_CHUNK):
            body += chunk
            if len(body) > self._max_bytes:
                raise _Refused("too_large", f"more than {self._max_bytes} bytes")
            if time.monotonic() > deadline:
                raise _Refused("timeout", "no whole answer in the time allowed")
        if stated.isdigit() and len(body) < int(stated):
            raise _Refused("connect", "the connection broke in the body")
        if not body:
            raise _Refused("empty", "the answer has no body")
        return bytes(body)


class _Refused(Exception):
    """One attempt failed; `retry_after` is the server's wish in seconds."""

    def __init__(self, kind: str, detail: str, retry_after: float | None = None) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail
        self.retry_after = retry_after


def user_agent(contact: str) -> str:
    """What we call ourselves: honest, and with the user's contact where they gave one."""
    name = f"pmd-flava/{version('pmd-flava')} (research dataset builder"
    return f"{name}; {contact})" if contact else f"{name})"


def is_public(address: str) -> bool:
    """Say whether an IP address belongs to the public internet.

    >>> is_public("169.254.169.254"), is_public("::ffff:10.0.0.1"), is_public("8.8.8.8")
    (False, False, True)
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (mapped := ip.ipv4_mapped or ip.sixtofour):
        ip = mapped
    return ip.is_global and not ip.is_multicast


def _kind_of(status: int) -> str:
    if status in {403, 404, 410, 429}:
        return f"http_{status}"
    return "http_5xx" if status >= 500 else "http_4xx"


def _retry_after(response: urllib3.BaseHTTPResponse) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _is_read(response: urllib3.BaseHTTPResponse) -> bool:
    return bool(response.length_remaining == 0)


@contextmanager
def _as_refusals(host: str) -> Iterator[None]:
    """Turn what urllib3 raises into kinds, in words that are the same on every run."""
    try:
        yield
    except urllib3.exceptions.NameResolutionError as error:
        raise _Refused("dns", f"{host} has no address") from error
    except (urllib3.exceptions.TimeoutError, TimeoutError) as error:
        if isinstance(error, urllib3.exceptions.NewConnectionError):
            raise _Refused("connect", f"no connection to {host}") from error
        raise _Refused("timeout", "no whole answer in the time allowed") from error
    except (urllib3.exceptions.SSLError, ssl.SSLError) as error:
        raise _Refused("tls", f"TLS with {host} failed") from error
    except urllib3.exceptions.NewConnectionError as error:
        raise _Refused("connect", f"no connection to {host}") from error
    except (urllib3.exceptions.LocationValueError, UnicodeError) as error:
        raise _Refused("blocked_address", "not an address that can be asked") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _Refused("connect", f"the connection to {host} broke") from error


def _pools(manners: Fetch, *, guarded: bool) -> urllib3.PoolManager:
    manager = urllib3.PoolManager(
        num_pools=256,
        maxsize=manners.per_host,
        headers={"User-Agent": user_agent(manners.contact), "Accept-Encoding": "identity"},
    )
    if guarded:
        manager.pool_classes_by_scheme = {"http": _GuardedPool, "https": _GuardedPoolTls}
    return manager


def _public_socket(connection: HTTPConnection) -> socket.socket:
    """Connect to a public address of the connection's host, checked after its name is resolved."""
    host, port = connection._dns_host, connection.port  # noqa: SLF001 - the seam urllib3 overrides
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise urllib3.exceptions.NameResolutionError(
            host, connection, error if isinstance(error, socket.gaierror) else socket.gaierror()
        ) from error
    public = [str(entry[4][0]) for entry in found if is_public(str(entry[4][0]))]
    if not public:
        raise _Refused("blocked_address", f"{host} is not on the public internet")
    timeout = connection.timeout if isinstance(connection.timeout, (int, float)) else 10.0
    last: OSError | None = None
    for address in public:
        try:
            return socket.create_connection((address, port), timeout)
        except TimeoutError as error:
            raise urllib3.exceptions.ConnectTimeoutError(str(error)) from error
        except OSError as error:
            last = error
    raise urllib3.exceptions.NewConnectionError(connection, f"{last}") from last


class _Guarded(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _public_socket(self)


class _GuardedTls(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _public_socket(self)


class _GuardedPool(HTTPConnectionPool):
    ConnectionCls = _Guarded


class _GuardedPoolTls(HTTPSConnectionPool):
    ConnectionCls = _GuardedTls
