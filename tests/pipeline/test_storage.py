"""Files appear whole or not at all, and errors of file systems are one sentence each."""

import errno
import hashlib
import itertools
import resource
import signal
import subprocess
import sys
import threading
import uuid

import pytest

from pmd_pipeline.base.storage import folders, remove, sizes
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import (
    is_local,
    join,
    open_read,
    read_bytes,
    sha256_of,
    whole_file,
    write_whole,
)


@pytest.fixture
def memory():
    """An address that no other test writes to, in fsspec's file system in memory."""
    return f"memory://{uuid.uuid4().hex}"


def write_blocks(address, blocks):
    with whole_file(address) as file:
        for block in blocks:
            file.write(block)


@pytest.mark.parametrize("filesystem", ["folder", "memory"])
def test_written_bytes_can_be_read(filesystem, tmp_path, memory):
    address = join(str(tmp_path) if filesystem == "folder" else memory, "below", "it.bin")

    write_whole(address, b"one two")

    assert read_bytes(address) == b"one two"
    with open_read(address) as file:
        file.seek(4)
        assert file.read() == b"two"
    assert sha256_of(address) == hashlib.sha256(b"one two").hexdigest()


@pytest.mark.parametrize("filesystem", ["folder", "memory"])
def test_files_and_folders_are_listed_separately(filesystem, tmp_path, memory):
    root = str(tmp_path) if filesystem == "folder" else memory
    write_whole(join(root, "a.bin"), b"123")
    write_whole(join(root, "below", "b.bin"), b"4")

    assert sizes(root) == {"a.bin": 3}
    assert folders(root) == ["below"]
    assert sizes(join(root, "nowhere")) == {}
    assert folders(join(root, "nowhere")) == []


@pytest.mark.parametrize("filesystem", ["folder", "memory"])
def test_a_folder_is_removed_with_its_content_and_a_missing_one_is_no_error(
    filesystem, tmp_path, memory
):
    root = str(tmp_path) if filesystem == "folder" else memory
    write_whole(join(root, "below", "b.bin"), b"4")

    remove(join(root, "below"))
    remove(join(root, "below"))

    assert folders(root) == []


@pytest.mark.parametrize("filesystem", ["folder", "memory"])
def test_no_file_appears_when_the_block_raises(filesystem, tmp_path, memory):
    root = str(tmp_path) if filesystem == "folder" else memory
    write_whole(join(root, "old"), b"before")

    for name in ("old", "new"):
        with pytest.raises(ZeroDivisionError):
            write_blocks(join(root, name), (b"x" * (6 // n) for n in (1, 0)))

    assert sizes(root) == {"old": len(b"before")}
    assert read_bytes(join(root, "old")) == b"before"
    assert list(tmp_path.rglob("*.tmp")) == []


def test_an_error_of_the_block_is_not_reported_as_a_write_error(tmp_path):
    with pytest.raises(TimeoutError, match="the host is asleep"), whole_file(f"{tmp_path}/x"):
        raise TimeoutError(errno.ETIMEDOUT, "the host is asleep")
    with pytest.raises(FileNotFoundError), whole_file(f"{tmp_path}/x"):
        (tmp_path / "nowhere").read_bytes()
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(FileNotFoundError), open_read(f"{tmp_path}/x"):
        (tmp_path / "nowhere").read_bytes()


_KILLED = """
import os, signal, sys
from pmd_pipeline.contract.files import whole_file
with whole_file(sys.argv[1]) as file:
    file.write(b"half" * 1_000_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "shard.tar"
    target.write_bytes(b"before")

    ended = subprocess.run([sys.executable, "-c", _KILLED, str(target)], check=False)

    assert ended.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"before"
    assert [path.suffix for path in tmp_path.iterdir() if path != target] == [".tmp"]


def test_the_last_of_two_writers_replaces_the_file_as_a_whole(tmp_path):
    address = str(tmp_path / "shard.tar")
    both_write = threading.Barrier(2)

    def write(letter):
        with whole_file(address) as file:
            file.write(letter * 100_000)
            both_write.wait()
            file.write(letter * 100_000)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert read_bytes(address) in {b"a" * 200_000, b"b" * 200_000}
    assert sizes(str(tmp_path)) == {"shard.tar": 200_000}


@pytest.fixture
def small_file_limit():
    """Limits files of this process to a mebibyte; beyond it writes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_file_limit")
@pytest.mark.parametrize("size", [100, 3 << 20])
def test_a_full_disk_is_one_sentence_and_leaves_no_file(size, tmp_path):
    address = str(tmp_path / "shard.tar")

    with pytest.raises(PmdError) as caught:
        write_blocks(address, itertools.repeat(b"x" * size))

    assert str(caught.value) == (
        f"cannot write {address}: File too large; make room there or choose another place, "
        "and run again"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_file_limit")
def test_a_full_disk_at_the_last_flush_is_the_same_sentence(tmp_path):
    with pytest.raises(PmdError, match="File too large"):
        write_whole(str(tmp_path / "shard.tar"), b"x" * ((1 << 20) + 1))

    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path):
    (tmp_path / "data").write_bytes(b"")

    for address in (f"{tmp_path}/data/x", f"{tmp_path}/data/index/x"):
        with pytest.raises(PmdError, match="a file is where a folder should be"):
            write_whole(address, b"")
        with pytest.raises(PmdError, match=r"cannot delete .*: a file is where"):
            remove(address)
        with pytest.raises(PmdError, match=r"cannot read .*: a file is where"):
            read_bytes(address)
    with pytest.raises(PmdError, match=r"cannot read .*: a file is where"):
        sizes(f"{tmp_path}/data/index")


def test_reading_a_missing_file_is_one_sentence(tmp_path, memory):
    for address in (f"{tmp_path}/none", f"{memory}/none"):
        with pytest.raises(PmdError) as caught:
            read_bytes(address)

        assert str(caught.value) == f"cannot read {address}: there is no such file"
    with pytest.raises(PmdError, match=r"cannot read .*: Is a directory"):
        read_bytes(str(tmp_path))


def test_an_address_with_an_unknown_protocol_is_one_sentence():
    for call in (read_bytes, sizes, remove, is_local):
        with pytest.raises(PmdError, match="cannot use the address nosuch://a/b: Protocol not"):
            call("nosuch://a/b")


@pytest.mark.parametrize(
    ("folder", "address"),
    [
        ("data", "data/index/coco"),
        ("data/", "data/index/coco"),
        ("/", "/index/coco"),
        ("", "index/coco"),
        (".", "./index/coco"),
        ("memory://", "memory://index/coco"),
        ("s3://bucket/pmd", "s3://bucket/pmd/index/coco"),
    ],
)
def test_names_are_joined_below_any_folder(folder, address):
    assert join(folder, "index", "coco") == address


def test_only_files_of_this_machine_are_local(tmp_path):
    assert is_local(str(tmp_path))
    assert is_local(f"file://{tmp_path}")
    assert not is_local("memory://a")
