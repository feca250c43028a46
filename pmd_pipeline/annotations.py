"""Upstream's annotation files, downloaded where upstream allows it: resumed, checked, whole."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import urllib3

from pmd_pipeline import sources
from pmd_pipeline.errors import PmdError
from pmd_pipeline.fetch import user_agent
from pmd_pipeline.parallel import Watch
from pmd_pipeline.sources import Published, Source

_CHUNK = 1 << 20
_TIMEOUT = urllib3.Timeout(connect=20.0, read=60.0)
_TRIES = 5


def ensure(source: Source, raw: str, form: str | None, contact: str, watch: Watch) -> list[str]:
    """Download what the source needs and `raw` lacks; the names of the files that came.

    Nothing is asked for where a form is complete already, or where a needed file has no address.

    Raises:
        PmdError: upstream does not give a file, or gives another than the known one.
    """
    try:
        sources.find_spans(source, raw, form)
    except PmdError:
        wanted = _downloadable(source, form)
    else:
        return []
    for entry in wanted:
        download(entry, raw, contact, watch)
    return [file_name(entry) for entry in wanted]


def download(entry: Published, raw: str, contact: str, watch: Watch) -> Path:
    """The file of `entry` in the folder `raw`, fetched if it is not there.

    What an interrupted download left is gone on with.

    Raises:
        PmdError: the server refuses, the connection keeps breaking, or the sha256 is wrong.
    """
    assert entry.url
    target = Path(raw) / file_name(entry)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    _complete(entry.url, partial, contact, watch)
    if entry.sha256 and (found := _sha256(partial)) != entry.sha256:
        partial.unlink()
        raise PmdError(
            f"{entry.url} has sha256 {found} instead of {entry.sha256}: upstream has changed; "
            f"if you trust it, put the file into {raw} yourself"
        )
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)
    return target


def file_name(entry: Published) -> str:
    """The name that a download gets: the last part of its address's path."""
    return urlsplit(entry.url or "").path.rsplit("/", 1)[-1]


def _downloadable(source: Source, form: str | None) -> list[Published]:
    """The files with an address of the first form whose needed files all have one."""
    for name in dict.fromkeys(entry.form for entry in source.info.published):
        entries = [entry for entry in source.info.published if entry.form == name]
        if form in {None, name} and all(entry.url for entry in entries if entry.needed):
            return [entry for entry in entries if entry.url]
    return []


def _complete(url: str, partial: Path, contact: str, watch: Watch) -> None:
    """Fetch `url` into `partial`, going on where it ends."""
    with urllib3.PoolManager(headers={"User-Agent": user_agent(contact)}) as pool:
        for attempt in range(_TRIES):
            try:
                with partial.open("ab") as file:
                    if _appended(pool, url, file, watch):
                        return
            except (urllib3.exceptions.HTTPError, TimeoutError) as error:
                if attempt == _TRIES - 1:
                    raise PmdError(
                        f"cannot download {url} ({type(error).__name__}): run the same command "
                        "again to go on, or get the file by hand"
                    ) from error
            except OSError as error:
                raise PmdError(f"cannot write {partial}: {error.strerror}") from error
    raise PmdError(f"{url} keeps ending early: run the same command again to go on")


def _appended(pool: urllib3.PoolManager, url: str, file: BinaryIO, watch: Watch) -> bool:
    """Append what is missing; say whether the file is whole now."""
    have = file.tell()
    response = pool.request(
        "GET",
        url,
        headers={"Range": f"bytes={have}-"} if have else {},
        timeout=_TIMEOUT,
        preload_content=False,
        decode_content=False,
    )
    with response:
        if response.status == 416:  # nothing is left after `have`
            return True
        if response.status == 200 and have:
            file.truncate(0)  # a server without ranges begins anew
            have = 0
        elif response.status not in {200, 206}:
            raise PmdError(
                f"{url} answers HTTP {response.status}: upstream may have moved the file; "
                "see `pmd sources` and get it by hand"
            )
        for chunk in response.stream(_CHUNK):
            file.write(chunk)
            have += len(chunk)
            watch(url, {"bytes": have})
        return not response.length_remaining


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
