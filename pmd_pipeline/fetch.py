"""Addresses to bytes over HTTP, politely, within limits, and never where nobody may be sent.

`Web.get` is the seam: an address in, bytes or a `RecordError` out. It is safe to call from many
threads.
"""

import email.utils
import fnmatch
import hashlib
import ipaddress
import logging
import random
import re
import socket
import ssl
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar
from urllib.parse import urljoin, urlsplit, urlunsplit

import urllib3

from pmd_pipeline.connections import (
    LONGEST_CONNECT,
    Origin,
    Refused,
    Unreached,
    is_public,
    pools,
    proxies,
)
from pmd_pipeline.consent import (
    PRODUCT,
    ROBOTS_BYTES,
    Robots,
    RobotsCache,
    is_reserved,
    refusal_in_tags,
)
from pmd_pipeline.errors import PmdError, RecordError
from pmd_pipeline.hosts import Clock, Ending, GivenUp, Hosts, Turn, Turns
from pmd_pipeline.recipe import SIGNALS, Fetch, Signal
from pmd_pipeline.record import url_id

PLACEHOLDER_URLS = ("imgur.com/removed.png", "/photo_unavailable.png", "/photo_unavailable_l.png")
"""Ends of the addresses that Imgur and Flickr send to in place of a removed picture."""

PLACEHOLDER_MD5 = frozenset({"d835884373f4d6c8f24742ceabe74946"})
"""md5 of Imgur's `removed.png`, which some mirrors answer under the picture's own address."""

_MOST_REDIRECTS = 5
_LONGEST_ROBOTS = 10.0
_LONGEST_POLICY = 300
_CHUNK = 1 << 16

_UNKNOWN = frozenset({"connect", "dns", "http_429", "http_5xx", "timeout", "tls"})
"""Ways to get no robots.txt that say nothing about what it forbids (RFC 9309, section 2.3.1.4)."""

_Taken = TypeVar("_Taken")

_HOST = re.compile(r"([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?")
_SECONDS = re.compile(r"[0-9]{1,9}")

