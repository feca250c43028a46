"""The sample world: deterministic bytes, true captions, and a web with the stated failures."""

import http.client
import io
import json
import re
import statistics
from collections import Counter
from contextlib import closing, nullcontext
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image, ImageOps

from pmd_pipeline import sources
from pmd_pipeline.base.record import BadRow, one_line
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.reasons import DROP_REASONS, FAILURE_REASONS
from pmd_pipeline.demo.world import load_world, serve, write_world
from pmd_pipeline.demo.world.captions import foreign, region_phrases
from pmd_pipeline.demo.world.languages import LANGUAGES
from pmd_pipeline.demo.world.responses import (
    FIRST_STATUSES,
    REMOVED,
    RESPONSE_REASONS,
    STATUSES,
    UNAVAILABLE,
    sample_body,
)
from pmd_pipeline.demo.world.sample_source import address_of
from pmd_pipeline.demo.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    SHAPES,
    SIZES,
    draw_scene,
    make_scene,
)
from pmd_pipeline.filters.caption import identify
from pmd_pipeline.index.choose import Chooser
from pmd_pipeline.recipe import load_recipe

SOURCES = sources.names("pmd")

POSITION_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
GROUP = re.compile(
    rf"\b(an?|two|three) (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    rf"((?:e?s)?)\b(?: ({'|'.join(POSITION_PHRASES.values())}))?",
    re.IGNORECASE,
)
BACKGROUND = re.compile(rf"\b({'|'.join(PATTERNS)}) (\w+) background")
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def rows(world):
    """Every row of a source, read by its own module."""

    def read(name):
        source = sources.load(name)
        spans = sources.find_annotations(source, str(world.folder / "raw" / name)).spans
        return [row for span in spans for row in source.read(span)]

    return read


@pytest.fixture(scope="module")
def captions_of(world, rows):
    """Every text of a source with the scene that it describes."""

    def read_captions(name):
        valid_rows = [row for row in rows(name) if not isinstance(row, BadRow)]
        scenes = {row.id: scene for row in valid_rows if (scene := scene_of(world, row))}
        return [
            (scenes[row.id], one)
            for row in valid_rows
            if row.id in scenes
            for one in row.candidates
        ]

    return read_captions


@pytest.fixture(scope="module")
def origin(world):
    with serve(world) as address:
        yield address


def scene_of(world, row):
    if row.url:
        entry = world.web.get(address_of(row.url))
        return entry.scene if entry else None
    path = next((path for path in world.archived if row.file and path.endswith(row.file)), None)
    return world.archived.get(path)


def addresses(world, kind):
    return [address for address, entry in world.web.items() if entry.response == kind]


def request(origin, address, connection=None):
    host, _, path = address.partition("/")
    with closing(connect(origin)) if connection is None else nullcontext(connection) as client:
        client.request("GET", f"/{path}", headers={"Host": host})
        response = client.getresponse()
        return response.status, response.read(), response.headers


def connect(origin):
    return http.client.HTTPConnection(urlsplit(origin).netloc, timeout=10)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def groups_of_caption(caption):
    return [
        (NUMBERS[count.lower()], size.lower(), colour.lower(), shape, plural, position)
        for count, size, colour, shape, plural, position in GROUP.findall(caption)
    ]


def test_one_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_world(tmp_path / name, scenes=40, seed=seed)

    first, again, other = (files(tmp_path / name) for name in "abc")

    assert first == again
    assert first.keys() == other.keys()
    changed = " ".join(name for name in first if first[name] != other[name])
    assert [name for name in SOURCES if f"raw/{name}/" not in changed] == []


def test_a_loaded_world_equals_the_written_one(tmp_path):
    written = write_world(tmp_path, scenes=20, seed=5)

    assert load_world(tmp_path) == written


