"""Whom to connect to for an address: the addresses of its host, a stand-in, or a proxy."""

import asyncio
import ipaddress
import socket
import time
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.images.fetch.addresses import (
    ConnectError,
    FetchError,
    Origin,
    Target,
    is_public,
    may_be_public,
)

_NUM_RESOLVERS = 32
_MOST_NAMES = 20_000
_NAME_SECONDS = 300.0


@dataclass(frozen=True)
class Route:
    """How an address is asked for.

    Args:
        url: what is asked, by the scheme that is spoken.
        host: who is connected to, unless there is a proxy.
        port: where.
        found: IP addresses of `host`; empty where it is one itself, or the proxy's to find.
        is_diverted: `host` and `port` are others than those of `url`.
        is_guarded: nothing but the public internet may be connected to.
        proxy: the address of who asks for us, with its login; empty if nobody does.
    """

    url: str
    host: str
    port: int
    found: tuple[str, ...] = ()
    is_diverted: bool = False
    is_guarded: bool = False
    proxy: str = ""


class Router:
    """The way to every address.

    Args:
        diverted: pattern of a host to where it is asked instead.
        proxies: proxy by scheme.
    """

    def __init__(self, diverted: Mapping[str, Origin], proxies: Mapping[str, str]) -> None:
        self._diverted = diverted
        self._proxies = proxies
        self._names = DnsCache()

    def origin(self, host: str) -> Origin | None:
        """Where `host` is asked instead, if it is."""
        name = host.rstrip(".")
        found = (o for pattern, o in self._diverted.items() if fnmatchcase(name, pattern))
        return next(found, None)

    async def to(self, target: Target, seconds: float) -> Route:
        """The way to `target`, its host's addresses looked up in so many seconds.

        Raises:
            FetchError: `blocked_address`.
            ConnectError: `dns` or `timeout`.
        """
        origin = self.origin(target.host)
        if origin:
            scheme = origin.scheme or target.scheme
            url = scheme + target.url.removeprefix(target.scheme)
            found = await self._found(origin.host, target.host, seconds)
            return Route(url, origin.host, origin.port, found, is_diverted=True)
        proxy = self._proxies.get(target.scheme)
        if proxy and not urllib.request.proxy_bypass(target.host):
            if not may_be_public(target.host):
                raise FetchError("blocked_address", f"{target.host} is not on the public internet")
            return Route(target.url, target.host, target.port, proxy=proxy)
        found = await self._found(target.host, target.host, seconds)
        if not any(is_public(address) for address in found or (target.host,)):
            raise FetchError("blocked_address", f"{target.host} is not on the public internet")
        return Route(target.url, target.host, target.port, found, is_guarded=True)

    def close(self) -> None:
        """Ask no name server any more."""
        self._names.close()

    async def _found(self, name: str, asked: str, seconds: float) -> tuple[str, ...]:
        if _is_plain_ip(name):
            return ()
        try:
            return await asyncio.wait_for(self._names.addresses(name), seconds)
        except TimeoutError as error:
            raise ConnectError("timeout", f"no connection to {asked}") from error
        except (socket.gaierror, UnicodeError) as error:
            unsure = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            raise ConnectError("dns", f"{asked} has no address", may_pass=unsure) from error


class DnsCache:
    """IP addresses of names, looked up by a few threads and remembered for minutes.

    The time a name server takes is its own: who waits no longer leaves a thread to it.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_RESOLVERS, "names")
        self._known: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._asked: dict[str, asyncio.Task[tuple[str, ...]]] = {}

    async def addresses(self, name: str) -> tuple[str, ...]:
        """The addresses of `name`, in the order in which to try them.

        Raises:
            OSError: as `socket.getaddrinfo`.
            UnicodeError: likewise.
        """
        until, found = self._known.get(name, (0.0, ()))
        if time.monotonic() < until:
            return found
        if name not in self._asked:
            self._asked[name] = asyncio.create_task(self._look_up(name))
        return await asyncio.shield(self._asked[name])

    def close(self) -> None:
        """Forget what was asked and not yet answered."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look_up(self, name: str) -> tuple[str, ...]:
        loop = asyncio.get_running_loop()
        try:
            entries = await loop.run_in_executor(self._threads, _entries, name)
        finally:
            del self._asked[name]
        found = tuple(dict.fromkeys(str(entry[4][0]) for entry in entries))
        self._known.pop(name, None)
        while len(self._known) >= _MOST_NAMES:
            del self._known[next(iter(self._known))]
        self._known[name] = time.monotonic() + _NAME_SECONDS, found
        return found


def environment_proxies() -> dict[str, str]:
    """Addresses of the proxies, by scheme, that the environment names, if any.

    Raises:
        PmdError: a proxy that does not speak HTTP.
    """
    known = urllib.request.getproxies()
    places = {scheme: known.get(scheme) or known.get("all") for scheme in ("http", "https")}
    return {scheme: _proxy(place) for scheme, place in places.items() if place}


def _entries(name: str) -> list[Any]:
    return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)


def _is_plain_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _proxy(place: str) -> str:
    parts = urlsplit(place if "://" in place else f"http://{place}")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise PmdError(
            f"the environment names a proxy of the kind {parts.scheme!r}: only http is spoken"
        )
    login, _, where = parts.netloc.rpartition("@")
    user, _, password = (quote(unquote(one)) for one in login.partition(":"))
    return f"{parts.scheme}://{user}:{password}@{where}" if login else f"{parts.scheme}://{where}"
