"""Upstream's annotation files, downloaded where upstream allows it: resumed, checked, whole."""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import urllib3

from pmd_pipeline.base.parallel import OnProgress
from pmd_pipeline.base.user_agent import user_agent
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import (
    Annotations,
    PublishedFile,
    Source,
    find_annotations,
    load,
)
from pmd_pipeline.sources.upstream.files import find, fits
from pmd_pipeline.sources.upstream.held_out import KARPATHY_FILE

_CHUNK = 1 << 20
_TIMEOUT = urllib3.Timeout(connect=20.0, read=60.0)
_REDIRECTS = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5)
_PASSING = frozenset({429, 500, 502, 503, 504})
"""Statuses that may pass on their own."""

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)")
_TRIES = 4
"""Attempts in a row without a new byte, after which a server is left alone."""


def download_annotations(
    source: Source, raw: str, form: str | None, contact: str, on_progress: OnProgress
) -> tuple[Annotations, list[str]]:
    """Download the annotation files that the folder `raw` lacks; the files, and warnings.

    Nothing is asked for where a form is complete already, or where a required file has no address.
    Where the source shares images with COCO, Karpathy's split, which tells the held-out ones, comes
    into the folder `coco` beside `raw`; without it, the build can go on.

    Raises:
        PmdError: upstream does not give a file, or gives another than the known one.
    """
    try:
        found = find_annotations(source, raw, form)
    except PmdError:
        entries = source.downloadable(form)
        download_all(_absent(entries, raw), raw, contact, on_progress, source.info.by_hand)
        found = find_annotations(source, raw, form)
    if not source.info.shares_coco or found.held_out:
        return found, []
    try:
        _download_split(raw, contact, on_progress)
    except PmdError as error:
        return found, [f"{source.name} goes on without {KARPATHY_FILE}: {error}"]
    return find_annotations(source, raw, form), []


