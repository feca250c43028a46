"""Addresses that may be asked, in one spelling, and which IP addresses are the public internet.

Nothing here asks anybody.
"""

import ipaddress
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urljoin, urlsplit

from pmd_pipeline.base.record import url_id
from pmd_pipeline.contract.errors import PmdError

RETRY = frozenset({"connect", "timeout", "http_429", "http_5xx"})
"""Kinds that may pass on their own; any other answer is final, so asking again is rude."""

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_HOST = re.compile(r"([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?")


class FetchError(Exception):
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


class ConnectError(FetchError):
    """There was no connection, so it may be the network's fault."""


@dataclass(frozen=True)
class Target:
    """An address that may be asked, in ASCII.

    Args:
        origin: scheme, host, and port unless it is the scheme's.
        path: what is asked of the host: path and query.
    """

    scheme: str
    host: str
    port: int
    origin: str
    path: str

    @property
    def url(self) -> str:
        """The whole address."""
        return self.origin + self.path

    @classmethod
    def of(cls, url: str) -> "Target":
        """The target that `url` names, however it is spelled.

        Raises:
            FetchError: `blocked_address` if it names none, `dns` if no host can have its name.
        """
        try:
            named, asked = urlsplit(url.strip()), urlsplit(url_id(url))
            port, host = named.port, named.hostname
        except ValueError as error:
            raise FetchError("blocked_address", "not an address that can be asked") from error
        default = _PORTS.get(named.scheme)
        if default is None or not host:
            raise FetchError("blocked_address", "only http and https addresses are asked")
        if "@" in named.netloc:
            raise FetchError("blocked_address", "an address with a user name")
        host = _ascii_host(host)
        place = f"[{host}]" if ":" in host else host
        if port is not None and port != default:
            place = f"{place}:{port}"
        path = asked.path + ("?" + asked.query if asked.query else "")
        origin = f"{named.scheme}://{place}"
        return cls(named.scheme, host, port or default, origin, path)


@dataclass(frozen=True)
class Origin:
    """Where a host is asked instead: by its own scheme, or by that of the address asked for."""

    scheme: str | None
    host: str
    port: int

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
        default = {"": port, **_PORTS}.get(parts.scheme) if host else None
        if not host or default is None or parts.path.strip("/"):
            raise PmdError(f"{where} = {place!r}: write address:port, or http://address:port")
        return cls(parts.scheme or None, host, port or default)


def joined(url: str, location: str) -> str:
    """Where a redirect leads; headers are read as Latin-1, and hosts write UTF-8.

    Raises:
        FetchError: `blocked_address`, if it leads to no address.
    """
    with suppress(UnicodeError):  # then it was Latin-1
        location = location.encode("latin-1").decode()
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError("blocked_address", "a redirect to no address") from error


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


def may_be_public(host: str) -> bool:
    """Say whether `host` is a name, or a public IP address in any notation that resolvers know."""
    if host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return is_public(host if ":" in host else socket.inet_ntoa(socket.inet_aton(host)))
    except OSError:
        return True


@lru_cache(maxsize=4096)
def _ascii_host(host: str) -> str:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        pass
    else:
        return host
    try:
        host = host.encode("idna").decode().lower()
    except UnicodeError as error:
        raise FetchError("dns", "not a name that a host can have") from error
    if not _HOST.fullmatch(host):
        raise FetchError("dns", "not a name that a host can have")
    return host
