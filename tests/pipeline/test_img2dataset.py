"""Shards in the layout of img2dataset, intact and damaged."""

import hashlib
import io
import json
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.contract.errors import PmdError, RecordError
from pmd_pipeline.images.local.img2dataset import build_catalogue, is_img2dataset, open_img2dataset
from pmd_pipeline.index.records import IndexRecord

COLUMNS = (
    "url", "caption", "key", "status", "error_message",
    "width", "height", "original_width", "original_height", "exif", "sha256",
)  # fmt: skip


def record(number, **changes):
    values = {
        "key": f"{number:016x}", "id": str(number), "url": url(number), "file": None,
        "licence": None, "width": None, "height": None, "sha256": None, "meta": None,
        "captions": ["another caption", f"a dog, number {number}"], "fields": ["caption"] * 2,
        "boxes": None, "spans": [0, 0], "rows": [0, 1],
    }  # fmt: skip
    return IndexRecord(**{**values, **changes})


def url(number):
    return f"http://Host{number}.example/a b/{number}.jpg?x=y"


def fetched_sha256(number):
    return hashlib.sha256(f"as fetched {number}".encode()).hexdigest()


def row(number, key, **changes):
    values = {
        "url": url(number), "caption": f"  a dog,\nnumber {number}", "key": key,
        "status": "success", "error_message": None, "width": 256, "height": 192,
        "original_width": 1024, "original_height": 768, "exif": "{}",
        "sha256": fetched_sha256(number),
    }  # fmt: skip
    return {**values, **changes}


def failed(number, key, status="failed_to_download"):
    unknown = dict.fromkeys(["width", "height", "original_width", "original_height", "exif"])
    return row(number, key, **unknown, sha256=None, status=status, error_message="HTTP Error 404")


def write_shard(shards, shard, rows, samples=None, image="jpg"):
    """A tar with its Parquet file and its stats; `samples` replaces JSON files by key."""
    shards.mkdir(exist_ok=True)
    with tarfile.open(shards / f"{shard:05d}.tar", "w") as tar:
        for one in rows:
            if one["status"] != "success":
                continue
            sample = (samples or {}).get(one["key"], one)
            members = {
                image: f"stored {one['url']}".encode(),
                "json": sample if isinstance(sample, bytes) else json.dumps(sample).encode(),
                "txt": str(one["caption"]).encode(),
            }
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{one['key']}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    pq.write_table(pa.Table.from_pylist(rows), shards / f"{shard:05d}.parquet")
    (shards / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(rows)}))


def look_up_in(shards, records, folder=None):
    catalogues = str(folder or shards.parent / "catalogue")
    with open_pool("local", 1, None) as pool:
        build_catalogue(str(shards), catalogues, pool)
    return open_img2dataset(catalogues, records)


def failure_kind(shards, record):
    with pytest.raises(RecordError) as caught:
        look_up_in(shards, [record])(record)
    return caught.value.kind


@pytest.fixture
def shards(tmp_path):
    return tmp_path / "shards"


def test_the_columns_of_these_tests_are_those_of_img2dataset():
    assert tuple(row(1, "000000000")) == COLUMNS


def test_a_folder_of_shards_is_recognised_by_their_stats(shards):
    write_shard(shards, 0, [row(1, "000000000")])
    assert is_img2dataset(str(shards))

    (shards / "00000_stats.json").unlink()
    assert not is_img2dataset(str(shards))
    assert not is_img2dataset(str(shards / "00000.tar"))
    assert not is_img2dataset(str(shards / "nowhere"))


@pytest.mark.parametrize("image", ["jpg", "png", "webp"])
def test_images_come_with_their_original_sha256_and_size(shards, image):
    write_shard(shards, 0, [row(n, f"00000000{n}") for n in (3, 1)], image=image)
    write_shard(shards, 1, [row(n, f"00001000{n}") for n in (2, 4)], image=image)
    records = [record(number) for number in (1, 2, 3, 4)]

    look_up = look_up_in(shards, records)

    for number, target in enumerate(records, start=1):
        fetched_image = look_up(target)
        assert fetched_image.body == f"stored {url(number)}".encode()
        assert fetched_image.sha256 == fetched_sha256(number)
        assert fetched_image.original_size == (1024, 768)
        assert fetched_image.final_url is None


