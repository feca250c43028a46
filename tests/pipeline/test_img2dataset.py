"""Shards exactly as img2dataset lays them out, right ones and wrong ones."""

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
    known = {
        "key": f"{number:016x}", "id": str(number), "url": url(number), "file": None,
        "licence": None, "width": None, "height": None, "sha256": None, "meta": None,
        "captions": ["another caption", f"a dog, number {number}"], "fields": ["caption"] * 2,
        "boxes": None, "spans": [0, 0], "rows": [0, 1],
    }  # fmt: skip
    return IndexRecord(**{**known, **changes})


def url(number):
    return f"http://Host{number}.example/a b/{number}.jpg?x=y"


def fetched(number):
    return hashlib.sha256(f"as fetched {number}".encode()).hexdigest()


def row(number, key, **changes):
    known = {
        "url": url(number), "caption": f"  a dog,\nnumber {number}", "key": key,
        "status": "success", "error_message": None, "width": 256, "height": 192,
        "original_width": 1024, "original_height": 768, "exif": "{}", "sha256": fetched(number),
    }  # fmt: skip
    return {**known, **changes}


def failed(number, key, status="failed_to_download"):
    nothing = dict.fromkeys(["width", "height", "original_width", "original_height", "exif"])
    return row(number, key, **nothing, sha256=None, status=status, error_message="HTTP Error 404")


def write_shard(place, shard, rows, samples=None, image="jpg"):
    """A tar with its Parquet file and its stats; `samples` says otherwise what the json holds."""
    place.mkdir(exist_ok=True)
    with tarfile.open(place / f"{shard:05d}.tar", "w") as tar:
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
    pq.write_table(pa.Table.from_pylist(rows), place / f"{shard:05d}.parquet")
    (place / f"{shard:05d}_stats.json").write_text(json.dumps({"count": len(rows)}))


def opened(place, records, folder=None):
    catalogues = str(folder or place.parent / "catalogue")
    with open_pool("local", 1, None) as pool:
        build_catalogue(str(place), catalogues, pool)
    return open_img2dataset(catalogues, records)


def refusal(place, wanted):
    with pytest.raises(RecordError) as caught:
        opened(place, [wanted])(wanted)
    return caught.value.kind


@pytest.fixture
def place(tmp_path):
    return tmp_path / "shards"


def test_the_columns_of_these_tests_are_those_of_img2dataset():
    assert tuple(row(1, "000000000")) == COLUMNS


def test_a_folder_of_shards_is_known_by_their_stats(place):
    write_shard(place, 0, [row(1, "000000000")])
    assert is_img2dataset(str(place))

    (place / "00000_stats.json").unlink()
    assert not is_img2dataset(str(place))
    assert not is_img2dataset(str(place / "00000.tar"))
    assert not is_img2dataset(str(place / "nowhere"))


@pytest.mark.parametrize("image", ["jpg", "png", "webp"])
def test_images_are_taken_with_what_is_known_of_them_as_fetched(place, image):
    write_shard(place, 0, [row(n, f"00000000{n}") for n in (3, 1)], image=image)
    write_shard(place, 1, [row(n, f"00001000{n}") for n in (2, 4)], image=image)
    records = [record(number) for number in (1, 2, 3, 4)]

    shelf = opened(place, records)

    for number, wanted in enumerate(records, start=1):
        found = shelf(wanted)
        assert found.body == f"stored {url(number)}".encode()
        assert found.sha256 == fetched(number)
        assert found.original_size == (1024, 768)
        assert found.final_url is None


def test_a_catalogue_may_lie_in_a_folder_of_any_name(place, tmp_path):
    write_shard(place, 0, [row(1, "000000000")])
    write_shard(place, 1, [row(2, "000010000")])
    wanted = [record(1), record(2)]

    shelf = opened(place, wanted, tmp_path / "data[1-2] {a,b} *?" / "catalogue")

    assert [shelf(one).body for one in wanted] == [f"stored {url(n)}".encode() for n in (1, 2)]


def test_what_the_shards_do_not_have_is_left_to_other_places(place):
    write_shard(place, 0, [row(1, "000000000")])
    others = [record(2), record(3, url=None)]

    shelf = opened(place, [record(1), *others])

    assert [shelf(other) for other in others] == [None, None]


@pytest.mark.parametrize(
    "spelling",
    [
        "https://host1.example/a%20b/1.jpg?x=y",
        "HTTP://HOST1.EXAMPLE:80/a b/1.jpg?x=y#top",
    ],
)
def test_an_address_is_known_in_every_spelling(place, spelling):
    write_shard(place, 0, [row(1, "000000000")])
    wanted = record(1, url=spelling)

    assert opened(place, [wanted])(wanted).sha256 == fetched(1)


def test_one_caption_of_the_record_is_enough_and_none_is_no_contradiction(place):
    without = row(2, "000000001")
    del without["caption"]
    write_shard(
        place,
        0,
        [row(1, "000000000"), row(2, "000000001", caption=None)],
        samples={"000000001": without},
    )
    records = [record(1), record(2)]
    shelf = opened(place, records)

    assert all(shelf(wanted) for wanted in records)


def test_another_caption_is_refused(place):
    write_shard(place, 0, [row(1, "000000000", caption="a cat")])

    assert refusal(place, record(1)) == "caption_mismatch"


@pytest.mark.parametrize("stated", [fetched(2), None, 7])
def test_a_json_with_another_sha256_than_its_parquet_is_refused(place, stated):
    sample = row(1, "000000000", sha256=stated)
    write_shard(place, 0, [row(1, "000000000")], samples={"000000000": sample})

    assert refusal(place, record(1)) == "changed"