# its warnings are about single answers, and what became of those is in the ledger
logging.getLogger("urllib3").setLevel(logging.ERROR)


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

    The time allowed for an address is spent by asking, redirects and further attempts included,
    and not by waiting for a turn at its host, between attempts, or for a cut network. A name server
    that does not answer may hold a thread longer, by its resolver's own limit.

    `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` are respected. What a name behind a
    proxy leads to is then the proxy's to check; addresses in numbers are checked here all the same.

    Args:
        manners: how often and how long to ask.
        max_bytes: bodies above this are given up.
        respect: signals of those who publish an image that are obeyed.
        clock: what attempts, hosts and a cut network are waited for with; the time allowed for an
            address is not measured by it.

    Raises:
        PmdError: `contact` cannot be sent, or `connect_to` or a proxy is no address.
    """

    def __init__(
        self,
        manners: Fetch,
        max_bytes: int,
        respect: Collection[Signal] = SIGNALS,
        clock: Clock | None = None,
    ) -> None:
        self._manners = manners
        self._max_bytes = max_bytes
        self._respect = respect
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._turns = Turns(Hosts(manners.per_host, self._delay), self._clock)
        self._robots = RobotsCache[Refused]()
        self._asking: dict[str, threading.Lock] = {}
        self._diverted = {
            pattern: Origin.of(place, f"fetch.connect_to, {pattern!r}")
            for pattern, place in manners.connect_to.items()
        }
        headers = {"User-Agent": user_agent(manners.contact), "Accept-Encoding": "identity"}
        self._direct = pools(headers, manners.per_host, self._origin)
        self._proxies = proxies(headers, manners.per_host)

    def get(self, url: str) -> Fetched:
        """The body behind `url`, after redirects.

        Raises:
            RecordError: there is none to be had; `kind` is one of `format.FAILED`.
        """
        allowance = _Allowance(self._manners.timeout)
        attempt = 0
        while True:
            try:
                return self._followed(url, allowance, self._admit, self._image)
            except GivenUp as given_up:
                detail = "the host is in trouble and left alone for now"
                raise RecordError(given_up.kind, detail) from given_up
            except Refused as refusal:
                if isinstance(refusal, Unreached) and self._turns.is_cut():
                    allowance = _Allowance(self._manners.timeout)
                    continue  # it says nothing of this address, and the next turn waits
                last = attempt == self._manners.retries or allowance.seconds <= 0
                if last or not refusal.may_pass:
                    raise RecordError(refusal.kind, refusal.detail) from refusal
                if refusal.retry_after is None:  # else the next turn waits
                    self._clock.sleep(2.0**attempt * random.uniform(0.5, 1.0))
            attempt += 1

    def _followed(
        self,
        url: str,
        allowance: "_Allowance",
        admit: "Callable[[_Target, _Allowance], None]",
        take: "Callable[[_Target, urllib3.BaseHTTPResponse], _Taken]",
    ) -> _Taken:
        """What `take` makes of the last answer; `admit` refuses addresses on the way."""
        for _ in range(_MOST_REDIRECTS + 1):
            target = _Target.of(url)
            admit(target, allowance)
            with self._asked(target, allowance) as response:
                location = response.get_redirect_location()
                if not location:
                    return take(target, response)
                _settle(response)
            url = _joined(target.url, location)
        raise Refused("redirects", f"more than {_MOST_REDIRECTS} redirects")

    def _admit(self, target: "_Target", allowance: "_Allowance") -> None:
        if urlsplit(target.url)._replace(query="").geturl().endswith(PLACEHOLDER_URLS):
            raise Refused("placeholder", "the address is that of a removed picture")
        if "robots" in self._respect and not self._robots_of(target, allowance).allows(target.path):
            raise Refused("robots", f"robots.txt of {target.host} forbids it")

    def _robots_of(self, target: "_Target", allowance: "_Allowance") -> Robots:
        """The rules of a host, asked by one thread for all."""
        since = time.monotonic()
        with self._lock:
            asking = self._asking.setdefault(target.origin, threading.Lock())
        with asking:
            with self._lock:
                reading = self._robots.get(target.origin, since, time.monotonic())
            if reading is None:
                reading = self._asked_robots(target, allowance)
                with self._lock:
                    self._robots.put(target.origin, reading, time.monotonic())
        with self._lock:
            self._asking.pop(target.origin, None)
        if isinstance(reading, Refused):
            raise type(reading)(
                reading.kind, reading.detail, reading.retry_after, may_pass=reading.may_pass
            )
        return reading

    def _asked_robots(self, target: "_Target", allowance: "_Allowance") -> Robots | Refused:
        seconds = min(_LONGEST_ROBOTS, allowance.left())
        mine = _Allowance(seconds)
        try:
            return self._followed(
                f"{target.origin}/robots.txt",
                mine,
                lambda _target, _allowance: None,
                lambda _target, response: Robots.of(_start_of(response, ROBOTS_BYTES)),
            )
        except Refused as refusal:
            return refusal if refusal.kind in _UNKNOWN else Robots()
        finally:
            allowance.seconds -= seconds - mine.seconds

    @contextmanager
    def _asked(
        self, target: "_Target", allowance: "_Allowance"
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """The answer's head, its body still to be read; what is left unread ends the connection."""
        way, address = self._way(target)
        with (
            self._turns.turn(target.host) as turn,
            allowance.spent() as seconds,
            _noted(turn),
            _as_refusals(target.host),
        ):
            response = way.request(
                "GET",
                address,
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(connect=min(seconds, LONGEST_CONNECT), total=seconds),
                preload_content=False,
                decode_content=False,
            )
            try:
                turn.ending = Ending.ANSWERED
                if response.status in {429, 503}:
                    turn.ending, turn.kind = Ending.BUSY, _kind_of(response.status)
                    turn.retry_after = _retry_after(response)
                yield response
            finally:
                response.close()
                response.release_conn()

    def _way(self, target: "_Target") -> tuple[urllib3.PoolManager, str]:
        """Whom to ask, and by which address."""
        origin = self._origin(target.host)
        if origin:
            scheme = origin.scheme or target.scheme
            return self._direct, urlsplit(target.url)._replace(scheme=scheme).geturl()
        proxy = self._proxies.get(target.scheme)
        if proxy is None or urllib.request.proxy_bypass(target.host):
            return self._direct, target.url
        if not _may_be_public(target.host):
            raise Refused("blocked_address", f"{target.host} is not on the public internet")
        return proxy, target.url

    def _origin(self, host: str) -> "Origin | None":
        for pattern, origin in self._diverted.items():
            if fnmatch.fnmatchcase(host.rstrip("."), pattern):
                return origin
        return None

    def _delay(self, host: str) -> float:
        if self._origin(host):
            return 0.0  # who stands in for the host is the user's own
        delays = self._manners.delay.items()
        return max((d for pattern, d in delays if fnmatch.fnmatchcase(host, pattern)), default=0.0)

    def _image(self, target: "_Target", response: urllib3.BaseHTTPResponse) -> Fetched:
        _check_status(response)
        self._check_consent(response)
        return Fetched(self._body(response), target.url)

    def _check_consent(self, response: urllib3.BaseHTTPResponse) -> None:
        headers = response.headers
        if "x-robots-tag" in self._respect:
            word = refusal_in_tags(headers.getlist("X-Robots-Tag"))
            if word:
                raise Refused("opt_out", f"X-Robots-Tag: {word}")
        if "tdm" in self._respect and is_reserved(headers.getlist("TDM-Reservation")):
            policy = " ".join(headers.getlist("TDM-Policy"))[:_LONGEST_POLICY]
            terms = f", terms at {policy!r}" if policy else ""
            raise Refused("opt_out", f"TDM-Reservation: 1{terms}")

    def _body(self, response: urllib3.BaseHTTPResponse) -> bytes:
        if (response.length_remaining or 0) > self._max_bytes:
            raise self._too_large()
        body = bytearray()
        while chunk := response.read1(_CHUNK):
            body += chunk
            if len(body) > self._max_bytes:
                raise self._too_large()
        if not body:
            raise Refused("empty", "the answer has no body")
        packing = response.headers.get("Content-Encoding", "")
        content = _unpacked(bytes(body), packing, self._max_bytes)
        if len(content) > self._max_bytes:
            raise self._too_large()
        if hashlib.md5(content, usedforsecurity=False).hexdigest() in PLACEHOLDER_MD5:
            raise Refused("placeholder", "the bytes are those of a removed picture")
        return content

    def _too_large(self) -> Refused:
        return Refused("too_large", f"more than {self._max_bytes} bytes")