def test_a_source_does_not_depend_on_the_other_sources_written(tmp_path):
    whole = write_world(tmp_path / "whole", scenes=40)
    alone = write_world(tmp_path / "alone", scenes=40, only=("coco",))

    assert alone.expected == {"coco": whole.expected["coco"]}
    assert load_world(tmp_path / "alone") == alone
    assert files(tmp_path / "alone" / "raw").items() <= files(tmp_path / "whole" / "raw").items()


def test_a_folder_without_a_world_is_named(tmp_path):
    with pytest.raises(PmdError, match="has no sample world"):
        load_world(tmp_path)


def test_too_few_scenes_are_refused(tmp_path):
    with pytest.raises(PmdError, match="needs 20 scenes"):
        write_world(tmp_path, scenes=19)


@pytest.mark.parametrize("name", SOURCES)
def test_expected_counts_add_up_and_use_known_reasons(world, name):
    counts = world.expected[name]

    assert counts.unaccounted() == 0
    assert counts.dropped["bad_row"] > 0
    assert set(counts.dropped) <= {*DROP_REASONS, "has_words", "is_language"}
    assert set(counts.failed) <= set(FAILURE_REASONS)


def test_about_a_tenth_of_the_pairs_is_dropped_or_fails(world):
    pairs_in = sum(counts.pairs_in for counts in world.expected.values())
    kept = sum(counts.kept for counts in world.expected.values())

    assert 0.85 < kept / pairs_in < 0.95


def test_every_kind_of_response_occurs(world):
    expected = {entry.response for entry in world.web.values()}

    assert expected == set(RESPONSE_REASONS) - {"absent"}
    assert world.expected["localized_narratives"].failed["not_in_archive"] > 0


@pytest.mark.parametrize("name", SOURCES)
def test_rows_are_dropped_by_the_expected_reasons(world, rows, name):
    split = json.loads((world.folder / "raw" / "coco" / "dataset_coco.json").read_bytes())
    heldout = {one["cocoid"] for one in split["images"] if one["split"] in {"val", "test"}}
    [recipe] = load_recipe(name)
    chooser = Chooser(recipe.captions)
    valid_rows = rows(name)
    good = [row for row in valid_rows if not isinstance(row, BadRow)]
    leaked = {row.id for row in good if row.meta.get("coco_id") in heldout}
    placed = {row.id: row for row in good if row.url or row.file or row.refused}
    reasons = Counter("bad_row" for row in valid_rows if isinstance(row, BadRow))

    pairs = [(row.id, pair) for row in good for pair in chooser.pairs(row)]
    bare = {row.id for row in good} - {image for image, _ in pairs}
    for image, pair in pairs:
        unplaced = None if image in placed else "no_image"
        reason = "heldout" if image in leaked else pair.reason or unplaced
        if not reason and pair.box:
            image_row = placed[image]
            inside = pair.box[0] < image_row.width and pair.box[1] < image_row.height
            reason = None if inside else "bad_box"
        reasons[reason] += 1
    reasons.update("heldout" if image in leaked else "no_caption" for image in bare)

    expected = world.expected[name]
    assert reasons.total() == expected.pairs_in
    assert {word: count for word, count in reasons.items() if word} == expected.dropped


@pytest.mark.parametrize("name", SOURCES)
def test_captions_describe_their_scene(captions_of, name):
    valid_rows = captions_of(name)

    stated = 0
    for scene, candidate in valid_rows:
        if candidate.box:
            continue
        groups = groups_of_caption(candidate.text)
        stated += bool(groups)
        for count, size, colour, shape, plural, position in groups:
            assert bool(plural) == (count > 1), candidate.text
            fits = [
                group
                for group in scene.groups
                if (group.count, group.colour, group.shape) == (count, colour, shape)
                and size in {"", group.size}
                and position in {"", POSITION_PHRASES[group.position]}
            ]
            assert fits, (candidate.text, scene.groups)
        for pattern, colour in BACKGROUND.findall(candidate.text):
            assert (pattern, colour) == (scene.background.pattern, scene.background.colour), (
                candidate.text
            )
    assert stated > 0.5 * sum(candidate.box is None for _, candidate in valid_rows)


