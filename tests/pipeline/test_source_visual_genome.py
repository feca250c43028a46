import json

import pytest
from source_helpers import FIXTURES, SAMPLES, bad_rows, good_rows, needs_samples, read_all, texts

from pmd_pipeline.base.record import Candidate, Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.recipe import load_recipe
from pmd_pipeline.sources import find_annotations, load

GENOME = FIXTURES / "visual_genome"


def rows_of(image_id, form="v1.2"):
    rows = good_rows(read_all("visual_genome", GENOME / form, form))
    return [row for row in rows if row.id == image_id]


def test_the_folder_of_an_image_is_that_of_its_address():
    [first, _], [second, _] = rows_of("1"), rows_of("2")

    assert first == Row(
        id="1",
        url="https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg",
        file="VG_100K_2/1.jpg",
        width=800,
        height=600,
    )
    assert second.file == "VG_100K/2.jpg"


def test_ids_that_other_sources_share_are_kept_where_they_are_known():
    assert rows_of("2")[0].meta == {"coco_id": 101, "flickr_id": "2970000001"}


def test_boxes_have_their_corners_in_pixels():
    [_, regions] = rows_of("2")

    assert regions.candidates == [Candidate("a red kite", "phrase", box=(0, -3, 50.5, 7))]


def test_repeats_stay_and_regions_without_a_size_are_refused():
    [_, regions] = rows_of("1")

    clock = Candidate("the clock is green ", "phrase", box=(421, 57, 503, 196))
    assert regions.candidates == [
        clock,
        clock,
        Candidate("a line", "phrase", refused="bad_box"),
        Candidate("no height", "phrase", refused="bad_box"),
    ]


def test_both_versions_give_the_same_rows():
    old = read_all("visual_genome", GENOME / "v1.0")

    assert old == read_all("visual_genome", GENOME / "v1.2")
    assert len(texts(old)) == 6


def test_bad_rows_count():
    assert [row.detail for row in bad_rows(read_all("visual_genome", GENOME / "v1.2"))] == [
        "image 2 has no image_id or url",
        "image 1 has a region without phrase",
        "image 3 has no id or regions",
    ]


@pytest.mark.parametrize("value", [None, True, "5", [5], -5, 0])
@pytest.mark.parametrize("side", ["width", "height"])
def test_a_box_without_a_valid_side_is_refused(tmp_path, side, value):
    region = {"x": 1, "y": 2, "width": 3, "height": 4, "phrase": "a hat", side: value}
    (tmp_path / "image_data.json").write_text("[]")
    (tmp_path / "region_descriptions.json").write_text(json.dumps([{"id": 1, "regions": [region]}]))

    [row] = read_all("visual_genome", tmp_path)

    assert row.candidates == [Candidate("a hat", "phrase", refused="bad_box")]


@pytest.mark.parametrize("junk", [None, 3, "text", [], {}])
def test_invalid_values_among_the_rows_are_counted(tmp_path, junk):
    (tmp_path / "image_data.json").write_text(json.dumps([junk]))
    regions = [junk, {"id": 1, "regions": [junk]}]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(regions))

    assert len(bad_rows(read_all("visual_genome", tmp_path))) == 3


def test_regions_without_the_list_of_images_are_an_incomplete_form(tmp_path):
    (tmp_path / "region_descriptions.json").write_text("[]")

    with pytest.raises(PmdError, match="image_data"):
        read_all("visual_genome", tmp_path)


def test_a_file_that_is_not_a_list_is_refused(tmp_path):
    (tmp_path / "image_data.json").write_text('{"images": []}')
    (tmp_path / "region_descriptions.json").write_text("[]")

    with pytest.raises(PmdError, match=r"image_data\.json is JSON, but has no list"):
        read_all("visual_genome", tmp_path)


def test_the_recipe_keeps_pixels_for_regions():
    [recipe] = load_recipe("visual_genome")

    assert (recipe.images.mode, recipe.images.size) == ("longer", 640)
    assert recipe.captions.choose == "all"


def test_a_span_reads_the_same_twice():
    source = load("visual_genome")

    for span in find_annotations(source, str(GENOME / "v1.2")).spans:
        assert list(source.read(span)) == list(source.read(span))


@needs_samples
@pytest.mark.parametrize(
    ("folder", "form", "images", "regions"),
    [
        ("hf_dummy", "v1.2", 5, 1_278),
        ("hf_dummy", "v1.0", 5, 1_288),
        ("first100", "v1.2", 100, 7_278),
    ],
)
def test_the_samples_have_their_counts(folder, form, images, regions):
    rows = read_all("visual_genome", SAMPLES / "visual_genome" / folder, form)

    assert not bad_rows(rows)
    assert len(texts(rows)) == regions
    assert len({row.id for row in rows if row.url and row.file}) == images
    assert all(one.box for row in rows for one in row.candidates)
