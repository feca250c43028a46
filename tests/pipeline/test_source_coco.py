import json
import zipfile
from collections import Counter

import pytest
from source_helpers import FIXTURES, SAMPLES, bad_rows, good_rows, needs_samples, read_all, texts

from pmd_pipeline.base.record import Candidate, Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.recipe import RecipeError, checked_arguments, load_recipe
from pmd_pipeline.sources import find_annotations, load

KARPATHY = FIXTURES / "coco" / "karpathy"
CAPTIONS = FIXTURES / "coco" / "captions"


def test_each_sentence_of_a_karpathy_image_is_a_candidate():
    first = read_all("coco", KARPATHY)[0]

    assert first == Row(
        id="101",
        url="http://images.cocodataset.org/train2014/COCO_train2014_000000000101.jpg",
        file="train2014/COCO_train2014_000000000101.jpg",
        candidates=[
            Candidate("A red kite over a field. ", "raw"),
            Candidate("Someone flies\na kite.", "raw"),
        ],
        meta={"coco_id": 101},
    )


def test_restval_images_are_taken_from_the_folder_of_val2014():
    rows = {row.id: row for row in good_rows(read_all("coco", KARPATHY))}

    assert rows["202"].file == "val2014/COCO_val2014_000000000202.jpg"
    assert rows["202"].refused is None


@pytest.mark.parametrize("filepath", [None, "train2014"])
def test_the_name_of_an_image_decides_its_folder_over_other_hints(tmp_path, filepath):
    image = {"cocoid": 1, "filename": "COCO_val2014_000000000001.jpg", "sentences": []}
    split = {"dataset": "coco", "images": [{**image, "filepath": filepath, "split": "train"}]}
    (tmp_path / "dataset_coco.json").write_text(json.dumps(split))

    [row] = read_all("coco", tmp_path)

    assert row.file == "val2014/COCO_val2014_000000000001.jpg"


def test_karpathys_val_and_test_are_held_out():
    rows = good_rows(read_all("coco", KARPATHY))

    assert [row.id for row in rows if row.refused == "heldout"] == ["303", "404"]


def test_an_image_of_another_split_is_refused_as_split():
    rows = {row.id: row.refused for row in good_rows(read_all("coco", KARPATHY, splits=["train"]))}

    assert rows["202"] == "split"
    assert rows["303"] == "heldout"


def test_the_recipe_takes_train_and_restval_and_cannot_take_test():
    [recipe] = load_recipe("coco")

    assert recipe.options == {"splits": ["train", "restval"]}
    with pytest.raises(RecipeError, match="splits"):
        checked_arguments(load("coco").read, {"splits": ["test"]}, where="coco")


def test_a_bad_image_and_a_bad_sentence_count_once_each():
    rows = read_all("coco", KARPATHY)

    assert [row.detail for row in bad_rows(rows)] == [
        "images[4] has no cocoid, filename or sentences",
        "images[5] has a sentence without raw",
    ]
    assert texts(rows)[-1] == "A good sentence."


def test_the_split_is_found_inside_karpathys_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "caption_datasets.zip", "w") as archive:
        archive.write(KARPATHY / "dataset_coco.json", "dataset_coco.json")
        archive.writestr("dataset_flickr8k.json", "{}")

    assert read_all("coco", tmp_path) == read_all("coco", KARPATHY)


def test_another_data_set_under_cocos_name_is_refused(tmp_path):
    flickr = {"images": [{"filename": "1.jpg", "sentences": []}], "dataset": "flickr8k"}
    (tmp_path / "dataset_coco.json").write_text(json.dumps(flickr))

    with pytest.raises(PmdError, match=r"has dataset 'flickr8k' instead of 'coco'"):
        read_all("coco", tmp_path)


