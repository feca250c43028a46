"""Verified files of a dataset: local ones are read in place, others are copied into a cache.

The workers of all ranks of a machine share it. The first process that needs a file verifies or
copies it, the others wait. Processes coordinate by file locks and file names only, so a killed
process leaves no stale state.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import FileUnreadableError, filesystem_of, reading

_CHUNK = 1 << 22
_STAMP_SECONDS = 24 * 3600.0
"""How long a verified file is not verified again on a machine: for one run's ranks and resumes."""

_COPY_NAME = re.compile(r"[0-9a-f]{64}(\.\w+)?(\.part)?")
"""Names of copies, finished and unfinished."""

RETRY_SECONDS = (1.0, 10.0)
"""Pauses before the second and third attempt to read a remote file."""

_MAX_EVICTIONS = 10
"""Attempts to open a copy that other processes remove to make room."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ExpectedFile:
    """A file by its address and the SHA-256 of its content, as hex."""

    address: str
    sha256: str


@dataclass(frozen=True)
class FileCache:
    """Local paths of verified files.

    Args:
        folder: for copies of files that are not on this machine; other files in it are not touched.
        max_bytes: size limit of all copies; the least recently used are removed.
        verify: compare the SHA-256 of local files, at most once a day each. Copies are always
            compared while they are made.
    """

    folder: Path | None = None
    max_bytes: int = 200 << 30
    verify: bool = True

    def prefetch(self, files: Sequence[ExpectedFile]) -> None:
        """Verify or copy files before they are needed; each process starts at another one."""
        begin = os.getpid() % max(1, len(files))
        for file in (*files[begin:], *files[:begin]):
            self.path(file)

    def path(self, file: ExpectedFile) -> Path:
        """The local path of a file. A copy may be removed at any time: open it at once.

        Raises:
            PmdError: the file is missing, its content has changed, or the cache is too small.
        """
        filesystem, path = filesystem_of(file.address)
        if isinstance(filesystem, LocalFileSystem):
            if self.verify:
                _verify(Path(path), file)
            return Path(path)
        if self.folder is None:
            raise PmdError(
                f"{file.address} is not on this machine: set data.cache (in Python, `cache`) to a "
                "folder for copies"
            )
        return self._copy(filesystem, path, file, self.folder)

    def open(self, file: ExpectedFile, opener: Callable[[Path], _Result]) -> _Result:
        """The result of `opener`, called with the local path of the file.

        Raises:
            PmdError: as for `path`, or the file cannot be opened.
        """
        for _ in range(_MAX_EVICTIONS):
            path = self.path(file)
            try:
                return opener(path)
            except FileNotFoundError:
                if path.parent != self.folder:
                    raise PmdError(f"{path} is missing: run `pmd build` again") from None
                # else another process has removed the copy to make room
            except OSError as error:
                raise PmdError(f"cannot read {path}: {error.strerror or error}") from error
        raise self._too_small()

    def _copy(
        self, filesystem: fsspec.AbstractFileSystem, path: str, file: ExpectedFile, folder: Path
    ) -> Path:
        target = folder / (file.sha256 + Path(path).suffix)
        part = target.with_name(f"{target.name}.part")
        with _writing(folder):
            with suppress(FileNotFoundError):
                os.utime(target)
                return target
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(part) as out:
                if target.exists():  # another process made it meanwhile
                    part.unlink(missing_ok=True)
                    return target
                size = _with_retries(file.address, lambda: int(filesystem.size(path)))
                with _locked(folder / "lock"):
                    self._make_room(size, folder, part)
                    out.truncate(size)  # reserves the bytes: `_make_room` counts them
                sha256 = _with_retries(
                    file.address, lambda: _download_to_cache(filesystem, path, out, folder)
                )
                if sha256 != file.sha256:
                    part.unlink()
                    raise _changed(file.address)
                part.replace(target)
        return target

    def _make_room(self, size: int, folder: Path, part: Path) -> None:
        """Remove the least recently used copies until `size` bytes more fit, `part` not counted."""
        copies = []
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # another process has renamed or removed it
                if path != part and _COPY_NAME.fullmatch(path.name) and path.is_file():
                    copies.append((path.stat(), path))
        total = sum(stat.st_size for stat, _ in copies)
        for stat, path in sorted(copies, key=lambda copy: copy[0].st_mtime_ns):
            if total + size <= self.max_bytes:
                return
            if _remove_copy(path):
                total -= stat.st_size
        if total + size > self.max_bytes:
            raise self._too_small()

    def _too_small(self) -> PmdError:
        return PmdError(
            f"a cache of {self.max_bytes / 2**30:.3g} GiB does not hold the shards in use: raise "
            "data.cache_gib (in Python, `cache_gib`), or lower data.window_shards"
        )


def _verify(path: Path, file: ExpectedFile) -> None:
    """Compare the content with its SHA-256, unless a process of this machine did so recently."""
    try:
        stat = path.stat()
    except OSError as error:
        raise PmdError(f"cannot read {path}: {error.strerror}; run `pmd build` again") from error
    identity = f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {file.sha256}"
    name = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
    with _locked_stamp(name) as stamp:
        if stamp and stamp.read():
            age = time.time() - os.fstat(stamp.fileno()).st_mtime
            if age < _STAMP_SECONDS:
                return
        with path.open("rb", buffering=0) as content:
            if _sha256_of_file(content) != file.sha256:
                raise _changed(str(path))
        if stamp:
            stamp.seek(0)
            stamp.write(b"ok")


@contextmanager
def _locked_stamp(name: str) -> Iterator[BinaryIO | None]:
    """A locked file of this user's; None where it cannot be created, so every process verifies."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(home).expanduser() / "flava_train" / "verified"
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a+b")
        fcntl.flock(file, fcntl.LOCK_EX)
    except (OSError, RuntimeError):  # no space, no locks, or no home folder
        yield None
        return
    with file:
        file.seek(0)
        yield file


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, created if necessary and locked by this process."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # renamed or removed while this process waited
    with file:
        yield file


def _remove_copy(path: Path) -> bool:
    """Remove a finished copy, or one whose process has died."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".part":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:  # another process is writing it, or has removed it
        return False
    return True


def _download_to_cache(
    filesystem: fsspec.AbstractFileSystem, path: str, target: BinaryIO, folder: Path
) -> str:
    """Copy the file at `path` to `target` in `folder`; return the SHA-256 of its content."""
    digest = hashlib.sha256()
    end = 0
    with filesystem.open(path, "rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            with _writing(folder):
                while chunk:
                    written = os.pwrite(target.fileno(), chunk, end)
                    end, chunk = end + written, chunk[written:]
    with _writing(folder):
        target.truncate(end)
    return digest.hexdigest()


def _sha256_of_file(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    while count := file.readinto(view):  # type: ignore[attr-defined]  # an unbuffered file has it
        digest.update(view[:count])
    return digest.hexdigest()


def _with_retries(address: str, attempt: Callable[[], _Result]) -> _Result:
    """The result of `attempt`, which reads from `address`; an error of the last one is raised."""
    for pause in RETRY_SECONDS:
        with suppress(FileUnreadableError), reading(address):
            return attempt()
        time.sleep(pause)
    with reading(address):
        return attempt()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PmdError(
            f"cannot write to data.cache = {folder}: {error.strerror or error}; free disk space, "
            "or name a folder that you may write to"
        ) from error


def _changed(address: str) -> PmdError:
    return PmdError(
        f"{address} is not the file that the manifest names: its sha256 differs; build or copy it "
        "again"
    )