def user_agent(contact: str) -> str:
    """What we call ourselves: honest, and with the user's contact where they gave one.

    Raises:
        PmdError: the contact cannot be part of a header.
    """
    if not (contact.isascii() and contact.isprintable()):
        raise PmdError(f"fetch.contact = {contact!r}: write it in ASCII, without line breaks")
    name = f"{PRODUCT}/{version('pmd-flava')} (research dataset builder"
    return f"{name}; {contact})" if contact else f"{name})"


@dataclass
class _Allowance:
    """The seconds that asking for one address may still take."""

    seconds: float

    def left(self) -> float:
        """The seconds, of which there are some."""
        if self.seconds <= 0:
            raise Refused("timeout", "no whole answer in the time allowed")
        return self.seconds

    @contextmanager
    def spent(self) -> Iterator[float]:
        """The seconds there are; those that the context takes are gone."""
        left = self.left()
        started = time.monotonic()
        try:
            yield left
        finally:
            self.seconds -= time.monotonic() - started


@dataclass(frozen=True)
class _Target:
    """An address that may be asked, in ASCII."""

    url: str
    scheme: str
    host: str
    origin: str

    @property
    def path(self) -> str:
        """What is asked of the host: path and query."""
        return "/" + self.url.removeprefix(self.origin).removeprefix("/")

    @classmethod
    def of(cls, url: str) -> "_Target":
        try:
            named, asked = urlsplit(url.strip()), urlsplit(url_id(url))
            port = named.port
        except ValueError as error:
            raise Refused("blocked_address", "not an address that can be asked") from error
        if named.scheme not in {"http", "https"} or not named.hostname:
            raise Refused("blocked_address", "only http and https addresses are asked")
        if named.username is not None or named.password is not None:
            raise Refused("blocked_address", "an address with a user name")
        host = _ascii_host(named.hostname)
        place = f"[{host}]" if ":" in host else host
        if port is not None and (named.scheme, port) not in {("http", 80), ("https", 443)}:
            place = f"{place}:{port}"
        address = urlunsplit((named.scheme, place, asked.path, asked.query, ""))
        return cls(address, named.scheme, host, f"{named.scheme}://{place}")


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
        raise Refused("dns", "not a name that a host can have") from error
    if not _HOST.fullmatch(host):
        raise Refused("dns", "not a name that a host can have")
    return host


