import hashlib
import os
import subprocess
import sys
import time
from itertools import count

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from flava_train.data import file_cache
from flava_train.data.file_cache import ExpectedFile, FileCache
from pmd_pipeline.contract import files as contract_files
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import located

HOLD = """import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()"""
numbers = count()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds passed to `time.sleep`, which returns at once."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def remote():
    """A function that writes a file to a remote file system."""
    folder = f"memory://files-{next(numbers)}"

    def put(name, content):
        with fsspec.open(f"{folder}/{name}", "wb") as file:
            file.write(content)
        return ExpectedFile(f"{folder}/{name}", hashlib.sha256(content).hexdigest())

    return put


def local(path, content):
    path.write_bytes(content)
    return ExpectedFile(str(path), hashlib.sha256(content).hexdigest())


def copies(cache):
    return [path for path in cache.iterdir() if path.name != "lock"]


def read(files, expected):
    return files.open(expected, lambda path: path.read_bytes())


def test_a_local_file_is_read_in_place(tmp_path):
    expected = local(tmp_path / "a.tar", b"content")

    assert FileCache().path(expected) == tmp_path / "a.tar"
    assert read(FileCache(tmp_path / "cache"), expected) == b"content"
    assert not (tmp_path / "cache").exists()


def test_a_changed_file_is_refused_with_its_name(tmp_path):
    expected = local(tmp_path / "a.tar", b"content")
    (tmp_path / "a.tar").write_bytes(b"contenu")

    with pytest.raises(PmdError, match=r"a\.tar is not the file that the manifest names"):
        FileCache().path(expected)
    assert FileCache(verify=False).path(expected) == tmp_path / "a.tar"


def test_a_file_that_changes_after_its_verification_is_verified_again(tmp_path):
    expected = local(tmp_path / "a.tar", b"content")
    FileCache().path(expected)
    (tmp_path / "a.tar").write_bytes(b"contenu")
    os.utime(tmp_path / "a.tar", ns=(1, 1))  # written a moment later, as every change is

    with pytest.raises(PmdError, match="sha256 differs"):
        FileCache().path(expected)


def test_a_machine_verifies_a_file_once_a_day(tmp_path, monkeypatch):
    expected = local(tmp_path / "a.tar", b"content")
    read_times = []
    digest = file_cache._sha256_of_file
    monkeypatch.setattr(
        file_cache, "_sha256_of_file", lambda file: read_times.append(1) or digest(file)
    )

    for _ in range(3):
        FileCache().path(expected)
    assert len(read_times) == 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    FileCache().path(expected)
    assert len(read_times) == 2


def test_without_a_folder_for_stamps_every_process_verifies(tmp_path, monkeypatch):
    (tmp_path / "home").write_bytes(b"a file where the folder should be")
    expected = local(tmp_path / "a.tar", b"content")

    assert FileCache().path(expected) == tmp_path / "a.tar"
    (tmp_path / "a.tar").write_bytes(b"contenu")
    with pytest.raises(PmdError, match="sha256 differs"):
        FileCache().path(expected)


def test_a_missing_file_is_one_sentence(tmp_path):
    expected = ExpectedFile(str(tmp_path / "a.tar"), "0" * 64)

    with pytest.raises(PmdError, match="No such file"):
        read(FileCache(), expected)
    with pytest.raises(PmdError, match="is missing"):
        read(FileCache(verify=False), expected)


def test_a_remote_file_is_copied_once(tmp_path, remote, monkeypatch):
    expected = remote("a.tar", b"content")
    files = FileCache(tmp_path / "cache")

    assert read(files, expected) == b"content"
    monkeypatch.setattr(file_cache, "_download_to_cache", None)  # a second copy would fail
    assert read(files, expected) == b"content"
    assert files.path(expected).suffix == ".tar"


def test_a_remote_file_needs_a_cache(remote):
    with pytest.raises(PmdError, match=r"set data\.cache"):
        FileCache().path(remote("a.tar", b"content"))


