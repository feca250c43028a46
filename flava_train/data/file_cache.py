"""Files of a dataset on this machine, whole and unchanged: read in place, or copied into a cache.

Many processes share a machine: the workers of all ranks. Each file is checked once, or copied
once, by whoever comes first; the others wait for that. All agreement is by locks and names of
files, so nothing is left over by a process that is killed.
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
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pmd_pipeline.contract.errors import PmdError

_CHUNK = 1 << 22
_STAMP_SECONDS = 24 * 3600.0
"""How long a machine remembers that a file was as it should be: for one run's ranks and resumes."""

_COPY = re.compile(r"[0-9a-f]{64}(\.\w+)?(\.part)?")
"""Names of copies, and of those being made."""

RETRY_SECONDS = (1.0, 10.0)
"""Seconds before a file elsewhere, of which no answer came, is asked for again."""

_Opened = TypeVar("_Opened")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class ExpectedFile:
    """A file by its address and the sha256 of its content, as hex."""

    address: str
    sha256: str


@dataclass(frozen=True)
class FileCache:
    """Where files lie on this machine.

    Args:
        cache: folder for copies of what lies elsewhere; other files in it are let alone.
        max_bytes: of all copies; the least recently used give way.
        verify: compare the sha256 of files of this machine, at most once a day each. Copies are
            always compared, while they are made.
    """

    cache: Path | None = None
    max_bytes: int = 200 << 30
    verify: bool = True

    def fetch(self, wanted: Sequence[ExpectedFile]) -> None:
        """Check or copy files before they are needed; other workers begin with other files."""
        begin = os.getpid() % max(1, len(wanted))
        for one in (*wanted[begin:], *wanted[:begin]):
            self.path(one)

    def path(self, wanted: ExpectedFile) -> Path:
        """Where the file lies. A copy may give way to others at any time: open it at once.

        Raises:
            PmdError: it is not there, or not what it should be, or the cache is too small.
        """
        filesystem, place = _filesystem(wanted.address)
        if isinstance(filesystem, LocalFileSystem):
            here = Path(place)
            if self.verify:
                _check(here, wanted)
            return here
        if self.cache is None:
            raise PmdError(
                f"{wanted.address} is not on this machine: set data.cache to a folder for copies"
            )
        return self._copy(filesystem, place, wanted, self.cache)

    def open(self, wanted: ExpectedFile, opener: Callable[[Path], _Opened]) -> _Opened:
        """What `opener` makes of the path of the file.

        Raises:
            PmdError: as for `path`, or it cannot be read.
        """
        for _ in range(10):
            path = self.path(wanted)
            try:
                return opener(path)
            except FileNotFoundError:
                if path.parent != self.cache:
                    raise PmdError(f"{path} is missing: run `pmd build` again") from None
                # else it gave way to another copy just now
            except OSError as error:
                raise PmdError(f"cannot read {path}: {error.strerror or error}") from error
        raise _too_small(self)

    def _copy(
        self, filesystem: fsspec.AbstractFileSystem, place: str, wanted: ExpectedFile, cache: Path
    ) -> Path:
        target = cache / (wanted.sha256 + Path(place).suffix)
        part = target.with_name(f"{target.name}.part")
        with _writing(cache):
            with suppress(FileNotFoundError):
                os.utime(target)
                return target
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(part) as file:
                if target.exists():  # another process made it meanwhile
                    part.unlink(missing_ok=True)
                    return target
                address = wanted.address
                size = _patiently(address, lambda: int(filesystem.size(place)))
                with _locked(cache / "lock"):
                    self._make_room(size, cache, part)
                    file.truncate(size)  # from now on it counts
                found = _patiently(address, lambda: _copied(filesystem, place, file, cache))
                if found != wanted.sha256:
                    part.unlink()
                    raise _changed(address)
                part.replace(target)
        return target

    def _make_room(self, size: int, cache: Path, own: Path) -> None:
        """Remove what was used least recently until `size` bytes more are within the bound."""
        there = []
        for path in cache.iterdir():
            with suppress(FileNotFoundError):  # it has just been renamed or removed
                if path != own and _COPY.fullmatch(path.name) and path.is_file():
                    there.append((path.stat(), path))
        total = sum(stat.st_size for stat, _ in there)
        for stat, path in sorted(there, key=lambda one: one[0].st_mtime_ns):
            if total + size <= self.max_bytes:
                return
            if _removed(path):
                total -= stat.st_size
        if total + size > self.max_bytes:
            raise _too_small(self)


