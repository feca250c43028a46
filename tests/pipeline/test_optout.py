"""What somebody wants left out is recognised by every name it may have, and by nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmd_pipeline.base.record import key_of
from pmd_pipeline.build.optout import OptOut, add_to_list, load_list
from pmd_pipeline.contract.errors import PmdError

PHOTO = "https://farm8.staticflickr.com/7153/6255196340_da26cf2c9e_z.jpg"
SHA = "ab" * 32


def listed(*lines):
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
        f"  {PHOTO}   # asked by mail, 3 May",
    ],
)
def test_a_record_is_left_out_by_any_of_its_names(line):
    assert listed(line).has_record(key_of("yfcc100m", "6255196340"), PHOTO)


@pytest.mark.parametrize(
    "line",
    [
        "https://farm8.staticflickr.com/7153/6255196340_da26cf2c9e_b.jpg",
        "flickr:62551963",
        "host:flickr.com",
        "host:8.staticflickr.com",
        "redcaps:6255196340",
        SHA,
        "# " + PHOTO,
        "",
    ],
)
def test_a_record_stays_when_another_is_meant(line):
    assert not listed(line).has_record(key_of("yfcc100m", "6255196340"), PHOTO)


def test_bytes_are_left_out_by_their_hash_and_by_where_they_came_from_at_last():
    assert listed(SHA.upper()).has_bytes(SHA, None)
    assert listed("host:example.org").has_bytes(SHA, "http://cdn.example.org/1.jpg")
    assert not listed(SHA).has_bytes("cd" * 32, "http://cdn.example.org/1.jpg")
    assert not OptOut().has_bytes(None, None)


@pytest.mark.parametrize("line", ["nonsense", "ftp://a.example/", "abc123", "flickr:me", "host:x"])
def test_a_line_that_means_nothing_is_told_with_its_number(line):
    with pytest.raises(PmdError, match=r"list, line 2: .* is no address"):
        listed("# fine", line)


def test_a_list_only_grows_and_tells_itself_apart(tmp_path):
    (tmp_path / "one.txt").write_text(f"{PHOTO}\n")
    (tmp_path / "two.txt").write_text(f"{SHA}\n{PHOTO}\n")
    data = str(tmp_path / "data")

    assert load_list(data) == OptOut()
    assert load_list(data).digest is None
    add_to_list(data, str(tmp_path / "two.txt"))
    both = add_to_list(data, str(tmp_path / "one.txt"))

    assert both == load_list(data) == listed(SHA, PHOTO)
    assert both.digest != listed(SHA).digest


def test_a_list_that_is_not_there_is_told(tmp_path):
    with pytest.raises(PmdError, match=r"nowhere\.txt"):
        add_to_list(str(tmp_path), str(tmp_path / "nowhere.txt"))


@given(st.text(max_size=60))
def test_any_address_of_a_hostile_record_can_be_asked_about(url):
    assert not listed(SHA, "host:example.org").has_record("0" * 16, url)
