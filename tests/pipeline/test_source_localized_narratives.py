import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_helpers import FIXTURES, bad_rows, good_rows, read_all, texts

from pmd_pipeline.base.record import Candidate, Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.recipe import RecipeError, checked_arguments, load_recipe
from pmd_pipeline.sources import find_annotations, load
from pmd_pipeline.sources.localized_narratives import pmd_sentences

NAME = "localized_narratives"
NARRATIVES = FIXTURES / NAME


def small(**options):
    return {row.id: row for row in good_rows(read_all(NAME, NARRATIVES, form="small", **options))}


def copy_beside_empty_files(folder, form, copied=()):
    """All required files of the form, empty except the copied ones."""
    for one in load(NAME).info.files:
        if one.form == form and one.required:
            (folder / one.pattern).touch()
    for path in copied:
        (folder / path.name).write_bytes(path.read_bytes())


def one_line(folder, line, name="coco_train_captions.jsonl"):
    copy_beside_empty_files(folder, "small")
    (folder / name).write_bytes(line + b"\n")
    return read_all(NAME, folder)


@pytest.mark.parametrize(
    ("narrative", "sentences"),
    [
        ("There is a kite. It is red.", ["There is a kite.", "It is red."]),
        ("A kite over a field", ["A kite over a field."]),
        ("It is 3.5 feet high.", ["It is 3.", "5 feet high."]),
        ("He lives in St. Ives.", ["He lives in St.", "Ives."]),
        ("A dog... and a cat.", ["A dog.", "and a cat."]),
        ("There is a car.It is red.", ["There is a car.", "It is red."]),
        ("Is it a dog? Yes! It is.", ["Is it a dog? Yes! It is."]),
        ("  . . ", []),
        ("", []),
    ],
)
def test_pmd_splits_at_every_full_stop_and_nowhere_else(narrative, sentences):
    assert pmd_sentences(narrative) == sentences


@given(st.text(alphabet="ab .?\n"))
def test_pmd_sentences_lose_nothing_but_blanks_and_full_stops(narrative):
    sentences = pmd_sentences(narrative)

    assert all(one.endswith(".") and one.strip(". ") for one in sentences)
    kept = [mark for mark in "".join(sentences) if mark in "ab?"]
    assert kept == [mark for mark in narrative if mark in "ab?"]


def test_a_narrative_becomes_sentences_of_its_image():
    rows = [row for row in good_rows(read_all(NAME, NARRATIVES / "small")) if row.id == "coco/101"]

    assert texts(rows[1:]) == ["A kite over a field."]
    assert rows[0] == Row(
        id="coco/101",
        url="http://images.cocodataset.org/train2017/000000000101.jpg",
        file="train2017/000000000101.jpg",
        candidates=[
            Candidate("In this image there is a kite.", "caption"),
            Candidate("It is red.", "caption"),
        ],
        meta={"family": "coco", "coco_id": 101},
    )


@pytest.mark.parametrize(
    ("image", "url", "file"),
    [
        (
            "coco/137576",
            "http://images.cocodataset.org/val2017/000000137576.jpg",
            "val2017/000000137576.jpg",
        ),
        (
            "open_images/00001bcc92282a38",
            "https://s3.amazonaws.com/open-images-dataset/train/00001bcc92282a38.jpg",
            "train/00001bcc92282a38.jpg",
        ),
        (
            "open_images/0001eeaf4aed83f9",
            "https://s3.amazonaws.com/open-images-dataset/validation/0001eeaf4aed83f9.jpg",
            "validation/0001eeaf4aed83f9.jpg",
        ),
        ("flickr30k/1000092795", None, "flickr30k-images/1000092795.jpg"),
        (
            "ade20k/ADE_train_00000001",
            None,
            "ADEChallengeData2016/images/training/ADE_train_00000001.jpg",
        ),
        (
            "ade20k/ADE_val_00000001",
            None,
            "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg",
        ),
    ],
)
def test_each_collection_has_its_own_image_addresses(image, url, file):
    row = small()[image]

    assert (row.url, row.file) == (url, file)


def test_ids_that_other_sources_share_are_kept():
    rows = small()

    assert rows["coco/137576"].meta["coco_id"] == 137576
    assert rows["flickr30k/1000092795"].meta["flickr_id"] == "1000092795"


def test_only_training_narratives_are_taken():
    refused = {image: row.refused for image, row in small().items()}

    assert refused == {
        "coco/101": None,
        "coco/103": None,
        "coco/137576": "split",
        "open_images/00001bcc92282a38": None,
        "open_images/0001eeaf4aed83f9": "split",
        "flickr30k/1000092795": None,
        "flickr30k/1007129816": "heldout",
        "ade20k/ADE_train_00000001": None,
        "ade20k/ADE_val_00000001": "split",
    }