def test_the_folder_of_a_catalogue_may_have_any_name(shards, tmp_path):
    write_shard(shards, 0, [row(1, "000000000")])
    write_shard(shards, 1, [row(2, "000010000")])
    target = [record(1), record(2)]

    look_up = look_up_in(shards, target, tmp_path / "data[1-2] {a,b} *?" / "catalogue")

    assert [look_up(one).body for one in target] == [f"stored {url(n)}".encode() for n in (1, 2)]


def test_images_that_the_shards_do_not_have_are_none(shards):
    write_shard(shards, 0, [row(1, "000000000")])
    others = [record(2), record(3, url=None)]

    look_up = look_up_in(shards, [record(1), *others])

    assert [look_up(other) for other in others] == [None, None]


@pytest.mark.parametrize(
    "spelling",
    [
        "https://host1.example/a%20b/1.jpg?x=y",
        "HTTP://HOST1.EXAMPLE:80/a b/1.jpg?x=y#top",
    ],
)
def test_a_url_is_found_in_every_spelling(shards, spelling):
    write_shard(shards, 0, [row(1, "000000000")])
    target = record(1, url=spelling)

    assert look_up_in(shards, [target])(target).sha256 == fetched_sha256(1)


def test_one_matching_caption_is_enough_and_a_missing_caption_is_accepted(shards):
    without = row(2, "000000001")
    del without["caption"]
    write_shard(
        shards,
        0,
        [row(1, "000000000"), row(2, "000000001", caption=None)],
        samples={"000000001": without},
    )
    records = [record(1), record(2)]
    look_up = look_up_in(shards, records)

    assert all(look_up(target) for target in records)


def test_another_caption_is_refused(shards):
    write_shard(shards, 0, [row(1, "000000000", caption="a cat")])

    assert failure_kind(shards, record(1)) == "caption_mismatch"


@pytest.mark.parametrize("stated", [fetched_sha256(2), None, 7])
def test_a_json_with_another_sha256_than_its_parquet_is_refused(shards, stated):
    sample = row(1, "000000000", sha256=stated)
    write_shard(shards, 0, [row(1, "000000000")], samples={"000000000": sample})

    assert failure_kind(shards, record(1)) == "changed"


@pytest.mark.parametrize("stated", [None, "", "abc", "G" * 64])
def test_a_shard_that_states_no_sha256_is_refused(shards, stated):
    write_shard(shards, 0, [row(1, "000000000", sha256=stated), row(2, "000000001")])

    assert failure_kind(shards, record(1)) == "changed"


def test_bytes_other_than_upstreams_are_refused(shards):
    write_shard(shards, 0, [row(1, "000000000")])

    assert failure_kind(shards, record(1, sha256=fetched_sha256(2))) == "changed"
    target = record(1, sha256=fetched_sha256(1))
    assert look_up_in(shards, [target])(target).sha256 == fetched_sha256(1)


@pytest.mark.parametrize("status", ["failed_to_download", "failed_to_resize", None])
def test_a_row_that_failed_is_not_in_the_archive(shards, status):
    write_shard(shards, 0, [failed(1, "000000000", status), row(2, "000000001")])

    assert failure_kind(shards, record(1)) == "not_in_archive"


def test_of_several_rows_of_a_url_the_successful_one_is_taken(shards):
    write_shard(shards, 0, [failed(1, "000000000"), row(1, "000000001"), failed(1, "000000002")])

    assert look_up_in(shards, [record(1)])(record(1)).sha256 == fetched_sha256(1)


@pytest.mark.parametrize("lost", ["jpg", "json"])
def test_a_row_without_its_members_is_not_in_the_archive(shards, lost):
    write_shard(shards, 0, [row(1, "000000000")])
    with tarfile.open(shards / "00000.tar") as tar:
        kept = {name: tar.extractfile(name).read() for name in tar.getnames()}
    del kept[f"000000000.{lost}"]
    with tarfile.open(shards / "00000.tar", "w") as tar:
        for name, content in kept.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

    assert failure_kind(shards, record(1)) == "not_in_archive"