def test_a_region_contains_exactly_the_shape_of_its_phrase(captions_of):
    exact = 0
    for scene, candidate in captions_of("visual_genome"):
        text = one_line(candidate.text)
        here = [shape for shape in scene.shapes if text in region_phrases(shape.group)]
        exact += any(candidate.box == shape.box for shape in here)
        assert here or not text

    assert exact > 0.95 * len(captions_of("visual_genome"))


def test_shapes_lie_inside_the_image_at_the_stated_position():
    for number in range(300):
        scene = make_scene(f"test/{number}")
        width, height = scene.frame

        for group, (x0, y0, x1, y1) in scene.shapes:
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            across, down = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height
            assert {
                "left": across < 1 / 3,
                "right": across > 2 / 3,
                "top": down < 1 / 3,
                "bottom": down > 2 / 3,
                "middle": 1 / 3 < across < 2 / 3 or 1 / 3 < down < 2 / 3,
            }[group.position]


def test_shapes_are_drawn_in_their_colour_on_their_background():
    for number in range(100):
        scene = make_scene(f"test/{number}")
        image = draw_scene(scene)

        for group, (x0, y0, x1, y1) in scene.shapes:
            assert image.getpixel(((x0 + x1) // 2, (y0 + y1) // 2)) == COLOURS[group.colour]
        colours = {colour: count for count, colour in image.getcolors(image.width * image.height)}
        assert colours[BACKGROUNDS[scene.background.colour]] > image.width * image.height / 5


@pytest.mark.parametrize("name", SOURCES)
def test_captions_are_about_as_long_as_in_the_paper(captions_of, name):
    texts = [
        one_line(candidate.text) for _, candidate in captions_of(name) if not candidate.refused
    ]
    english = [len(text.split()) for text in texts if groups_of_caption(text) or "the " in text]

    assert statistics.mean(english) == pytest.approx(sources.load(name).info.paper.words, rel=0.3)


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "visual_genome"])
def test_english_captions_are_identified_as_english_and_no_others_are(captions_of, name):
    for _, candidate in captions_of(name):
        text = one_line(candidate.text)
        if len(text.split()) > 2:
            language, score = identify(text)
            assert (language == "en") == bool(groups_of_caption(text) or "background" in text), text
            assert score > 0.25, text


@pytest.mark.parametrize("language", LANGUAGES)
def test_other_languages_are_identified_with_certainty(language):
    for number in range(200):
        text = foreign(make_scene(f"test/{number}"), language)

        valid_rows, score = identify(text)
        assert valid_rows == language, text
        assert score > 0.8, text
        assert len(text.split()) > 2


def test_sources_have_different_scenes(captions_of):
    seen = {name: {scene for scene, _ in captions_of(name)} for name in SOURCES}
    shares_coco = {"localized_narratives", "visual_genome"}

    for name in SOURCES:
        for other in SOURCES:
            if name != other and {name, other} & shares_coco == set():
                assert not seen[name] & seen[other]


@pytest.mark.parametrize(
    "kind", [kind for kind, reason in RESPONSE_REASONS.items() if reason is None]
)
def test_a_valid_image_decodes_to_its_scene(kind):
    scene = make_scene("test/good")

    body, content_type = sample_body(kind, scene)
    with Image.open(io.BytesIO(body)) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=float)

    assert content_type.startswith("image/")
    assert np.abs(pixels - np.asarray(draw_scene(scene), dtype=float)).mean() < 4


@pytest.mark.parametrize("kind", ["page", "drawing", "empty"])
def test_content_that_is_not_an_image_does_not_open(kind):
    body, _ = sample_body(kind, make_scene("test/bad"))

    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(body))


