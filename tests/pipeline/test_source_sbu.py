import json
import tarfile

import pytest
from source_helpers import FIXTURES, SAMPLES, bad_rows, good_rows, needs_samples, read_all, texts

from pmd_pipeline.base.record import Candidate, Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import find_annotations, load

JSON = FIXTURES / "sbu" / "json"
TEXT = FIXTURES / "sbu" / "text"


def write_columns(folder, **columns):
    (folder / "sbu-captions-all.json").write_text(json.dumps(columns))


def test_columns_become_rows_with_the_secure_address():
    first = read_all("sbu", JSON)[0]

    assert first == Row(
        id="https://static.flickr.com/2723/4380000001_b0f291553e.jpg",
        url="https://static.flickr.com/2723/4380000001_b0f291553e.jpg",
        candidates=[Candidate("A grey bench by the canal ", "caption")],
        meta={"flickr_id": "4380000001"},
    )


def test_captions_stay_as_upstream_has_them():
    assert texts(read_all("sbu", JSON)) == [
        "A grey bench by the canal ",
        "Our boat\u2028in the harbour",
        '"quoted" sign, café wall',
    ]


def test_other_hosts_keep_their_address_and_have_no_flickr_id():
    last = good_rows(read_all("sbu", JSON))[-1]

    assert last.url == "http://example.org/not-flickr.jpg"
    assert last.meta == {}


def test_no_row_contains_a_user_id():
    assert "@N0" not in repr(read_all("sbu", JSON))


def test_bad_rows_count():
    assert [row.detail for row in bad_rows(read_all("sbu", JSON))] == [
        "row 2 has no http address",
        "row 3 has no caption",
    ]


def test_the_list_is_read_inside_its_tar(tmp_path):
    with tarfile.open(tmp_path / "sbu-captions-all.tar.gz", "w:gz") as archive:
        archive.add(JSON / "sbu-captions-all.json", "sbu-captions-all.json")

    assert read_all("sbu", tmp_path) == read_all("sbu", JSON)


@pytest.mark.parametrize("short", ["image_urls", "user_ids", "captions"])
def test_columns_of_unequal_length_are_refused(tmp_path, short):
    columns = {name: ["http://example.org/a.jpg"] * 3 for name in ("image_urls", "captions")}
    columns["user_ids"] = ["1", "2", "3"]
    columns[short].pop()
    write_columns(tmp_path, **columns)

    with pytest.raises(PmdError, match=r"have different lengths \(one ends after 2\)"):
        read_all("sbu", tmp_path)


def test_a_list_of_records_is_refused(tmp_path):
    (tmp_path / "sbu-captions-all.json").write_text('[{"image_url": "http://example.org/a.jpg"}]')

    with pytest.raises(PmdError, match="no list at 'image_urls'"):
        read_all("sbu", tmp_path)


def test_two_text_files_are_joined_by_line_number_and_only_newlines_end_lines():
    rows = read_all("sbu", TEXT)

    assert [row.meta["flickr_id"] for row in rows] == ["4380000001", "5140000002", "5070000004"]
    assert texts(rows) == [
        "A grey bench by the canal",
        "Our boat\u2028in the\u0085harbour",
        "A third caption",
    ]


@pytest.mark.parametrize("short", ["urls", "captions"])
def test_text_files_of_unequal_length_are_refused(tmp_path, short):
    for path in TEXT.iterdir():
        content = path.read_bytes()
        cut = content.rstrip(b"\n").rindex(b"\n") + 1 if short in path.name else None
        (tmp_path / path.name).write_bytes(content[:cut])

    with pytest.raises(PmdError, match=r"urls\.txt and .*captions\.txt: the lists have different"):
        read_all("sbu", tmp_path)


def test_one_text_file_alone_is_an_incomplete_form(tmp_path):
    name = "SBU_captioned_photo_dataset_urls.txt"
    (tmp_path / name).write_bytes((TEXT / name).read_bytes())

    with pytest.raises(PmdError, match=r"dataset_captions\.txt"):
        read_all("sbu", tmp_path)


@pytest.mark.parametrize("folder", [JSON, TEXT])
def test_a_span_reads_the_same_twice(folder):
    source = load("sbu")
    [span] = find_annotations(source, str(folder)).spans

    assert list(source.read(span)) == list(source.read(span))


@needs_samples
def test_the_sample_has_five_rows():
    rows = read_all("sbu", SAMPLES / "sbu")

    assert len(good_rows(rows)) == len(rows) == 5
    assert all(row.meta["flickr_id"].isdigit() for row in rows)