def test_captions_of_2014_beside_the_split_give_licence_size_and_flickr_id(tmp_path):
    for path in (KARPATHY / "dataset_coco.json", CAPTIONS / "captions_train2014.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    rows = good_rows(read_all("coco", tmp_path))
    first = next(row for row in rows if row.id == "101")

    assert first.licence == "Attribution License (http://creativecommons.org/licenses/by/2.0/)"
    assert first.meta == {"coco_id": 101, "flickr_id": "2970000001"}
    assert texts(rows) == texts(read_all("coco", KARPATHY))


def test_images_and_captions_of_cocos_own_files_are_rows_with_one_id():
    rows = [row for row in good_rows(read_all("coco", CAPTIONS)) if row.id == "101"]

    assert rows == [
        Row(
            id="101",
            url="http://images.cocodataset.org/train2014/COCO_train2014_000000000101.jpg",
            file="train2014/COCO_train2014_000000000101.jpg",
            licence="Attribution License (http://creativecommons.org/licenses/by/2.0/)",
            width=640,
            height=480,
            meta={"coco_id": 101, "flickr_id": "2970000001"},
        ),
        Row(
            id="101",
            candidates=[Candidate("A red kite over a field. ", "caption")],
            meta={"coco_id": 101},
        ),
    ]


def test_all_files_of_a_year_are_read_but_not_the_same_captions_of_both_years():
    default = good_rows(read_all("coco", CAPTIONS))
    of_2017 = good_rows(read_all("coco", CAPTIONS, form="captions2017"))

    assert {row.id for row in default} == {"101", "606", "202", "999"}
    assert {row.id for row in of_2017} == {"808"}


def test_the_key_order_of_the_file_does_not_matter():
    rows = [row for row in good_rows(read_all("coco", CAPTIONS)) if row.id == "202"]

    assert rows[0].licence
    assert rows[0].licence.startswith("Attribution-NonCommercial-ShareAlike")
    assert rows[1].candidates == [Candidate("Two cups on a shelf.", "caption")]


def test_names_of_2017_get_their_folder_from_the_address():
    [image, _] = read_all("coco", CAPTIONS, form="captions2017")

    assert image.file == "val2017/000000000808.jpg"
    assert image.url == "http://images.cocodataset.org/val2017/000000000808.jpg"


def test_images_of_ones_own_in_cocos_format_need_no_licences_or_addresses(tmp_path):
    own = {
        "images": [{"id": 7, "file_name": "garden/1000_ab.jpg", "width": 8, "height": 9}],
        "annotations": [{"image_id": 7, "id": 1, "caption": "A rose."}],
    }
    (tmp_path / "captions_own.json").write_text(json.dumps(own))

    image, caption = read_all("coco", tmp_path)

    assert (image.id, image.url, image.file) == ("7", None, "garden/1000_ab.jpg")
    assert texts([caption]) == ["A rose."]


def test_bad_rows_of_cocos_own_files_count():
    rows = read_all("coco", CAPTIONS)

    assert [row.detail for row in bad_rows(rows)] == [
        "images[2] has no id or file_name",
        "annotations[2] has no image_id or caption",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"images": [], "annotations": [{"image_id": 1, "category_id": 3}]},
            "objects or keypoints",
        ),
        (
            {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": []},
            "no list at 'annotations'",
        ),
        ([], "no list at 'images'"),
    ],
)
def test_a_file_of_another_coco_task_is_refused(tmp_path, content, message):
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content))

    with pytest.raises(PmdError, match=message):
        read_all("coco", tmp_path)


def test_a_file_cut_short_is_refused(tmp_path):
    whole = (CAPTIONS / "captions_val2014.json").read_bytes()
    (tmp_path / "captions_val2014.json").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(PmdError, match="not a whole JSON file"):
        read_all("coco", tmp_path)


@pytest.mark.parametrize(
    "junk",
    [
        *(None, 3, "text", [], {}),
        *({"id": wrong, "file_name": "1.jpg"} for wrong in (True, -1, 1.5, "1", 1 << 60)),
    ],
)
def test_invalid_values_among_the_rows_are_counted(tmp_path, junk):
    content = {"images": [junk], "annotations": [junk], "licenses": [junk]}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content))
    split = {"dataset": "coco", "images": [junk]}
    (tmp_path / "dataset_coco.json").write_text(json.dumps(split))

    assert len(bad_rows(read_all("coco", tmp_path, form="captions"))) == 2
    assert len(bad_rows(read_all("coco", tmp_path, form="karpathy"))) == 2


def test_a_span_reads_the_same_twice():
    source = load("coco")
    [span] = find_annotations(source, str(KARPATHY)).spans

    assert list(source.read(span)) == list(source.read(span))


@needs_samples
def test_val2017_has_5000_images_and_25014_captions(tmp_path):
    (tmp_path / "captions_val2017.json").symlink_to(SAMPLES / "coco" / "captions_val2017.json")

    rows = read_all("coco", tmp_path)
    captions = Counter(row.id for row in good_rows(rows) if row.candidates)

    assert not bad_rows(rows)
    assert sum(1 for row in rows if row.url) == 5_000
    assert sorted(Counter(captions.values()).items()) == [(5, 4_987), (6, 12), (7, 1)]
    assert all(row.licence and row.meta["flickr_id"] for row in rows if row.url)


@needs_samples
def test_the_mini_copy_has_80_images_and_400_captions():
    rows = read_all("coco", SAMPLES / "coco" / "mini")

    assert len([row for row in rows if row.url]) == 80
    assert len(texts(rows)) == 400


@needs_samples
def test_captions_of_lists_cut_to_100_are_orphans():
    rows = good_rows(read_all("coco", SAMPLES / "coco" / "first100", form="captions2017"))
    images = {row.id for row in rows if row.url}
    orphans = [row for row in rows if row.candidates and row.id not in images]

    assert len(texts(rows)) == 200
    assert len(orphans) > 190
    assert all(isinstance(row.meta["coco_id"], int) for row in orphans)