def test_a_truncated_image_opens_and_then_ends_early():
    body, _ = sample_body("cut", make_scene("test/bad"))

    with Image.open(io.BytesIO(body)) as image, pytest.raises(OSError, match="truncated"):
        image.load()


def test_a_decompression_bomb_is_small_and_states_too_many_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    body, _ = sample_body("bomb", make_scene("test/bad"))

    with Image.open(io.BytesIO(body)) as image:
        assert image.width * image.height > 128_000_000
        assert len(body) < 200_000


def test_a_cropped_image_has_another_aspect_ratio():
    scene = make_scene("test/bad")

    with Image.open(io.BytesIO(sample_body("cropped", scene)[0])) as image:
        assert image.width / image.height > 1.5 * scene.frame[0] / scene.frame[1]


@pytest.mark.parametrize("kind", STATUSES)
def test_an_address_without_an_image_fails_on_every_request(world, origin, kind):
    address = addresses(world, kind)[0]

    statuses = [request(origin, address)[0] for _ in range(3)]

    assert statuses == [STATUSES[kind]] * 3


@pytest.mark.parametrize("kind", FIRST_STATUSES)
def test_a_busy_host_answers_the_second_request(world, origin, kind):
    address = addresses(world, kind)[0]

    first, second = request(origin, address), request(origin, address)

    assert first[0] == FIRST_STATUSES[kind]
    assert first[2]["Retry-After"] in {"0", "1"}
    assert second[0] == 200
    assert second[1] == sample_body("jpeg", world.web[address].scene)[0]


def test_connections_are_reset_once_or_always(world, origin):
    reset, hiccup = addresses(world, "reset")[0], addresses(world, "reset_once")[0]
    for address in (reset, reset, hiccup):
        with pytest.raises(ConnectionResetError) as caught:
            request(origin, address)
        assert caught.type is ConnectionResetError  # not only closed

    assert request(origin, hiccup)[0] == 200


@pytest.mark.parametrize(
    ("kind", "target"), [("removed", REMOVED), ("unavailable", UNAVAILABLE), ("moved", None)]
)
def test_redirects_lead_to_an_image(world, origin, kind, target):
    address = addresses(world, kind)[0]

    status, _, headers = request(origin, address)
    leads_to = headers["Location"].removeprefix("https://")
    body = request(origin, leads_to)[1]

    assert status == 302
    assert target is None or leads_to == target
    assert (body == sample_body("jpeg", world.web[address].scene)[0]) == (target is None)


def test_a_redirect_loop_leads_to_itself(world, origin):
    address = addresses(world, "loop")[0]

    assert request(origin, address)[2]["Location"] == f"https://{address}"


def test_images_of_one_host_use_one_connection(world, origin):
    address, other = addresses(world, "jpeg")[:2]
    with closing(connect(origin)) as connection:
        connection.connect()
        socket = connection.sock
        bodies = [request(origin, one, connection)[1] for one in (address, other, address)]
        assert connection.sock is socket

    assert bodies[0] == bodies[2] == sample_body("jpeg", world.web[address].scene)[0]
    assert bodies[1] == sample_body("jpeg", world.web[other].scene)[0]


def test_an_address_outside_the_world_is_a_404(origin):
    assert request(origin, "images.cocodataset.org/train2014/nothing.jpg")[0] == 404
    assert request(origin, "elsewhere.example/")[0] == 404


def test_closing_does_not_wait_for_open_connections(world):
    with serve(world) as address:
        connection = connect(address)
        request(address, addresses(world, "jpeg")[0], connection)

    connection.close()
    with pytest.raises(ConnectionError):
        request(address, addresses(world, "jpeg")[0])


@pytest.mark.parametrize("name", SOURCES)
def test_every_row_has_an_address_of_the_world(world, rows, name):
    for row in rows(name):
        if not isinstance(row, BadRow) and not row.refused and row.url:
            assert address_of(row.url) in world.web
