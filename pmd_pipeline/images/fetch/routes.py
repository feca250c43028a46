"""The server to connect to for a URL: an address of its host, an override, or a proxy."""

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
from pmd_pipeline.images.fetch.addresses import HostOverride, Target, is_public, may_be_public
from pmd_pipeline.images.fetch.errors import ConnectError, FetchError

_NUM_RESOLVERS = 32
_MAX_NAMES = 20_000
_CACHE_SECONDS = 300.0


@dataclass(frozen=True)
class Route:
    """How to request a URL.

    Args:
        url: the URL, with the scheme of the connection.
        host: the server to connect to, unless there is a proxy.
        port: of the server.
        addresses: IP addresses of `host`; empty if it is one itself, or if the proxy resolves it.
        is_overridden: `host` and `port` are not those of `url`.
        is_public_only: connect to public IP addresses only.
        proxy: URL of the proxy, with its login; empty without one.
    """

    url: str
    host: str
    port: int
    addresses: tuple[str, ...] = ()
    is_overridden: bool = False
    is_public_only: bool = False
    proxy: str = ""


class Router:
    """Finds the route of each URL.

    Args:
        overrides: by pattern of the host.
        proxies: URL of the proxy, by scheme.
    """

    def __init__(self, overrides: Mapping[str, HostOverride], proxies: Mapping[str, str]) -> None:
        self._overrides = overrides
        self._proxies = proxies
        self._dns = DnsCache()

    def override(self, host: str) -> HostOverride | None:
        """The server that replaces `host`."""
        name = host.rstrip(".")
        matches = (o for pattern, o in self._overrides.items() if fnmatchcase(name, pattern))
        return next(matches, None)

    async def route(self, target: Target, seconds: float) -> Route:
        """The route to `target`; its host is resolved within `seconds`.

        Raises:
            FetchError: `blocked_address`.
            ConnectError: `dns` or `timeout`.
        """
        override = self.override(target.host)
        if override:
            scheme = override.scheme or target.scheme
            url = scheme + target.url.removeprefix(target.scheme)
            addresses = await self._resolve(override.host, target.host, seconds)
            return Route(url, override.host, override.port, addresses, is_overridden=True)
        proxy = self._proxies.get(target.scheme)
        if proxy and not urllib.request.proxy_bypass(target.host):
            if not may_be_public(target.host):
                raise FetchError("blocked_address", f"{target.host} is not on the public internet")
            return Route(target.url, target.host, target.port, proxy=proxy)
        addresses = await self._resolve(target.host, target.host, seconds)
        if not any(is_public(address) for address in addresses or (target.host,)):
            raise FetchError("blocked_address", f"{target.host} is not on the public internet")
        return Route(target.url, target.host, target.port, addresses, is_public_only=True)

    def close(self) -> None:
        """Stop resolving names."""
        self._dns.close()

    async def _resolve(self, name: str, url_host: str, seconds: float) -> tuple[str, ...]:
        if _is_ip(name):
            return ()
        try:
            return await asyncio.wait_for(self._dns.resolve(name), seconds)
        except TimeoutError as error:
            raise ConnectError("timeout", f"no connection to {url_host}") from error
        except (socket.gaierror, UnicodeError) as error:
            is_temporary = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            raise ConnectError(
                "dns", f"{url_host} has no address", is_retryable=is_temporary
            ) from error


class DnsCache:
    """Resolves names in a few threads and caches the addresses for minutes.

    A caller that stops waiting leaves the lookup to its thread, so a slow name server does not hold
    up the event loop.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_RESOLVERS, "dns")
        self._cache: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._lookups: dict[str, asyncio.Task[tuple[str, ...]]] = {}

    async def resolve(self, name: str) -> tuple[str, ...]:
        """The addresses of `name`, in the order in which to try them.

        Raises:
            OSError: as `socket.getaddrinfo`.
            UnicodeError: likewise.
        """
        expires, addresses = self._cache.get(name, (0.0, ()))
        if time.monotonic() < expires:
            return addresses
        if name not in self._lookups:
            self._lookups[name] = asyncio.create_task(self._look_up(name))
        return await asyncio.shield(self._lookups[name])

    def close(self) -> None:
        """Cancel the lookups that have not started."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _look_up(self, name: str) -> tuple[str, ...]:
        loop = asyncio.get_running_loop()
        try:
            entries = await loop.run_in_executor(self._threads, _address_info, name)
        finally:
            del self._lookups[name]
        addresses = tuple(dict.fromkeys(str(entry[4][0]) for entry in entries))
        self._cache.pop(name, None)
        while len(self._cache) >= _MAX_NAMES:
            del self._cache[next(iter(self._cache))]
        self._cache[name] = time.monotonic() + _CACHE_SECONDS, addresses
        return addresses


def environment_proxies() -> dict[str, str]:
    """URLs of the proxies that the environment names, by scheme.

    Raises:
        PmdError: a proxy of another protocol than HTTP.
    """
    variables = urllib.request.getproxies()
    proxies = {
        scheme: variables.get(scheme) or variables.get("all") for scheme in ("http", "https")
    }
    return {scheme: _proxy_url(proxy) for scheme, proxy in proxies.items() if proxy}


def _address_info(name: str) -> list[Any]:
    return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _proxy_url(proxy: str) -> str:
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise PmdError(
            f"the environment names a proxy of the kind {parts.scheme!r}: only http is supported"
        )
    login, _, server = parts.netloc.rpartition("@")
    user, _, password = (quote(unquote(one)) for one in login.partition(":"))
    return f"{parts.scheme}://{user}:{password}@{server}" if login else f"{parts.scheme}://{server}"
