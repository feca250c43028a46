"""Sockets that go only where they may, and take only the time they have.

urllib3 speaks HTTP over them; `fetch` says what to ask.
"""

import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from pmd_pipeline.errors import PmdError

RETRY = frozenset({"connect", "timeout", "http_429", "http_5xx"})
"""Kinds that may pass on their own; any other answer is final, so asking again is rude."""

LONGEST_CONNECT = 10.0

_NUM_POOLS = 256
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

_Dial: TypeAlias = Callable[[HTTPConnection], socket.socket]
"""Makes the socket of a connection, connected to whatever it may be connected to."""


class Refused(Exception):
    """One attempt to get an answer failed.

    Args:
        kind: one of `format.FAILED`.
        retry_after: the server's wish in seconds.
        may_pass: asking again may help; by default, if `kind` is one of `RETRY`.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        retry_after: float | None = None,
        *,
        may_pass: bool | None = None,
    ) -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail
        self.retry_after = retry_after
        self.may_pass = kind in RETRY if may_pass is None else may_pass


class Unreached(Refused):
    """There was no connection, so it may be the network's fault."""


@dataclass(frozen=True)
class Origin:
    """Where a host is asked instead: by its own scheme, or by that of the address asked for."""

    scheme: str | None
    host: str
    port: int | None

    @classmethod
    def of(cls, place: str, where: str) -> "Origin":
        """The origin that `place` names: `address:port`, or with `http://` before it.

        Raises:
            PmdError: it names none; `where` says whose fault that is.
        """
        try:
            parts = urlsplit(place if "://" in place else f"//{place}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        default = {"": port, "http": 80, "https": 443}.get(parts.scheme) if host else None
        if not host or default is None or parts.path.strip("/"):
            raise PmdError(f"{where} = {place!r}: write address:port, or http://address:port")
        return cls(parts.scheme or None, host, port or default)


def pools(
    headers: Mapping[str, str], per_host: int, origin_of: Callable[[str], Origin | None]
) -> urllib3.PoolManager:
    """Pools of connections to the public internet, and to where `origin_of` sends a host."""

    def dial(connection: HTTPConnection) -> socket.socket:
        origin = origin_of(connection.host)
        if origin:
            return _connected(connection, origin.host, origin.port or connection.port)
        return _connected(connection, _name(connection), connection.port, public=True)

    manager = urllib3.PoolManager(
        _NUM_POOLS, headers, maxsize=per_host, ssl_context=_tls(), block=False
    )
    manager.pool_classes_by_scheme = _pool_classes(dial)
    return manager


def proxies(headers: Mapping[str, str], per_host: int) -> dict[str, urllib3.PoolManager]:
    """Pools by scheme for the proxies that the environment names, if any.

    Raises:
        PmdError: a proxy that does not speak HTTP.
    """
    known = urllib.request.getproxies()
    places = {scheme: known.get(scheme) or known.get("all") for scheme in ("http", "https")}
    return {scheme: _proxy(place, headers, per_host) for scheme, place in places.items() if place}


def is_public(address: str) -> bool:
    """Say whether an IP address belongs to the public internet.

    An IPv6 address that stands for an IPv4 one is as public as that.

    >>> is_public("169.254.169.254"), is_public("::ffff:10.0.0.1"), is_public("8.8.8.8")
    (False, False, True)
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


class _Socket(socket.socket):
    """A socket whose timeout is for all that is received until it is set again.

    Else a server that sends a byte now and then would hold a thread for as long as it likes.
    """

    _until: float | None = None

    def settimeout(self, value: float | None) -> None:
        self._until = None if value is None else time.monotonic() + value
        super().settimeout(value)

    def recv_into(self, *args: object, **keywords: object) -> int:
        if self._until is not None:
            left = self._until - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            super().settimeout(left)
        return super().recv_into(*args, **keywords)  # type: ignore[arg-type]  # passed through


class _TlsSocket(_Socket, ssl.SSLSocket):
    """The same with TLS; its handshake keeps to the timeout by itself."""


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TlsSocket
    return context


def _pool_classes(dial: _Dial) -> dict[str, type[HTTPConnectionPool]]:
    """urllib3's pools with sockets of ours; their classes are the only way in."""

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return dial(self)

    class Tls(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return dial(self)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    return {"http": PlainPool, "https": TlsPool}


def _connected(
    connection: HTTPConnection, host: str, port: int, *, public: bool = False
) -> _Socket:
    """A socket for `connection`, connected to `host`; if `public`, to the public internet only.

    The check is of the very address that is connected to: a name may lead elsewhere next time.
    """
    named = connection.host
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        unsure = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        raise Unreached("dns", f"{named} has no address", may_pass=unsure) from error
    allowed = [entry for entry in found if not public or is_public(str(entry[4][0]))]
    if not allowed:
        raise Refused("blocked_address", f"{named} is not on the public internet")
    until = time.monotonic() + (connection.timeout or LONGEST_CONNECT)
    failure: OSError | None = None
    for number, (family, kind, protocol, _, address) in enumerate(allowed):
        plain = _Socket(family, kind, protocol)
        try:
            plain.settimeout(_left(until) / (len(allowed) - number))
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.connect(address)
        except OSError as error:
            plain.close()
            failure = error
        else:
            plain.settimeout(_left(until))
            return plain
    late = isinstance(failure, TimeoutError)
    raise Unreached("timeout" if late else "connect", f"no connection to {named}") from failure


def _left(until: float) -> float:
    return max(until - time.monotonic(), 0.001)  # zero would mean: do not block


def _name(connection: HTTPConnection) -> str:
    """The host to resolve; a final dot, which only the resolver understands, is still there."""
    return connection._dns_host  # noqa: SLF001 - urllib3 has no public name for it


def _proxy(place: str, headers: Mapping[str, str], per_host: int) -> urllib3.PoolManager:
    parts = urlsplit(place if "://" in place else f"http://{place}")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise PmdError(
            f"the environment names a proxy of the kind {parts.scheme!r}: only http is spoken"
        )
    login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    manager = urllib3.ProxyManager(
        f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}",
        _NUM_POOLS,
        headers,
        proxy_headers=urllib3.make_headers(proxy_basic_auth=login if parts.username else None),
        maxsize=per_host,
        ssl_context=_tls(),
        block=False,
    )
    manager.pool_classes_by_scheme = _pool_classes(
        lambda connection: _connected(connection, _name(connection), connection.port)
    )
    return manager