def test_a_changed_remote_file_is_refused_and_not_kept(tmp_path, remote):
    expected = ExpectedFile(remote("a.tar", b"content").address, "0" * 64)

    with pytest.raises(PmdError, match=r"a\.tar is not the file"):
        FileCache(tmp_path / "cache").path(expected)
    assert copies(tmp_path / "cache") == []


def test_a_missing_remote_file_is_one_sentence(tmp_path):
    with pytest.raises(PmdError, match="no such file"):
        FileCache(tmp_path / "cache").path(ExpectedFile("memory://nowhere/a.tar", "0" * 64))


def test_the_cache_keeps_the_most_recently_used_copies_within_its_limit(tmp_path, remote):
    files = FileCache(tmp_path / "cache", max_bytes=35)
    expected = [remote(f"{n}.tar", bytes([n]) * 10) for n in range(5)]

    used = [0, 1, 2, 0, 3, 0, 4]
    for moment, n in enumerate(used):
        assert read(files, expected[n]) == bytes([n]) * 10
        os.utime(files.path(expected[n]), ns=(moment, moment))
        assert sum(path.stat().st_size for path in copies(tmp_path / "cache")) <= 35

    kept = {path.read_bytes()[0] for path in copies(tmp_path / "cache")}
    assert kept == {0, 3, 4}


def test_only_copies_are_removed_to_make_room(tmp_path, remote):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "thesis.tex").write_bytes(bytes(1000))
    (cache / "deadbeef.tar").write_bytes(bytes(1000))
    files = FileCache(cache, max_bytes=100)

    for number in range(4):
        assert read(files, remote(f"{number}.tar", bytes([number]) * 60)) == bytes([number]) * 60

    kept = {path.name for path in cache.iterdir()}
    assert {"thesis.tex", "deadbeef.tar", "lock"} < kept
    assert len(kept) == 4


def test_a_size_that_cannot_be_read_is_one_sentence(tmp_path):
    assert contract_files.size_of(str(tmp_path / "nothing")) is None
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PmdError, match="file/below: a file is where a folder should be"):
        contract_files.size_of(str(tmp_path / "file" / "below"))


def test_opening_a_copy_marks_it_as_recently_used(tmp_path, remote):
    files = FileCache(tmp_path / "cache", max_bytes=25)
    first, second, third = (remote(f"{n}.tar", bytes([n]) * 10) for n in range(3))
    for one in (first, second):
        os.utime(files.path(one), ns=(1, 1))

    files.path(first)
    files.path(third)

    assert {path.read_bytes()[0] for path in copies(tmp_path / "cache")} == {0, 2}


def test_a_file_larger_than_the_cache_is_refused(tmp_path, remote):
    with pytest.raises(PmdError, match=r"raise data\.cache_gib"):
        FileCache(tmp_path / "cache", max_bytes=5).path(remote("a.tar", b"content"))
    assert all(path.stat().st_size == 0 for path in copies(tmp_path / "cache"))


def test_the_unfinished_copy_of_a_killed_process_is_removed(tmp_path, remote):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / f"{16 * '0123'}.tar.part").write_bytes(bytes(30))
    expected = remote("a.tar", b"content")
    (cache / f"{expected.sha256}.tar.part").write_bytes(b"cont")

    assert read(FileCache(cache, max_bytes=30), expected) == b"content"
    assert len(copies(cache)) == 1


def test_a_copy_that_another_process_is_writing_is_kept(tmp_path, remote):
    cache = tmp_path / "cache"
    cache.mkdir()
    part = cache / f"{16 * '0123'}.tar.part"
    part.write_bytes(bytes(30))
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLD,
            part,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        holder.stdout.readline()
        with pytest.raises(PmdError, match="does not hold"):
            FileCache(cache, max_bytes=30).path(remote("a.tar", b"content"))
        holder.communicate()

    assert read(FileCache(cache, max_bytes=30), remote("a.tar", b"content")) == b"content"


