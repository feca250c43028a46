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
def own_stamps(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Seconds that were waited, in truth none."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def far():
    """A function that puts content where only fsspec finds it."""
    folder = f"memory://files-{next(numbers)}"

    def put(name, content):
        with fsspec.open(f"{folder}/{name}", "wb") as file:
            file.write(content)
        return ExpectedFile(f"{folder}/{name}", hashlib.sha256(content).hexdigest())

    return put


def near(path, content):
    path.write_bytes(content)
    return ExpectedFile(str(path), hashlib.sha256(content).hexdigest())


def copies(cache):
    return [path for path in cache.iterdir() if path.name != "lock"]


def read(files, wanted):
    return files.open(wanted, lambda path: path.read_bytes())


def test_a_file_of_this_machine_is_read_in_place(tmp_path):
    wanted = near(tmp_path / "a.tar", b"content")

    assert FileCache().path(wanted) == tmp_path / "a.tar"
    assert read(FileCache(tmp_path / "cache"), wanted) == b"content"
    assert not (tmp_path / "cache").exists()


def test_a_changed_file_is_refused_by_name(tmp_path):
    wanted = near(tmp_path / "a.tar", b"content")
    (tmp_path / "a.tar").write_bytes(b"contenu")

    with pytest.raises(PmdError, match=r"a\.tar is not the file that the manifest names"):
        FileCache().path(wanted)
    assert FileCache(verify=False).path(wanted) == tmp_path / "a.tar"


def test_a_file_that_changes_after_its_check_is_checked_again(tmp_path):
    wanted = near(tmp_path / "a.tar", b"content")
    FileCache().path(wanted)
    (tmp_path / "a.tar").write_bytes(b"contenu")
    os.utime(tmp_path / "a.tar", ns=(1, 1))  # written a moment later, as every change is

    with pytest.raises(PmdError, match="sha256 differs"):
        FileCache().path(wanted)


def test_a_machine_checks_a_file_once_a_day(tmp_path, monkeypatch):
    wanted = near(tmp_path / "a.tar", b"content")
    read_times = []
    digest = file_cache._sha256
    monkeypatch.setattr(file_cache, "_sha256", lambda file: read_times.append(1) or digest(file))

    for _ in range(3):
        FileCache().path(wanted)
    assert len(read_times) == 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    FileCache().path(wanted)
    assert len(read_times) == 2


def test_without_a_place_for_stamps_every_process_checks(tmp_path, monkeypatch):
    (tmp_path / "home").write_bytes(b"a file where the folder should be")
    wanted = near(tmp_path / "a.tar", b"content")

    assert FileCache().path(wanted) == tmp_path / "a.tar"
    (tmp_path / "a.tar").write_bytes(b"contenu")
    with pytest.raises(PmdError, match="sha256 differs"):
        FileCache().path(wanted)


def test_a_missing_file_is_one_sentence(tmp_path):
    wanted = ExpectedFile(str(tmp_path / "a.tar"), "0" * 64)

    with pytest.raises(PmdError, match="No such file"):
        read(FileCache(), wanted)
    with pytest.raises(PmdError, match="is missing"):
        read(FileCache(verify=False), wanted)


def test_a_far_file_is_copied_once(tmp_path, far, monkeypatch):
    wanted = far("a.tar", b"far away")
    files = FileCache(tmp_path / "cache")

    assert read(files, wanted) == b"far away"
    monkeypatch.setattr(file_cache, "_download", None)  # a second copy would fail
    assert read(files, wanted) == b"far away"
    assert files.path(wanted).suffix == ".tar"


def test_a_far_file_needs_a_cache(far):
    with pytest.raises(PmdError, match=r"set data\.cache"):
        FileCache().path(far("a.tar", b"far away"))


def test_a_changed_far_file_is_refused_and_not_kept(tmp_path, far):
    wanted = ExpectedFile(far("a.tar", b"far away").address, "0" * 64)

    with pytest.raises(PmdError, match=r"a\.tar is not the file"):
        FileCache(tmp_path / "cache").path(wanted)
    assert copies(tmp_path / "cache") == []


def test_a_missing_far_file_is_one_sentence(tmp_path):
    with pytest.raises(PmdError, match="no such file"):
        FileCache(tmp_path / "cache").path(ExpectedFile("memory://nowhere/a.tar", "0" * 64))


def test_the_cache_keeps_what_was_used_last_within_its_bound(tmp_path, far):
    files = FileCache(tmp_path / "cache", max_bytes=35)
    wanted = [far(f"{n}.tar", bytes([n]) * 10) for n in range(5)]

    used = [0, 1, 2, 0, 3, 0, 4]
    for moment, n in enumerate(used):
        assert read(files, wanted[n]) == bytes([n]) * 10
        os.utime(files.path(wanted[n]), ns=(moment, moment))
        assert sum(path.stat().st_size for path in copies(tmp_path / "cache")) <= 35

    kept = {path.read_bytes()[0] for path in copies(tmp_path / "cache")}
    assert kept == {0, 3, 4}


def test_room_is_made_of_copies_alone(tmp_path, far):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "thesis.tex").write_bytes(bytes(1000))
    (cache / "deadbeef.tar").write_bytes(bytes(1000))
    files = FileCache(cache, max_bytes=100)

    for number in range(4):
        assert read(files, far(f"{number}.tar", bytes([number]) * 60)) == bytes([number]) * 60

    kept = {path.name for path in cache.iterdir()}
    assert {"thesis.tex", "deadbeef.tar", "lock"} < kept
    assert len(kept) == 4