def test_flickr30k_test_is_held_out_whatever_the_recipe_takes():
    rows = small(splits=["train", "val", "test"], families=["coco", "flickr30k"])

    assert rows["flickr30k/1007129816"].refused == "heldout"
    assert rows["coco/137576"].refused is None
    assert rows["ade20k/ADE_train_00000001"].refused == "split"


def test_a_whole_narrative_is_one_candidate():
    rows = read_all(NAME, NARRATIVES / "small", sentences="whole")

    assert "In this image there is a kite. It is red. " in texts(rows)
    assert all(len(row.candidates) == 1 for row in good_rows(rows))


def test_a_narrative_of_full_stops_is_counted_as_empty():
    assert small()["coco/103"].candidates == [Candidate(" ... ", "caption", refused="no_text")]


def test_bad_rows_count():
    assert [row.detail for row in bad_rows(read_all(NAME, NARRATIVES / "small"))] == [
        "image_id or caption is missing or no text",
        "the line is no JSON",
    ]


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b"\xff\xfe",
        json.dumps({"image_id": "../../etc/passwd", "caption": "A path."}).encode(),
        json.dumps({"image_id": "1" * 5000, "caption": "A number."}).encode(),
    ],
)
def test_a_hostile_line_is_a_bad_row(tmp_path, line):
    assert len(bad_rows(one_line(tmp_path, line))) == 1


def test_lines_without_a_collection_get_that_of_the_file_name(tmp_path):
    line = json.dumps({"image_id": "ADE_val_1", "caption": "A bed."}).encode()

    [row] = one_line(tmp_path, line, "ade20k_validation_captions.jsonl")

    assert (row.id, row.refused) == ("ade20k/ADE_val_1", "split")


@pytest.mark.parametrize(
    ("dataset_id", "image"),
    [
        ("openimages_train", "open_images/1"),
        ("Flick30k_train", "flickr30k/1"),
        ("ADE20k_train", "ade20k/1"),
    ],
)
def test_spellings_of_a_collection_are_equal(tmp_path, dataset_id, image):
    line = {"dataset_id": dataset_id, "image_id": "1", "caption": "A bed."}

    [row] = one_line(tmp_path, json.dumps(line).encode())

    assert (row.id, row.refused) == (image, None)


@pytest.mark.parametrize("form", ["small", "full"])
def test_a_form_without_all_training_narratives_is_incomplete(tmp_path, form):
    copy_beside_empty_files(tmp_path, form)
    next(tmp_path.glob("coco_train_*")).unlink()

    with pytest.raises(PmdError, match="coco_train_"):
        read_all(NAME, tmp_path, form=form)


def test_the_full_form_gives_the_rows_of_the_small_one(tmp_path):
    copy_beside_empty_files(tmp_path, "full", (NARRATIVES / "full").iterdir())

    rows = read_all(NAME, tmp_path)

    assert [row.id for row in rows] == ["coco/101", "coco/104"]
    assert texts(rows) == ["There is a kite.", "It is red.", "A bus."]


def test_sentences_of_facebook_pmd_are_not_split_again():
    rows = read_all(NAME, NARRATIVES / "pmd")

    assert texts(rows) == ["There is a kite of 3.", "5 feet.", "It is at St. Ives."]
    assert {row.id for row in rows} == {"coco/101"}


def test_whole_narratives_are_refused_for_files_of_sentences():
    with pytest.raises(PmdError, match="holds sentences"):
        read_all(NAME, NARRATIVES / "pmd", sentences="whole")


def test_every_published_file_has_its_own_pattern():
    published = load(NAME).info.files

    assert len({one.pattern for one in published}) == len(published) == 10 + 22 + 1


def test_the_recipe_is_pmds():
    [recipe] = load_recipe(NAME)

    assert recipe.options == {
        "sentences": "pmd",
        "families": ["open_images", "coco", "flickr30k", "ade20k"],
        "splits": ["train"],
    }
    with pytest.raises(RecipeError, match="families"):
        checked_arguments(load(NAME).read, {"families": ["imagenet"]}, where=NAME)


@settings(deadline=None)  # one byte a span opens files thousands of times
@given(size=st.integers(1, 1500))
def test_spans_of_any_size_give_every_line_once(size):
    whole = read_all(NAME, NARRATIVES / "small")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pmd_pipeline.sources.upstream.files.SPAN_BYTES", size)
        cut = read_all(NAME, NARRATIVES / "small")

    assert cut == whole


def test_a_span_reads_the_same_twice():
    source = load(NAME)

    for span in find_annotations(source, str(NARRATIVES / "small")).spans:
        assert list(source.read(span)) == list(source.read(span))