def test_the_tar_of_another_shard_is_detected(shards):
    write_shard(shards, 0, [row(1, "000000000")])
    write_shard(shards, 1, [row(2, "000010000")])
    swap(shards / "00000.tar", shards / "00001.tar")

    assert failure_kind(shards, record(1)) == "not_in_archive"


def test_the_tar_of_another_run_is_detected(shards, tmp_path):
    write_shard(shards, 0, [row(1, "000000000")])
    write_shard(tmp_path / "other", 0, [row(2, "000000000")])
    swap(shards / "00000.tar", tmp_path / "other" / "00000.tar")

    assert failure_kind(shards, record(1)) == "caption_mismatch"


def test_a_json_with_another_url_is_refused(shards):
    sample = row(1, "000000000", url=url(2))
    write_shard(shards, 0, [row(1, "000000000")], samples={"000000000": sample})

    assert failure_kind(shards, record(1)) == "caption_mismatch"


def swap(one, other):
    kept = one.read_bytes()
    shutil.copyfile(other, one)
    other.write_bytes(kept)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_damaged_json_is_refused(shards, content):
    write_shard(shards, 0, [row(1, "000000000")], samples={"000000000": content})

    assert failure_kind(shards, record(1)) == "truncated"


@pytest.mark.parametrize("size", [0, -1, None, "1024"])
def test_an_impossible_size_is_ignored(shards, size):
    sample = row(1, "000000000", original_width=size)
    write_shard(shards, 0, [row(1, "000000000")], samples={"000000000": sample})

    assert look_up_in(shards, [record(1)])(record(1)).original_size is None


def test_a_tar_that_was_truncated_after_opening_fails_one_record(shards):
    write_shard(shards, 0, [row(1, "000000000")])
    look_up = look_up_in(shards, [record(1)])
    (shards / "00000.tar").write_bytes((shards / "00000.tar").read_bytes()[:520])

    with pytest.raises(RecordError) as caught:
        look_up(record(1))
    assert caught.value.kind == "truncated"


def test_a_deleted_tar_is_named_in_the_error(shards):
    write_shard(shards, 0, [row(1, "000000000")])
    look_up = look_up_in(shards, [record(1)])
    (shards / "00000.tar").unlink()

    with pytest.raises(PmdError, match=r"00000\.tar"):
        look_up(record(1))


@pytest.mark.parametrize("damage", ["no parquet", "cut parquet", "cut tar", "no sha256"])
def test_an_unreadable_shard_is_named_in_the_error(shards, damage):
    write_shard(shards, 0, [row(1, "000000000")])
    table, tar = shards / "00000.parquet", shards / "00000.tar"
    if damage == "no parquet":
        table.unlink()
    elif damage == "cut parquet":
        table.write_bytes(table.read_bytes()[:-10])
    elif damage == "cut tar":
        tar.write_bytes(tar.read_bytes()[:700])
    else:
        pq.write_table(pq.read_table(table).drop(["sha256"]), table)

    with pytest.raises(PmdError, match="sha256" if damage == "no sha256" else "00000"):
        look_up_in(shards, [])


def test_deleted_shards_leave_the_catalogue(shards):
    for shard in (0, 1):
        write_shard(shards, shard, [row(shard, f"0000{shard}0000")])
    assert look_up_in(shards, [record(1)])(record(1))

    for path in shards.glob("00001*"):
        path.unlink()

    assert look_up_in(shards, [record(1)])(record(1)) is None


def test_shards_are_found_from_any_working_directory(shards, tmp_path, monkeypatch):
    write_shard(shards, 0, [row(1, "000000000")])
    monkeypatch.chdir(tmp_path)
    with open_pool("local", 1, None) as pool:
        build_catalogue("shards", "catalogue", pool)

    monkeypatch.chdir("/")

    assert open_img2dataset(str(tmp_path / "catalogue"), [record(1)])(record(1))


def test_a_shard_without_images_is_accepted(shards):
    write_shard(shards, 0, [row(1, "000000000")])
    write_shard(shards, 1, [failed(2, "000010000"), row(3, "000010001", url=None, status="failed")])

    assert look_up_in(shards, [record(1)])(record(1)).sha256 == fetched_sha256(1)
