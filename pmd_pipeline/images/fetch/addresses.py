"""URLs in one spelling, and which IP addresses are public. This module sends no request."""

import ipaddress
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urljoin, urlsplit

from pmd_pipeline.base.record import url_id
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.images.fetch.errors import FetchError

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_HOST = re.compile(r"([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?")


@dataclass(frozen=True)
class Target:
    """A URL that may be requested, in ASCII.

    Args:
        origin: scheme, host, and port unless it is the scheme's default.
        path: path and query.
    """

    scheme: str
    host: str
    port: int
    origin: str
    path: str

    @property
    def url(self) -> str:
        """The whole URL."""
        return self.origin + self.path

    @classmethod
    def parse(cls, url: str) -> "Target":
        """The target of `url`, whatever its spelling.

        Raises:
            FetchError: `blocked_address` if it is no URL of a web server, `dns` if its host cannot
                be a host name.
        """
        try:
            parts, normalised = urlsplit(url.strip()), urlsplit(url_id(url))
            port, host = parts.port, parts.hostname
        except ValueError as error:
            raise FetchError("blocked_address", "not an address that can be asked") from error
        default = _PORTS.get(parts.scheme)
        if default is None or not host:
            raise FetchError("blocked_address", "only http and https addresses are asked")
        if "@" in parts.netloc:
            raise FetchError("blocked_address", "an address with a user name")
        host = _ascii_host(host)
        authority = f"[{host}]" if ":" in host else host
        if port is not None and port != default:
            authority = f"{authority}:{port}"
        path = normalised.path + ("?" + normalised.query if normalised.query else "")
        origin = f"{parts.scheme}://{authority}"
        return cls(parts.scheme, host, port or default, origin, path)


@dataclass(frozen=True)
class HostOverride:
    """The server that is connected to in place of a host.

    Args:
        scheme: None keeps the scheme of the URL.
    """

    scheme: str | None
    host: str
    port: int

    @classmethod
    def parse(cls, text: str, key: str) -> "HostOverride":
        """The server of `text`: `address:port`, or with `http://` before it.

        Raises:
            PmdError: it is neither; the sentence begins with `key`, the key of the recipe.
        """
        try:
            parts = urlsplit(text if "://" in text else f"//{text}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        default = {"": port, **_PORTS}.get(parts.scheme) if host else None
        if not host or default is None or parts.path.strip("/"):
            raise PmdError(f"{key} = {text!r}: write address:port, or http://address:port")
        return cls(parts.scheme or None, host, port or default)


def redirect_url(url: str, location: str) -> str:
    """The URL that a Location header leads to, which may be relative.

    Headers are decoded as Latin-1, but servers write UTF-8.

    Raises:
        FetchError: `blocked_address` if it is no URL.
    """
    with suppress(UnicodeError):  # then it was Latin-1
        location = location.encode("latin-1").decode()
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchError("blocked_address", "a redirect to no address") from error


def is_public(address: str) -> bool:
    """True if an IP address belongs to the public internet.

    For an IPv6 address that embeds an IPv4 address, the embedded one decides.

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
    """True for a host name, and for a public IP address in any notation that resolvers accept."""
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
