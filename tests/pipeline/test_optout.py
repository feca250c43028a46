"""The opt-out list: an image is left out by each of its names, and no other image is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmd_pipeline.base.record import key_of
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.shards.optout import OptOut, add_to_list, load_list

PHOTO = "https://farm8.staticflickr.com/7153/6255196340_da26cf2c9e_z.jpg"
SHA256 = "ab" * 32


def optout_of(*lines):
    return OptOut.of(lines, "list")


@pytest.mark.parametrize(
    "line",
    [
        PHOTO,
        "HTTPS://FARM8.staticflickr.com:443/7153/6255196340_da26cf2c9e_z.jpg#top",
        "flickr:6255196340",
        "host:staticflickr.com",
        "Host: farm8.staticflickr.com",
        "yfcc100m:6255196340",
        key_of("yfcc100m", "6255196340"),
        f"  {PHOTO}   # requested by mail, 3 May",
    ],
)
def test_every_name_of_a_record_leaves_it_out(line):
    assert optout_of(line).has_record(key_of("yfcc100m", "6255196340"), PHOTO)


@pytest.mark.parametrize(
    "line",
    [
        "https://farm8.staticflickr.com/7153/6255196340_da26cf2c9e_b.jpg",
        "flickr:62551963",
        "host:flickr.com",
        "host:8.staticflickr.com",
        "redcaps:6255196340",
        SHA256,
        "# " + PHOTO,
        "",
    ],
)
def test_the_name_of_another_record_does_not_leave_it_out(line):
    assert not optout_of(line).has_record(key_of("yfcc100m", "6255196340"), PHOTO)


def test_fetched_bytes_are_left_out_by_their_hash_and_their_final_address():
    assert optout_of(SHA256.upper()).has_bytes(SHA256, None)
    assert optout_of("host:example.org").has_bytes(SHA256, "http://cdn.example.org/1.jpg")
    assert not optout_of(SHA256).has_bytes("cd" * 32, "http://cdn.example.org/1.jpg")
    assert not OptOut().has_bytes(None, None)


@pytest.mark.parametrize("line", ["nonsense", "ftp://a.example/", "abc123", "flickr:me", "host:x"])
def test_a_line_that_is_no_entry_is_an_error_with_its_number(line):
    with pytest.raises(PmdError, match=r"list, line 2: .* is no address"):
        optout_of("# fine", line)


def test_a_list_only_grows_and_its_digest_changes_with_it(tmp_path):
    (tmp_path / "one.txt").write_text(f"{PHOTO}\n")
    (tmp_path / "two.txt").write_text(f"{SHA256}\n{PHOTO}\n")
    data = str(tmp_path / "data")

    assert load_list(data) == OptOut()
    assert load_list(data).digest is None
    add_to_list(data, str(tmp_path / "two.txt"))
    both = add_to_list(data, str(tmp_path / "one.txt"))

    assert both == load_list(data) == optout_of(SHA256, PHOTO)
    assert both.digest != optout_of(SHA256).digest


def test_a_missing_list_is_an_error(tmp_path):
    with pytest.raises(PmdError, match=r"nowhere\.txt"):
        add_to_list(str(tmp_path), str(tmp_path / "nowhere.txt"))


@given(st.text(max_size=60))
def test_any_text_can_be_looked_up_as_an_address(url):
    assert not optout_of(SHA256, "host:example.org").has_record("0" * 16, url)