def download_all(
    entries: Sequence[PublishedFile],
    raw: str,
    contact: str,
    on_progress: OnProgress,
    by_hand: str = "",
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Download the files of `entries` into the folder `raw`.

    All of them appear together, the required ones last, so that a download cut short is never taken
    for a whole input. What an interrupted one has left, in hidden files, is gone on with.

    Args:
        by_hand: what a user can do where a server refuses.
        wait: sleeps between attempts; tests put a clock here.

    Raises:
        PmdError: a server refuses, the connection keeps breaking, a sha256 is wrong, or nothing can
            be written.
    """
    downloads = [_Download(entry, Path(raw), by_hand, wait) for entry in entries]
    for one in downloads:
        one.fetch(contact, on_progress)
    for one in sorted(downloads, key=lambda one: one.entry.required):
        one.appear()


class _Download:
    """One file on its way into `folder`: unfinished as `.NAME.part`, whole but hidden as `.NAME`.

    Hidden files are none to `upstream.find`.
    """

    def __init__(
        self, entry: PublishedFile, folder: Path, by_hand: str, wait: Callable[[float], None]
    ) -> None:
        assert entry.url
        self.entry = entry
        self._url = entry.url
        self._by_hand = by_hand or f"get it by hand and put it into {folder}"
        self._wait = wait
        self._final = folder / unquote(urlsplit(entry.url).path.rsplit("/", 1)[-1])
        self._hidden = folder / f".{self._final.name}"
        self._part = folder / f".{self._final.name}.part"

    def fetch(self, contact: str, on_progress: OnProgress) -> None:
        """Make the file whole, but leave it hidden.

        Raises:
            PmdError: see `download_all`.
        """
        if self._final.exists() or self._hidden.exists():
            return
        if not self._url.startswith(("https://", "http://")):
            raise PmdError(f"{self._url} is no http address: {self._by_hand}")
        with self._written() as file:
            self._complete(file, user_agent(contact), on_progress)
            file.flush()
            os.fsync(file.fileno())
            if self.entry.sha256 is not None:
                self._check(self.entry.sha256)
            self._part.replace(self._hidden)

    def appear(self) -> None:
        """Give the file its name."""
        if not self._final.exists():
            self._hidden.replace(self._final)

    @contextmanager
    def _written(self) -> Iterator[BinaryIO]:
        """The unfinished file, open at its end for this process alone."""
        try:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            with self._part.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield file
        except BlockingIOError as error:
            raise PmdError(
                f"{self._part} is being written by another process: wait until it is done"
            ) from error
        except OSError as error:
            raise PmdError(
                f"cannot write {self._part}: {error.strerror}; make room there or choose another "
                "--out, and run again"
            ) from error

    def _check(self, sha256: str) -> None:
        with self._part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            self._part.unlink()
            raise PmdError(
                f"{self._url} has sha256 {found} instead of {sha256}: upstream has changed it; if "
                f"you trust it, put it into {self._part.parent} yourself"
            )

    def _complete(self, file: BinaryIO, agent: str, on_progress: OnProgress) -> None:
        """Append until the file is whole."""
        tries, most = 0, file.tell()
        with urllib3.PoolManager() as pool:
            while True:
                try:
                    if self._append(pool, file, agent, on_progress):
                        return
                    trouble = "the file ends early"
                except (urllib3.exceptions.HTTPError, TimeoutError) as error:
                    trouble = _in_words(error)
                tries = 1 if file.tell() > most else tries + 1
                most = max(most, file.tell())
                if tries == _TRIES:
                    raise PmdError(
                        f"cannot download {self._url} ({trouble}): run the same command again to "
                        f"go on, or {self._by_hand}"
                    )
                self._wait(2.0 ** (tries - 1))

    def _append(
        self, pool: urllib3.PoolManager, file: BinaryIO, agent: str, on_progress: OnProgress
    ) -> bool:
        """Append what is missing; say whether the file is whole now."""
        have = file.tell()
        with pool.request(
            "GET",
            self._url,
            headers={"User-Agent": agent, "Accept-Encoding": "identity"}
            | ({"Range": f"bytes={have}-"} if have else {}),
            timeout=_TIMEOUT,
            retries=_REDIRECTS,
            preload_content=False,
            decode_content=False,
        ) as response:
            if response.status in _PASSING:
                raise urllib3.exceptions.HTTPError(f"HTTP {response.status}")
            if response.status not in {200, 206, 416}:
                raise PmdError(f"{self._url} answers HTTP {response.status}: {self._by_hand}")
            first, total = _range(response)
            if response.status == 416 and total == have:  # all of it was there before
                return True
            if first != have:  # the server knows no ranges, or has another file by now
                file.truncate(file.seek(0))
                have = 0
            if first != have:
                return False
            for chunk in response.stream(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                on_progress(self._url, {"bytes": have})
            return total in {have, None}


def _download_split(raw: str, contact: str, on_progress: OnProgress) -> None:
    """Download Karpathy's split into the folder `coco` beside `raw`."""
    entries, beside = load("coco").files_of("karpathy"), str(Path(raw).parent / "coco")
    assert any(entry.pattern == KARPATHY_FILE for entry in entries)
    download_all(_absent(entries, beside), beside, contact, on_progress)


def _absent(entries: Sequence[PublishedFile], raw: str) -> list[PublishedFile]:
    """The entries that no file under `raw` fits: what a user put there is not asked for."""
    files = find(raw)
    return [entry for entry in entries if not any(fits(file, entry.pattern) for file in files)]


def _range(response: urllib3.BaseHTTPResponse) -> tuple[int | None, int | None]:
    """Where the answer begins in the file and how long the file is, where the server says so."""
    if response.status == 200:
        return 0, response.length_remaining
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    first, total = found.groups() if found else (None, None)
    return int(first) if first else None, int(total) if total else None


def _in_words(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    name = type(reason if isinstance(reason, Exception) else error).__name__
    return str(error) if name == "HTTPError" else name