def _joined(url: str, location: str) -> str:
    """Where a redirect leads; http.client reads headers as Latin-1, hosts write UTF-8."""
    with suppress(UnicodeError):  # then it was Latin-1
        location = location.encode("latin-1").decode()
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise Refused("blocked_address", "a redirect to no address") from error


def _check_status(response: urllib3.BaseHTTPResponse) -> None:
    if response.status not in {200, 203}:
        _settle(response)
        raise Refused(_kind_of(response.status), f"HTTP {response.status}", _retry_after(response))


def _kind_of(status: int) -> str:
    if status in {403, 404, 410, 429}:
        return f"http_{status}"
    if status in {204, 205}:
        return "empty"
    return "http_5xx" if 500 <= status < 600 else "http_4xx"  # some hosts answer 999


def _retry_after(response: urllib3.BaseHTTPResponse) -> float | None:
    """The seconds that the server wants us to wait, which it may state as a date."""
    value = response.headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _settle(response: urllib3.BaseHTTPResponse) -> None:
    """Read the rest of an answer that nobody wants if it is short, so its connection lives on."""
    read = 0
    try:
        while read <= _CHUNK and (chunk := response.read1(_CHUNK)):
            read += len(chunk)
    except (urllib3.exceptions.HTTPError, OSError):
        return  # the head has told what there was to know


def _start_of(response: urllib3.BaseHTTPResponse, most: int) -> bytes:
    """The body of a good answer, or a little more than `most` bytes of it."""
    _check_status(response)
    body = bytearray()
    while len(body) <= most and (chunk := response.read1(_CHUNK)):
        body += chunk
    return _unpacked(bytes(body), response.headers.get("Content-Encoding", ""), most)


def _unpacked(body: bytes, encoding: str, most: int) -> bytes:
    """The body without the packing that some hosts add unasked, and at most one byte above `most`.

    A body that is not packed, whatever its header says, stays as it is.
    """
    if encoding.strip().lower() not in {"gzip", "x-gzip", "deflate"}:
        return body
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(body, most + 1) or body
    except zlib.error:
        return body


@contextmanager
def _noted(turn: Turn) -> Iterator[None]:
    """Note in the turn what went wrong with its request, if it is the host's trouble."""
    try:
        yield
    except Refused as refusal:
        if refusal.kind in {"connect", "dns", "timeout"}:
            turn.kind = refusal.kind
            turn.ending = Ending.SILENT if isinstance(refusal, Unreached) else Ending.BROKEN
        raise


@contextmanager
def _as_refusals(host: str) -> Iterator[None]:
    """Turn what urllib3 raises into kinds, in words that are the same on every run."""
    try:
        yield
    except (urllib3.exceptions.TimeoutError, TimeoutError) as error:
        raise Refused("timeout", "no whole answer in the time allowed") from error
    except (urllib3.exceptions.SSLError, ssl.SSLError) as error:
        cause = error.args[0] if error.args else None
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            raise Refused("connect", f"the connection to {host} broke") from error
        raise Refused("tls", f"TLS with {host} failed") from error
    except urllib3.exceptions.LocationValueError as error:
        raise Refused("blocked_address", "not an address that can be asked") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Refused("connect", f"the connection to {host} broke") from error


def _may_be_public(host: str) -> bool:
    """Say whether `host` is a name, or a public IP address in any notation that resolvers know."""
    if host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return is_public(host if ":" in host else socket.inet_ntoa(socket.inet_aton(host)))
    except OSError:
        return True