def test_a_copy_that_is_removed_before_it_is_opened_is_made_again(tmp_path, remote):
    files = FileCache(tmp_path / "cache")
    expected = remote("a.tar", b"content")
    gone = []

    def opener(path):
        if not gone:
            gone.append(path.unlink())
        return path.read_bytes()

    assert files.open(expected, opener) == b"content"


def test_files_can_be_copied_before_they_are_needed(tmp_path, remote):
    expected = [remote(f"{n}.tar", bytes([n])) for n in range(3)]

    FileCache(tmp_path / "cache").prefetch(expected)

    assert len(copies(tmp_path / "cache")) == 3


@pytest.mark.parametrize(
    ("manifest", "path", "address"),
    [
        ("manifests/pmd.json", "../shards/coco/0.tar", "shards/coco/0.tar"),
        ("/data/m/pmd.json", "0.tar", "/data/m/0.tar"),
        ("s3://pmd/m/pmd.json", "../s/0.tar", "s3://pmd/s/0.tar"),
        ("s3://pmd/m/pmd.json", "gs://other/0.tar", "gs://other/0.tar"),
        ("s3://pmd/m/pmd.json", "/data/0.tar", "/data/0.tar"),
    ],
)
def test_paths_of_shards_are_relative_to_the_manifest(manifest, path, address):
    assert located(manifest, path) == address


def test_an_unknown_protocol_is_one_sentence():
    with pytest.raises(PmdError, match="cannot use the address"):
        FileCache().path(ExpectedFile("nothing://a", "0" * 64))


class LibraryError(Exception):
    """Like those of aiohttp and botocore: not derived from OSError."""


@pytest.fixture
def failing(monkeypatch):
    """A function that makes the first `times` calls of a method of the remote file system fail."""

    def fail(method, times, error):
        real, calls = getattr(MemoryFileSystem, method), []

        def called(self, *rest, **more):
            calls.append(method)
            if len(calls) <= times:
                raise error
            return real(self, *rest, **more)

        monkeypatch.setattr(MemoryFileSystem, method, called)
        return calls

    return fail


ERRORS = [LibraryError("reset by peer"), ConnectionResetError(104, "reset by peer")]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("method", ["open", "size"])
def test_a_failed_copy_is_retried_twice(tmp_path, remote, failing, pauses, method, error):
    expected = remote("a.tar", b"content")
    failing(method, 2, error)

    assert read(FileCache(tmp_path / "cache"), expected) == b"content"
    assert pauses == list(file_cache.RETRY_SECONDS)


@pytest.mark.parametrize("error", ERRORS)
def test_an_unknown_exception_of_a_library_is_one_sentence(tmp_path, remote, failing, error):
    expected = remote("a.tar", b"content")
    calls = failing("open", 99, error)

    with pytest.raises(PmdError, match=r"cannot read memory://.*a\.tar: .*reset by peer"):
        read(FileCache(tmp_path / "cache"), expected)
    assert len(calls) == 3
    failing("open", 1, error)
    with pytest.raises(PmdError, match="reset by peer"):
        contract_files.read_bytes(expected.address)
    failing("size", 1, error)
    with pytest.raises(PmdError, match="reset by peer"):
        contract_files.size_of(expected.address)


def test_a_library_that_fails_without_a_request_is_one_sentence(monkeypatch):
    def fail(_):
        raise LibraryError("no credentials")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)

    with pytest.raises(PmdError, match="LibraryError: no credentials"):
        contract_files.is_local("memory://a")


def test_a_missing_remote_file_is_not_retried(tmp_path, pauses):
    with pytest.raises(PmdError, match="no such file"):
        FileCache(tmp_path / "cache").path(ExpectedFile("memory://nowhere/a.tar", "0" * 64))
    assert pauses == []


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, remote, monkeypatch, pauses):
    expected = remote("a.tar", b"content")
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(
        PmdError, match=r"cannot write to data\.cache = .*file: .*; free disk space"
    ):
        FileCache(tmp_path / "file").path(expected)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(PmdError, match=r"cannot write to data\.cache = .*cache: No space left"):
        FileCache(tmp_path / "cache").path(expected)
    assert pauses == []
