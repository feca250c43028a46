"""Parquet is read in the thread that asks, whole, and never with a column left out unsaid."""

import errno
import threading
from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pmd_pipeline.base.tables import read_batches, read_table
from pmd_pipeline.contract.errors import PmdError

TABLE = pa.table({"key": [f"{n:016x}" for n in range(5000)], "num_pairs": list(range(5000))})


class RecordingFile(BytesIO):
    """Records the threads that read it."""

    def __init__(self, content):
        super().__init__(content)
        self.threads = set()

    def read(self, size=-1):
        self.threads.add(threading.get_ident())
        return super().read(size)


@pytest.fixture
def file():
    out = BytesIO()
    pq.write_table(TABLE, out, row_group_size=500)
    return RecordingFile(out.getvalue())


def test_a_table_is_read_in_the_calling_thread_only(file):
    assert read_table(file).equals(TABLE)
    assert file.threads == {threading.get_ident()}


def test_batches_are_read_in_the_calling_thread_only(file):
    batches = list(read_batches(file, ["num_pairs"], 300))

    assert pa.Table.from_batches(batches).equals(TABLE.select(["num_pairs"]))
    assert max(map(len, batches)) <= 300
    assert file.threads == {threading.get_ident()}


@pytest.mark.parametrize("read", [read_table, lambda *args: list(read_batches(*args))])
def test_a_missing_column_is_an_error(file, read):
    with pytest.raises(pa.ArrowException, match="no column caption"):
        read(file, ["key", "caption"])


READS = [read_table, lambda *args, **more: list(read_batches(*args, **more))]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("damage", ["no end", "no beginning", "another page", "nothing", "column"])
def test_damage_is_an_error_with_the_address_and_advice(file, read, damage):
    content = bytearray(file.getvalue())
    if damage == "no end":
        content[-20:] = bytes(20)
    elif damage == "no beginning":
        content[: len(content) // 2] = bytes(len(content) // 2)
    elif damage == "another page":
        content[4:400] = bytes(one ^ 0x5A for one in content[4:400])
    elif damage == "nothing":
        content.clear()
    columns = ["caption"] if damage == "column" else None

    with pytest.raises(PmdError, match=r"^a/b\.parquet is no whole Parquet file: do this$"):
        read(BytesIO(content), columns, address="a/b.parquet", mend="do this")


@pytest.mark.parametrize("read", READS)
def test_an_error_of_the_system_is_not_reported_as_damage(file, read, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file, "read", fails)

    with pytest.raises(OSError, match="Input/output error"):
        read(file, address="a/b.parquet")


def test_a_column_whose_name_is_not_utf8_is_damage():
    out = BytesIO()
    pq.write_table(pa.table({"caption": ["a"]}), out)
    damaged = out.getvalue().replace(b"caption", b"\xe7aption")

    with pytest.raises(pa.ArrowInvalid, match="not UTF-8"):
        read_table(BytesIO(damaged))
    with pytest.raises(PmdError, match=r"a\.parquet is no whole Parquet file"):
        read_table(BytesIO(damaged), address="a.parquet")
    with pytest.raises(PmdError, match=r"a\.parquet is no whole Parquet file"):
        list(read_batches(BytesIO(damaged), address="a.parquet"))
