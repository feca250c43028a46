"""Downloads of upstream annotation files: resumed, checked, and moved into place when whole."""

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
from pmd_pipeline.sources.upstream.files import list_files, matches
from pmd_pipeline.sources.upstream.held_out import KARPATHY_FILE

_CHUNK = 1 << 20
_TIMEOUT = urllib3.Timeout(connect=20.0, read=60.0)
_REDIRECTS = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5)
_TRANSIENT = frozenset({429, 500, 502, 503, 504})
"""Statuses after which another attempt may succeed."""

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)")
_MAX_ATTEMPTS = 4
"""Attempts in a row without a new byte, after which the download fails."""


def download_annotations(
    source: Source, folder: str, form: str | None, contact: str, on_progress: OnProgress
) -> tuple[Annotations, list[str]]:
    """Download the annotation files that the folder `folder` lacks; the files, and warnings.

    No request is made if a form is complete, or if a required file has no address. If the source
    shares images with COCO, Karpathy's split is downloaded into the folder `coco` beside `folder`;
    if that fails, the build can go on.

    Raises:
        PmdError: no form is complete, upstream refuses a file, or a file has another SHA-256.
    """
    try:
        annotations = find_annotations(source, folder, form)
    except PmdError:
        entries = source.downloadable(form)
        download_all(_missing(entries, folder), folder, contact, on_progress, source.info.by_hand)
        annotations = find_annotations(source, folder, form)
    if not source.info.shares_coco or annotations.held_out:
        return annotations, []
    try:
        _download_split(folder, contact, on_progress)
    except PmdError as error:
        return annotations, [f"{source.name} goes on without {KARPATHY_FILE}: {error}"]
    return find_annotations(source, folder, form), []


def download_all(
    entries: Sequence[PublishedFile],
    folder: str,
    contact: str,
    on_progress: OnProgress,
    by_hand: str = "",
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Download the files of `entries` into the folder `folder`.

    All files appear together, the required ones last, so an interrupted download never looks
    complete. The hidden files of an interrupted download are continued.

    Args:
        by_hand: what a user can do if a server refuses.
        wait: sleeps between attempts; replaced in tests.

    Raises:
        PmdError: a server refuses, the connection keeps breaking, a sha256 is wrong, or nothing can
            be written.
    """
    downloads = [_FileDownload(entry, Path(folder), by_hand, wait) for entry in entries]
    for download in downloads:
        download.fetch(contact, on_progress)
    for download in sorted(downloads, key=lambda download: download.entry.required):
        download.publish()


class _FileDownload:
    """The download of one file into `folder`: partial as `.NAME.part`, whole but hidden as `.NAME`.

    `list_files` leaves hidden files out.
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
        """Download the file to its hidden name.

        Raises:
            PmdError: see `download_all`.
        """
        if self._final.exists() or self._hidden.exists():
            return
        if not self._url.startswith(("https://", "http://")):
            raise PmdError(f"{self._url} is not an http address: {self._by_hand}")
        with self._open_partial() as file:
            self._download_rest(file, user_agent(contact), on_progress)
            file.flush()
            os.fsync(file.fileno())
            if self.entry.sha256 is not None:
                self._check_sha256(self.entry.sha256)
            self._part.replace(self._hidden)

    def publish(self) -> None:
        """Move the file to its final name."""
        if not self._final.exists():
            self._hidden.replace(self._final)

    @contextmanager
    def _open_partial(self) -> Iterator[BinaryIO]:
        """The partial file, open at its end, locked by this process."""
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

    def _check_sha256(self, sha256: str) -> None:
        with self._part.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != sha256:
            self._part.unlink()
            raise PmdError(
                f"{self._url} has sha256 {actual} instead of {sha256}: upstream has changed it; if "
                f"you trust it, put it into {self._part.parent} yourself"
            )

    def _download_rest(self, file: BinaryIO, agent: str, on_progress: OnProgress) -> None:
        """Append to the file until it is whole."""
        attempts, max_size = 0, file.tell()
        with urllib3.PoolManager() as pool:
            while True:
                try:
                    if self._append(pool, file, agent, on_progress):
                        return
                    problem = "the file ends early"
                except (urllib3.exceptions.HTTPError, TimeoutError) as error:
                    problem = _describe_error(error)
                attempts = 1 if file.tell() > max_size else attempts + 1
                max_size = max(max_size, file.tell())
                if attempts == _MAX_ATTEMPTS:
                    raise PmdError(
                        f"cannot download {self._url} ({problem}): run the same command again to "
                        f"go on, or {self._by_hand}"
                    )
                self._wait(2.0 ** (attempts - 1))

    def _append(
        self, pool: urllib3.PoolManager, file: BinaryIO, agent: str, on_progress: OnProgress
    ) -> bool:
        """Append the missing bytes; returns whether the file is whole."""
        size = file.tell()
        with pool.request(
            "GET",
            self._url,
            headers={"User-Agent": agent, "Accept-Encoding": "identity"}
            | ({"Range": f"bytes={size}-"} if size else {}),
            timeout=_TIMEOUT,
            retries=_REDIRECTS,
            preload_content=False,
            decode_content=False,
        ) as response:
            if response.status in _TRANSIENT:
                raise urllib3.exceptions.HTTPError(f"HTTP {response.status}")
            if response.status not in {200, 206, 416}:
                raise PmdError(f"{self._url} answers HTTP {response.status}: {self._by_hand}")
            first, total = _content_range(response)
            if response.status == 416 and total == size:  # it was complete before
                return True
            if first != size:  # the server has no ranges, or another file now
                file.truncate(file.seek(0))
                size = 0
            if first != size:
                return False
            for chunk in response.stream(_CHUNK):
                file.write(chunk)
                size += len(chunk)
                on_progress(self._url, {"bytes": size})
            return total in {size, None}


def _download_split(folder: str, contact: str, on_progress: OnProgress) -> None:
    """Download Karpathy's split into the folder `coco` beside `folder`."""
    entries, beside = load("coco").files_of("karpathy"), str(Path(folder).parent / "coco")
    assert any(entry.pattern == KARPATHY_FILE for entry in entries)
    download_all(_missing(entries, beside), beside, contact, on_progress)


def _missing(entries: Sequence[PublishedFile], folder: str) -> list[PublishedFile]:
    """The entries that no file under `folder` matches; what the user has is not downloaded."""
    files = list_files(folder)
    return [entry for entry in entries if not any(matches(file, entry.pattern) for file in files)]


def _content_range(response: urllib3.BaseHTTPResponse) -> tuple[int | None, int | None]:
    """Offset of the response in the file, and the file's size, where the server states them."""
    if response.status == 200:
        return 0, response.length_remaining
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    first, total = match.groups() if match else (None, None)
    return int(first) if first else None, int(total) if total else None


def _describe_error(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    name = type(reason if isinstance(reason, Exception) else error).__name__
    return str(error) if name == "HTTPError" else name