def test_a_size_that_nobody_can_tell_is_one_sentence(tmp_path):
    assert contract_files.size_of(str(tmp_path / "nothing")) is None
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PmdError, match="file/below: a file is where a folder should be"):
        contract_files.size_of(str(tmp_path / "file" / "below"))


def test_use_is_what_keeps_a_copy(tmp_path, far):
    files = FileCache(tmp_path / "cache", max_bytes=25)
    first, second, third = (far(f"{n}.tar", bytes([n]) * 10) for n in range(3))
    for one in (first, second):
        os.utime(files.path(one), ns=(1, 1))

    files.path(first)
    files.path(third)

    assert {path.read_bytes()[0] for path in copies(tmp_path / "cache")} == {0, 2}


def test_a_file_larger_than_the_cache_is_refused(tmp_path, far):
    with pytest.raises(PmdError, match=r"raise data\.cache_gib"):
        FileCache(tmp_path / "cache", max_bytes=5).path(far("a.tar", b"far away"))
    assert all(path.stat().st_size == 0 for path in copies(tmp_path / "cache"))


def test_what_a_killed_process_began_gives_way(tmp_path, far):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / f"{16 * '0123'}.tar.part").write_bytes(bytes(30))
    wanted = far("a.tar", b"far away")
    (cache / f"{wanted.sha256}.tar.part").write_bytes(b"far")

    assert read(FileCache(cache, max_bytes=30), wanted) == b"far away"
    assert len(copies(cache)) == 1


def test_a_copy_in_the_making_is_left_alone(tmp_path, far):
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
            FileCache(cache, max_bytes=30).path(far("a.tar", b"far away"))
        holder.communicate()

    assert read(FileCache(cache, max_bytes=30), far("a.tar", b"far away")) == b"far away"


def test_a_copy_that_gives_way_while_it_is_opened_is_made_again(tmp_path, far):
    files = FileCache(tmp_path / "cache")
    wanted = far("a.tar", b"far away")
    gone = []

    def opener(path):
        if not gone:
            gone.append(path.unlink())
        return path.read_bytes()

    assert files.open(wanted, opener) == b"far away"


def test_files_are_fetched_before_they_are_needed(tmp_path, far):
    wanted = [far(f"{n}.tar", bytes([n])) for n in range(3)]

    FileCache(tmp_path / "cache").prefetch(wanted)

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
def test_shards_lie_where_the_manifest_says(manifest, path, address):
    assert located(manifest, path) == address


def test_an_address_of_no_known_kind_is_one_sentence():
    with pytest.raises(PmdError, match="cannot use the address"):
        FileCache().path(ExpectedFile("nothing://a", "0" * 64))


class LibraryError(Exception):
    """As aiohttp's and botocore's: of no kind that Python knows."""


@pytest.fixture
def failing(monkeypatch):
    """A function that lets so many calls of a method of the far file system fail."""

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
def test_a_copy_is_tried_again_before_it_is_given_up(tmp_path, far, failing, pauses, method, error):
    wanted = far("a.tar", b"far away")
    failing(method, 2, error)

    assert read(FileCache(tmp_path / "cache"), wanted) == b"far away"
    assert pauses == list(file_cache.RETRY_SECONDS)


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_a_library_raises_is_one_sentence(tmp_path, far, failing, error):
    wanted = far("a.tar", b"far away")
    calls = failing("open", 99, error)

    with pytest.raises(PmdError, match=r"cannot read memory://.*a\.tar: .*reset by peer"):
        read(FileCache(tmp_path / "cache"), wanted)
    assert len(calls) == 3
    failing("open", 1, error)
    with pytest.raises(PmdError, match="reset by peer"):
        contract_files.read_bytes(wanted.address)
    failing("size", 1, error)
    with pytest.raises(PmdError, match="reset by peer"):
        contract_files.size_of(wanted.address)


def test_a_library_may_fail_before_it_is_asked(monkeypatch):
    def fail(_):
        raise LibraryError("no credentials")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)

    with pytest.raises(PmdError, match="LibraryError: no credentials"):
        contract_files.is_local("memory://a")


def test_a_missing_far_file_is_not_waited_for(tmp_path, pauses):
    with pytest.raises(PmdError, match="no such file"):
        FileCache(tmp_path / "cache").path(ExpectedFile("memory://nowhere/a.tar", "0" * 64))
    assert pauses == []


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, far, monkeypatch, pauses):
    wanted = far("a.tar", b"far away")
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(
        PmdError, match=r"cannot write to data\.cache = .*file: .*; free disk space"
    ):
        FileCache(tmp_path / "file").path(wanted)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(PmdError, match=r"cannot write to data\.cache = .*cache: No space left"):
        FileCache(tmp_path / "cache").path(wanted)
    assert pauses == []