def _check(path: Path, wanted: ExpectedFile) -> None:
    """Compare the content with its sha256, unless a process of this machine did so lately."""
    try:
        stat = path.stat()
    except OSError as error:
        raise PmdError(f"cannot read {path}: {error.strerror}; run `pmd build` again") from error
    named = f"{path.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {wanted.sha256}"
    with _stamp(hashlib.sha256(named.encode(errors="surrogateescape")).hexdigest()) as file:
        if file and file.read():
            age = time.time() - os.fstat(file.fileno()).st_mtime
            if age < _STAMP_SECONDS:
                return
        with path.open("rb", buffering=0) as content:
            if _digest(content) != wanted.sha256:
                raise _changed(str(path))
        if file:
            file.seek(0)
            file.write(b"ok")


@contextmanager
def _stamp(name: str) -> Iterator[BinaryIO | None]:
    """A file of this user's, locked; None where none can be kept, and every process checks."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(home).expanduser() / "flava_train" / "verified"
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a+b")
        fcntl.flock(file, fcntl.LOCK_EX)
    except (OSError, RuntimeError):  # no room, no locks, or no home
        yield None
        return
    with file:
        file.seek(0)
        yield file


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, made if need be, and this process alone has it."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # renamed or removed while this process waited
    with file:
        yield file


def _removed(path: Path) -> bool:
    """Remove a copy, or what a process that is gone left of one."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".part":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:  # another process is writing it, or has removed it
        return False
    return True


def _copied(
    filesystem: fsspec.AbstractFileSystem, place: str, target: BinaryIO, cache: Path
) -> str:
    """The sha256 of the file at `place`, all of which `target`, in `cache`, holds then."""
    digest = hashlib.sha256()
    end = 0
    with filesystem.open(place, "rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            with _writing(cache):
                while chunk:
                    written = os.pwrite(target.fileno(), chunk, end)
                    end, chunk = end + written, chunk[written:]
    with _writing(cache):
        target.truncate(end)
    return digest.hexdigest()


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    while count := file.readinto(view):  # type: ignore[attr-defined]  # an unbuffered file has it
        digest.update(view[:count])
    return digest.hexdigest()


def _filesystem(address: str) -> tuple[Any, str]:
    with _reading(address):
        try:
            filesystem, place = fsspec.core.url_to_fs(address)
        except (ValueError, ImportError) as error:  # no such protocol, or its package is missing
            raise PmdError(f"cannot use the address {address}: {error}") from error
    return filesystem, str(place)


class _Unanswered(PmdError):
    """A file elsewhere cannot be read, but perhaps a moment later."""


def _patiently(address: str, ask: Callable[[], _Found]) -> _Found:
    """What `ask` finds at the address, at the last attempt if not before."""
    for pause in RETRY_SECONDS:
        with suppress(_Unanswered), _reading(address):
            return ask()
        time.sleep(pause)
    with _reading(address):
        return ask()


@contextmanager
def _reading(address: str) -> Iterator[None]:
    """Calls of a file system, and nothing else."""
    try:
        yield
    except PmdError:
        raise
    except FileNotFoundError as error:
        raise PmdError(
            f"cannot read {address}: there is no such file; `pmd build` writes it"
        ) from error
    except OSError as error:
        raise _Unanswered(f"cannot read {address}: {error.strerror or error}") from error
    except Exception as error:  # a library below fsspec raises what it likes
        raise _Unanswered(f"cannot read {address}: {type(error).__name__}: {error}") from error


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PmdError(
            f"cannot write to data.cache = {cache}: {error.strerror or error}; make room, or name "
            "a folder of yours"
        ) from error


def _changed(address: str) -> PmdError:
    return PmdError(
        f"{address} is not the file that the manifest names: its sha256 differs; build or copy it "
        "again"
    )


def _too_small(files: FileCache) -> PmdError:
    return PmdError(
        f"a cache of {files.max_bytes / 2**30:.3g} GiB does not hold the shards in use: raise "
        "data.cache_gib, or lower data.window_shards"
    )
