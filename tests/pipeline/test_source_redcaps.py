import json
import zipfile
from pathlib import Path

import pytest

from pmd_pipeline.base.record import BadRow, Candidate
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import find_annotations, load
from pmd_pipeline.sources.upstream.files import UpstreamFile, matches

FIXTURES = Path(__file__).parents[1] / "fixtures" / "redcaps"
SAMPLES = Path(__file__).parents[3] / "shared" / "samples" / "redcaps" / "annotations"
GOOD = {"image_id": "x", "url": "https://i.redd.it/x.jpg", "raw_caption": "A heron"}


def rows(folder, **options):
    source = load("redcaps")
    return [
        row
        for span in find_annotations(source, str(folder)).spans
        for row in source.read(span, **options)
    ]


def with_posts(folder, *posts):
    (folder / "herons_2019.json").write_text(json.dumps({"annotations": posts}))
    return folder


def test_each_post_is_a_row_with_the_caption_as_it_was_posted():
    first, flickr, *_ = rows(FIXTURES)

    assert (first.id, first.url) == ("aaa111", "https://i.redd.it/heron1.jpg")
    assert first.candidates == [Candidate("A heron waits [OC] (4000x3000)", "raw_caption")]
    assert first.meta == {"subreddit": "herons", "created_utc": 1302998814, "score": 12}
    assert flickr.meta["flickr_id"] == "6255196340"
    assert flickr.candidates[0].text == "Two herons 😀"


def test_the_option_for_the_cleaned_caption_may_give_an_empty_one():
    texts = [row.candidates[0].text for row in rows(FIXTURES, caption="caption")]

    assert texts == ["a heron waits", "two herons", "", "an old mill"]


def test_of_several_links_the_first_is_taken():
    addresses = [row.url for row in rows(FIXTURES)]

    assert addresses[2:] == ["https://i.imgur.com/a,b.jpg", "https://i.imgur.com/d.jpg"]


def test_no_row_contains_the_author():
    posts = [
        post
        for path in FIXTURES.glob("*.json")
        for post in json.loads(path.read_text(encoding="utf-8"))["annotations"]
    ]

    printed = repr(rows(FIXTURES))

    assert posts
    assert not any(post["author"] in printed for post in posts if post["author"] != "None")
    assert "comments" not in printed


def test_a_score_and_a_caption_may_be_absent(tmp_path):
    with_posts(tmp_path, {**GOOD, "raw_caption": None})

    (row,) = rows(tmp_path)

    assert row.candidates == []
    assert row.meta == {}


@pytest.mark.parametrize(
    "bad",
    [
        None,
        ["a"],
        {**GOOD, "image_id": 7},
        {**GOOD, "image_id": ""},
        {**GOOD, "url": ""},
        {**GOOD, "url": " , "},
        {**GOOD, "url": "javascript:alert(1)"},
        {**GOOD, "raw_caption": ["A heron"]},
        {"image_id": "x"},
    ],
)
def test_a_bad_row_is_counted_and_the_next_row_is_read(tmp_path, bad):
    first, second = rows(with_posts(tmp_path, bad, GOOD))

    assert isinstance(first, BadRow)
    assert second.candidates == [Candidate("A heron", "raw_caption")]


def test_the_zip_gives_the_same_rows(tmp_path):
    with zipfile.ZipFile(tmp_path / "redcaps_v1.0_annotations.zip", "w") as archive:
        archive.writestr("LICENSE.txt", "CC BY 4.0")
        for path in FIXTURES.glob("*.json"):
            archive.write(path, f"annotations/{path.name}")
            archive.writestr(f"__MACOSX/annotations/._{path.name}", b"\0\5\x16\7")

    assert rows(tmp_path) == rows(FIXTURES)


def test_reading_again_gives_the_same_rows():
    assert rows(FIXTURES) == rows(FIXTURES)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("herons_2017.json", True),
        ("3dprinting_2020.json", True),
        ("captions_val2017.json", False),
        ("dataset_coco.json", False),
        ("image_data.json", False),
        ("herons.json", False),
    ],
)
def test_only_files_of_a_subreddit_and_a_year_are_taken(name, taken):
    (entry,) = load("redcaps").info.files

    assert matches(UpstreamFile(name), entry.pattern) is taken


@pytest.mark.parametrize("content", ["", '{"annotations": [{"image_id"', '{"images": []}', "[]"])
def test_another_file_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "herons_2019.json").write_text(content)

    with pytest.raises(PmdError, match=r"download it again|has no list at 'annotations'"):
        rows(tmp_path)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the samples beside the checkout")
def test_real_files_are_read():
    real = rows(SAMPLES)

    assert [row.id for row in real] == ["grraj", "h63b1", "7nbxym", "abdg17", "eib1zy"]
    assert real[2].candidates == [Candidate("Abandoned Train Tracks (Part 1)", "raw_caption")]