@pytest.mark.parametrize("stated", [None, "", "abc", "G" * 64])
def test_a_shard_that_states_no_sha256_is_refused(place, stated):
    write_shard(place, 0, [row(1, "000000000", sha256=stated), row(2, "000000001")])

    assert refusal(place, record(1)) == "changed"


def test_other_bytes_than_upstream_s_are_refused(place):
    write_shard(place, 0, [row(1, "000000000")])

    assert refusal(place, record(1, sha256=fetched(2))) == "changed"
    wanted = record(1, sha256=fetched(1))
    assert opened(place, [wanted])(wanted).sha256 == fetched(1)


@pytest.mark.parametrize("status", ["failed_to_download", "failed_to_resize", None])
def test_a_row_that_failed_is_not_in_the_archive(place, status):
    write_shard(place, 0, [failed(1, "000000000", status), row(2, "000000001")])

    assert refusal(place, record(1)) == "not_in_archive"


def test_of_two_rows_of_an_address_the_one_that_worked_is_taken(place):
    write_shard(place, 0, [failed(1, "000000000"), row(1, "000000001"), failed(1, "000000002")])

    assert opened(place, [record(1)])(record(1)).sha256 == fetched(1)


@pytest.mark.parametrize("lost", ["jpg", "json"])
def test_a_row_without_its_members_is_not_in_the_archive(place, lost):
    write_shard(place, 0, [row(1, "000000000")])
    with tarfile.open(place / "00000.tar") as tar:
        kept = {name: tar.extractfile(name).read() for name in tar.getnames()}
    del kept[f"000000000.{lost}"]
    with tarfile.open(place / "00000.tar", "w") as tar:
        for name, content in kept.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

    assert refusal(place, record(1)) == "not_in_archive"


def test_the_tar_of_another_shard_is_found_out(place):
    write_shard(place, 0, [row(1, "000000000")])
    write_shard(place, 1, [row(2, "000010000")])
    swap(place / "00000.tar", place / "00001.tar")

    assert refusal(place, record(1)) == "not_in_archive"


def test_the_tar_of_another_run_is_found_out(place, tmp_path):
    write_shard(place, 0, [row(1, "000000000")])
    write_shard(tmp_path / "other", 0, [row(2, "000000000")])
    swap(place / "00000.tar", tmp_path / "other" / "00000.tar")

    assert refusal(place, record(1)) == "caption_mismatch"


def test_a_json_about_another_address_is_refused(place):
    sample = row(1, "000000000", url=url(2))
    write_shard(place, 0, [row(1, "000000000")], samples={"000000000": sample})

    assert refusal(place, record(1)) == "caption_mismatch"


def swap(one, other):
    kept = one.read_bytes()
    shutil.copyfile(other, one)
    other.write_bytes(kept)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_json_that_is_damaged_is_refused(place, content):
    write_shard(place, 0, [row(1, "000000000")], samples={"000000000": content})

    assert refusal(place, record(1)) == "truncated"


@pytest.mark.parametrize("size", [0, -1, None, "1024"])
def test_a_size_that_cannot_be_is_not_known(place, size):
    sample = row(1, "000000000", original_width=size)
    write_shard(place, 0, [row(1, "000000000")], samples={"000000000": sample})

    assert opened(place, [record(1)])(record(1)).original_size is None


def test_a_tar_that_was_cut_since_loses_a_record(place):
    write_shard(place, 0, [row(1, "000000000")])
    shelf = opened(place, [record(1)])
    (place / "00000.tar").write_bytes((place / "00000.tar").read_bytes()[:520])

    with pytest.raises(RecordError) as caught:
        shelf(record(1))
    assert caught.value.kind == "truncated"


def test_a_tar_that_went_away_is_named(place):
    write_shard(place, 0, [row(1, "000000000")])
    shelf = opened(place, [record(1)])
    (place / "00000.tar").unlink()

    with pytest.raises(PmdError, match=r"00000\.tar"):
        shelf(record(1))


@pytest.mark.parametrize("damage", ["no parquet", "cut parquet", "cut tar", "no sha256"])
def test_a_shard_that_cannot_be_checked_is_named(place, damage):
    write_shard(place, 0, [row(1, "000000000")])
    table, tar = place / "00000.parquet", place / "00000.tar"
    if damage == "no parquet":
        table.unlink()
    elif damage == "cut parquet":
        table.write_bytes(table.read_bytes()[:-10])
    elif damage == "cut tar":
        tar.write_bytes(tar.read_bytes()[:700])
    else:
        pq.write_table(pq.read_table(table).drop(["sha256"]), table)

    with pytest.raises(PmdError, match="sha256" if damage == "no sha256" else "00000"):
        opened(place, [])


def test_shards_that_went_away_are_forgotten(place):
    for shard in (0, 1):
        write_shard(place, shard, [row(shard, f"0000{shard}0000")])
    assert opened(place, [record(1)])(record(1))

    for path in place.glob("00001*"):
        path.unlink()

    assert opened(place, [record(1)])(record(1)) is None


def test_shards_are_found_from_any_folder(place, tmp_path, monkeypatch):
    write_shard(place, 0, [row(1, "000000000")])
    monkeypatch.chdir(tmp_path)
    with open_pool("local", 1, None) as pool:
        build_catalogue("shards", "catalogue", pool)

    monkeypatch.chdir("/")

    assert open_img2dataset(str(tmp_path / "catalogue"), [record(1)])(record(1))


def test_an_empty_shard_is_no_trouble(place):
    write_shard(place, 0, [row(1, "000000000")])
    write_shard(place, 1, [failed(2, "000010000"), row(3, "000010001", url=None, status="failed")])

    assert opened(place, [record(1)])(record(1)).sha256 == fetched(1)
