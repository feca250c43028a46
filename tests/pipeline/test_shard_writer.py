"""The bytes of a shard: those that `tarfile` writes, and members in order."""

import io
import tarfile

import pytest

from pmd_pipeline.shards.shard_writer import DigestingFile, ShardWriter


def written(*samples):
    out = io.BytesIO()
    writer = ShardWriter(DigestingFile(out))
    places = [writer.add(key, members) for key, members in samples]
    writer.close()
    return out.getvalue(), places


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 9_728, 10_240])
def test_a_shard_has_the_bytes_that_tarfile_writes(size):
    content = bytes(range(256)) * 40
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for extension in ("jpg", "txt"):
            member = tarfile.TarInfo(f"{'0' * 16}.{extension}")
            member.size = size
            tar.addfile(member, io.BytesIO(content[:size]))

    shard, [places] = written(("0" * 16, dict.fromkeys(("jpg", "txt"), content[:size])))

    assert shard == expected.getvalue()
    assert places["jpg"] == (512, size)


def test_members_of_a_sample_are_sorted_whatever_their_order():
    members = {"txt": b"a dog", "jpg": b"pixels", "json": b"{}"}

    shard, [places] = written(("0" * 16, members))

    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        names = [member.name.partition(".")[2] for member in tar]
    assert names == ["jpg", "json", "txt"]
    for extension, (offset, size) in places.items():
        assert shard[offset : offset + size] == members[extension]


def test_samples_out_of_order_are_refused():
    with pytest.raises(AssertionError, match="in order of their keys"):
        written(("2", {"txt": b""}), ("1", {"txt": b""}))
