"""Codes of shards: of the right boxes, by the right tokenizer, the same on any runner."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from handmade_shards import HandmadeRecord, jpeg, png, tiles, webp, write_manifest, write_shard
from hypothesis import given
from hypothesis import strategies as st
from toy import QUIET, toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

from pmd_pipeline.base.parallel import WorkerDied
from pmd_pipeline.codes import tokenize as coding
from pmd_pipeline.codes.crops import crop_boxes
from pmd_pipeline.codes.reports import codes_dependency
from pmd_pipeline.codes.tensors import code_tensors
from pmd_pipeline.codes.tokenize import CodesRequest, code_manifest
from pmd_pipeline.codes.weights import tensor_bytes
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.image_format import WEBP
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.contract.models import CodesReport
from pmd_pipeline.dataset.manifest import merge_manifests
from pmd_pipeline.shards import shard_reader as stored

COLOURS = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [240, 240, 240]], dtype=np.uint8)
NAMES = np.array([[0, 1], [2, 3]])
"""Codes of a picture of four colours, the first in the top left."""


def key(number):
    return f"{number:016x}"


def painted(names, side=8):
    return tiles(COLOURS[np.asarray(names)], side)


@pytest.fixture
def weights(tmp_path):
    """A k-means whose centroids are the four colours of `COLOURS`."""
    centroids = np.broadcast_to(COLOURS[:, None, None], (4, 8, 8, 3))
    path = tmp_path / "colours.safetensors"
    path.write_bytes(tensor_bytes({"centroids": np.ascontiguousarray(centroids)}, {}))
    return str(path)


@pytest.fixture
def request_for(tmp_path, weights):
    """A request for codes of shards written by hand."""

    def make_request(*shards, kind="pairs", **more):
        manifest = write_manifest(tmp_path / "manifests" / "hand.json", shards, kind)
        options = {"weights": weights, "grid": 2, "runner": "local", "workers": 1} | more
        return CodesRequest(manifest=manifest, **options)

    return make_request


def make_codes(request):
    return code_manifest(request, QUIET)


def tensors(shard):
    content = Path(shard.path).with_suffix(".codes.safetensors").read_bytes()
    found = code_tensors(content)
    assert isinstance(found, dict), found
    return found


def random_shard(folder, part=0, count=6, source="toy", side=24):
    """A shard of pictures in random tiles, every other one with two boxes, one failed."""
    random = np.random.default_rng(part)
    records = [HandmadeRecord(key(100 * part), None)]
    for number in range(1, count):
        boxes = ((0, 0, 0.5, 1), (0.25, 0.5, 0.75, 1)) if number % 2 else None
        names = random.integers(0, 4, (3, 4))
        captions = ("one", "two") if boxes else ("one",)
        records.append(
            HandmadeRecord(key(100 * part + number), painted(names, side // 3), captions, boxes)
        )
    return write_shard(folder / source, source, part, records)


def test_codes_are_those_of_the_patches(tmp_path, request_for):
    shard = write_shard(tmp_path, "toy", 0, [HandmadeRecord(key(1), painted(NAMES))])

    make_codes(request_for(shard))

    assert tensors(shard)["codes"].tolist() == [NAMES.tolist()]
    assert tensors(shard)["boxes"].tolist() == [[0, 0, 1, 1]]
    assert tensors(shard)["first"].tolist() == [0, 1]


def test_codes_of_webp_images_are_those_of_their_pixels(tmp_path, request_for):
    shard = write_shard(tmp_path, "toy", 0, [HandmadeRecord(key(1), painted(NAMES))], WEBP)

    make_codes(request_for(shard))

    assert tensors(shard)["codes"].tolist() == [NAMES.tolist()]


def test_an_image_with_boxes_has_a_crop_per_caption_and_no_random_ones(tmp_path, request_for):
    left, low = (0, 0, 0.5, 1), (0, 0.5, 1, 1)
    shard = write_shard(
        tmp_path,
        "toy",
        0,
        [
            HandmadeRecord(key(1), painted(NAMES), ("left", "low"), (left, low)),
            HandmadeRecord(key(2), None),
            HandmadeRecord(key(3), painted(NAMES.T)),
        ],
    )

    make_codes(request_for(shard, views=3))

    found = tensors(shard)
    assert found["first"].tolist() == [0, 3, 6]
    assert found["boxes"][:3].tolist() == [[0, 0, 1, 1], [*left], [*low]]
    assert found["codes"][1].tolist() == [[0, 0], [2, 2]]
    assert found["codes"][2].tolist() == [[2, 3], [2, 3]]
    assert found["codes"][3].tolist() == NAMES.T.tolist()
    assert len({tuple(box) for box in found["boxes"][3:].tolist()}) == 3


def test_images_without_captions_get_codes_too(tmp_path, request_for):
    shard = write_shard(tmp_path, "toy", 0, [HandmadeRecord(key(1), painted(NAMES), captions=())])

    found = make_codes(request_for(shard, kind="images", views=2)).manifest

    assert found.shards[0].views == 2


def test_a_shard_without_images_has_an_empty_file(tmp_path, request_for):
    shard = write_shard(tmp_path, "toy", 0, [HandmadeRecord(key(1), None)])

    found = make_codes(request_for(shard)).manifest

    assert found.codes is not None
    assert tensors(shard)["first"].tolist() == [0]
    assert tensors(shard)["codes"].shape == (0, 2, 2)


@given(
    number=st.integers(0, 2**64 - 1),
    seed=st.integers(0, 2**64 - 1),
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
)
def test_random_crops_are_within_their_limits_of_area_and_aspect_ratio(number, seed, size):
    boxes = crop_boxes(key(number), size, (), 5, seed).astype(float)

    assert boxes[0].tolist() == [0, 0, 1, 1]
    assert (boxes >= 0).all()
    assert (boxes <= 1).all()
    sides = boxes[1:, 2:] - boxes[1:, :2]
    ratio = sides[:, 0] * size[0] / (sides[:, 1] * size[1])
    area = sides.prod(1)
    long = size[0] / size[1]
    least = min(0.9, 4 / 3 / long, 4 / 3 * long)
    assert (area >= least - 1e-4).all()
    assert (ratio >= 3 / 4 - 1e-3).all()
    assert (ratio <= 4 / 3 + 1e-3).all()


def test_random_crops_depend_on_seed_and_key_alone():
    same = crop_boxes(key(7), (40, 30), (), 4, 1)

    assert np.array_equal(same, crop_boxes(key(7), (40, 30), (), 4, 1))
    assert np.array_equal(same[:3], crop_boxes(key(7), (40, 30), (), 3, 1))
    assert not np.array_equal(same, crop_boxes(key(8), (40, 30), (), 4, 1))
    assert not np.array_equal(same, crop_boxes(key(7), (40, 30), (), 4, 2))


def test_random_crops_are_those_of_all_earlier_datasets():
    """A change would move every random crop of every dataset."""
    drawn = crop_boxes(key(7), (40, 30), (), 2, 1)[1]

    assert drawn.tolist() == pytest.approx(
        [0.0001380917, 0.0000349480, 0.9924114347, 0.9999098182], abs=1e-6
    )


def test_random_crops_cover_the_allowed_range():
    boxes = np.stack([crop_boxes(key(n), (400, 400), (), 2, 0)[1] for n in range(500)])

    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert area.min() < 0.905
    assert area.max() > 0.995
    assert area.mean() == pytest.approx(0.95, abs=0.01)
    assert np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1] == pytest.approx(0, abs=0.5)


def world(folder):
    return [
        random_shard(folder, part, source=source) for source in ("one", "two") for part in range(3)
    ]


def files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.codes.safetensors"))
    }


def test_a_second_run_does_nothing_and_gives_the_same_manifest(tmp_path, request_for, monkeypatch):
    request = request_for(*world(tmp_path), views=2)
    first = make_codes(request).manifest

    monkeypatch.setattr(coding, "code_shard", None)  # would fail if it were called

    assert make_codes(request).manifest == first
    assert load_manifest(request.manifest) == first


@pytest.mark.parametrize("harm", ["lost", "cut", "no report", "old report"])
def test_only_damaged_codes_are_made_again(tmp_path, request_for, harm):
    request = request_for(*world(tmp_path), views=2)
    first = make_codes(request).manifest
    content = files(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.codes.*")}
    victim = tmp_path / "one" / "00001.codes.safetensors"
    report = victim.with_name("00001.codes.json")
    if harm == "lost":
        victim.unlink()
    elif harm == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif harm == "no report":
        report.unlink()
    else:
        report.write_text('{"format": 0}')

    assert make_codes(request).manifest == first

    assert files(tmp_path) == content
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.codes.*")}
    assert {path for path in after if after[path] != before[path]} == {victim, report}


@pytest.mark.parametrize("change", [{"views": 3}, {"seed": 1}, {"grid": 3}])
def test_other_rules_make_other_codes_of_another_digest(tmp_path, request_for, change):
    shards = world(tmp_path)
    first = make_codes(request_for(*shards, views=2)).manifest
    other = make_codes(request_for(*shards, **{"views": 2, **change})).manifest

    assert other.digest != first.digest
    assert other.codes != first.codes
    assert make_codes(request_for(*shards, views=2)).manifest == first


def test_the_report_describes_the_file(tmp_path, request_for):
    shard = random_shard(tmp_path, count=7)
    manifest = make_codes(request_for(shard, views=2)).manifest

    text = Path(shard.path).with_suffix(".codes.json").read_text()
    report = CodesReport.model_validate_json(text)

    content = Path(shard.path).with_suffix(".codes.safetensors").read_bytes()
    assert report.file.sha256 == hashlib.sha256(content).hexdigest()
    assert report.file.sha256 == manifest.shards[0].codes_sha256
    assert report.rules == manifest.codes
    assert (report.images, report.views) == (6, 3 * 3 + 3 * 2)
    assert manifest.shards[0].views == report.views
    assert manifest.digest == manifest.computed_digest()


def assert_refused(request, *words):
    with pytest.raises(PmdError) as caught:
        make_codes(request)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(Path(request.manifest).parent.parent.rglob("*.codes.*"))


def test_a_shard_with_a_flipped_byte_is_refused_by_its_name(tmp_path, request_for):
    shard = random_shard(tmp_path)
    content = bytearray(Path(shard.path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(shard.path).write_bytes(content)

    assert_refused(request_for(shard), shard.path, "its sha256 differs")


def test_a_ledger_with_a_flipped_byte_is_refused_by_its_name(tmp_path, request_for):
    shard = random_shard(tmp_path)
    ledger = Path(shard.path).with_suffix(".parquet")
    content = bytearray(ledger.read_bytes())
    content[len(content) // 2] ^= 1
    ledger.write_bytes(content)

    assert_refused(request_for(shard), str(ledger), "its sha256 differs")


HOSTILE = {
    "no image": ({"image": b"<html>"}, "cannot be decoded"),
    "a PNG": ({"image": png(painted(NAMES)), "row": {"width": 16, "height": 16}}, "cannot be dec"),
    "a WebP cut short": (
        {"image": webp(painted(NAMES))[:-20], "row": {"width": 16, "height": 16}},
        "cannot be decoded",
    ),
    "an image cut short": ({"image": None, "cut": 40}, "cannot be decoded"),
    "another size": ({"row": {"width": 15}}, "has 16 x 16 pixels"),
    "a bomb": ({"row": {"width": 1 << 30, "height": 1 << 30}}, "pixels by the ledger"),
    "an offset outside": ({"row": {"image_offset": 1 << 40}}, "lies outside the tar"),
    "a size outside": ({"row": {"json_size": 1 << 30}}, "lies outside the tar"),
    "no offset": ({"row": {"image_offset": None}}, "does not locate its image"),
    "a negative offset": ({"row": {"json_offset": -1}}, "does not locate its image"),
    "a key that is a path": ({"row": {"key": "../../../evil"}}, "does not locate"),
    "a box outside": ({"boxes": [[0, 0, 1, 1.5]]}, "a box that is not inside the image"),
    "a box turned": ({"boxes": [[0.5, 0, 0.25, 1]]}, "a box that is not inside the image"),
    "a box of three": ({"boxes": [[0, 0, 1]]}, "a box that is not inside the image"),
    "a box without area": ({"boxes": [[0.5, 0, 0.5 + 1e-12, 1]]}, "a box that is not inside"),
    "a box too many": ({"boxes": [[0, 0, 1, 1], [0, 0, 1, 1]]}, "2 boxes for 1 captions"),
    "boxes that are words": ({"json_changes": {"boxes": ["abcd"]}}, "a box that is not inside"),
    "boxes that are none": ({"json_changes": {"boxes": 7}}, "boxes that are no list"),
}


def test_an_oversized_member_is_not_read(tmp_path, request_for, monkeypatch):
    monkeypatch.setattr(stored, "_MAX_BYTES", 100)

    assert_refused(request_for(random_shard(tmp_path)), "lies outside the tar")


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_shard_is_one_sentence(tmp_path, request_for, kind):
    given_record, words = HOSTILE[kind]
    changes = dict(given_record)
    if cut := changes.pop("cut", None):
        changes["image"] = jpeg(painted(NAMES))[:-cut]
        changes["row"] = {"width": 16, "height": 16}
    record = HandmadeRecord(key(1), **{"image": painted(NAMES), **changes})
    shard = write_shard(tmp_path / "toy", "toy", 0, [record])

    assert_refused(request_for(shard), words)


def test_a_ledger_with_another_number_of_images_is_refused(tmp_path, request_for):
    shard = random_shard(tmp_path).model_copy(update={"images": 2})

    assert_refused(request_for(shard), "has 5 images, the manifest 2")


def test_texts_and_empty_manifests_get_no_codes(tmp_path, request_for):
    assert_refused(request_for(random_shard(tmp_path), kind="text"), "holds no images")
    assert_refused(request_for(), "holds no images")


def test_shards_on_the_web_are_refused_at_once(tmp_path, request_for):
    shard = random_shard(tmp_path).model_copy(update={"path": "https://a.test/00000.tar"})

    assert_refused(request_for(shard), "nothing can be written to https://a.test/00000.tar")


def test_kmeans_has_no_dtype(tmp_path, request_for):
    assert_refused(request_for(random_shard(tmp_path), dtype="bfloat16"), "leave --dtype out")
    assert_refused(request_for(random_shard(tmp_path), tokenizer="dalle"), "not dalle")


def fitting(request):
    return CodesRequest(
        request.manifest, vocabulary=4, grid=2, runner="local", workers=request.workers
    )


def test_without_weights_kmeans_is_fitted_once_and_kept_beside_the_manifest(
    tmp_path, request_for, monkeypatch
):
    request = fitting(request_for(*world(tmp_path)))
    first = make_codes(request)

    kept = tmp_path / "manifests" / "hand.kmeans.safetensors"
    assert first.weights == str(kept)
    assert first.rules.sha256 == hashlib.sha256(kept.read_bytes()).hexdigest()
    monkeypatch.setattr(coding, "fit", None)  # would fail if it were called
    assert make_codes(request).manifest == first.manifest
    monkeypatch.undo()
    kept.unlink()
    assert make_codes(request).manifest == first.manifest


def test_kmeans_is_fitted_again_for_other_shards(tmp_path, request_for):
    shards = world(tmp_path)
    first = make_codes(fitting(request_for(*shards[:3])))

    second = make_codes(fitting(request_for(*shards)))

    assert second.rules.sha256 != first.rules.sha256


def test_kmeans_is_fitted_to_the_images_of_the_lowest_keys_of_all_sources(tmp_path, monkeypatch):
    shards = [(shard.path, shard) for shard in world(tmp_path)]
    monkeypatch.setattr(coding, "_FIT_IMAGES", 7)
    read = []
    monkeypatch.setattr(coding, "read_samples", noted(coding.read_samples, read))

    seen = list(coding._first_images(shards, 16))

    # keys of part 0 are 1 to 5 in both sources, so each gives three or four
    assert len(seen) == 7
    assert all(pixels.shape == (1, 16, 16, 3) for pixels in seen)
    assert {Path(path).name for path in read} == {"00000.tar"}


def noted(function, notes):
    def noting(first, *rest):
        notes.append(first)
        return function(first, *rest)

    return noting


@pytest.fixture
def toy(tmp_path):
    """Twelve pictures in three parts, built."""
    write_rows(tmp_path / "raw", toy_rows(12))
    pictures = write_pictures(tmp_path / "pictures", [f"{n}.jpg" for n in range(12)])
    return toy_source_build(tmp_path, toy_recipe(part_records=4), pictures=pictures)


def test_a_second_build_keeps_the_codes(toy, weights):
    bare = toy_build(toy)
    request = CodesRequest(toy.manifest, weights, grid=2, views=2, runner="local", workers=1)
    made = make_codes(request).manifest

    assert made.digest != bare.digest
    assert toy_build(toy) == made


def test_a_build_keeps_no_codes_if_one_shard_has_none_or_others(toy, weights):
    bare = toy_build(toy)
    request = CodesRequest(toy.manifest, weights, grid=2, runner="local", workers=1)
    make_codes(request)
    first = Path(toy.shards) / "00000.codes.json"
    kept = first.read_text()

    first.unlink()
    assert toy_build(toy) == bare

    report = CodesReport.model_validate_json(kept)
    rules = report.rules.model_copy(update={"seed": 9})
    other = report.model_copy(
        update={"rules": rules, "dependency": codes_dependency(bare.shards[0], rules)}
    )
    first.write_text(other.model_dump_json())
    assert toy_build(toy) == bare

    first.write_text(kept)
    assert toy_build(toy).codes is not None


def test_a_rebuilt_part_has_no_codes_of_its_old_shard(toy, weights):
    toy_build(toy)
    make_codes(CodesRequest(toy.manifest, weights, grid=2, runner="local", workers=1))
    smaller = toy_recipe(part_records=4, images={"size": 20})
    changed = toy_source_build(Path(toy.data).parent, smaller, pictures=Path(toy.images[0]))

    assert toy_build(changed).codes is None


def test_a_merged_manifest_has_codes_if_all_have_the_same_rules(tmp_path, request_for):
    shards = world(tmp_path)
    both = []
    for name in ("one", "two"):
        request = request_for(*[shard for shard in shards if shard.source == name], views=2)
        both.append((request.manifest, make_codes(request).manifest))
    bare = load_manifest(request_for(*shards[3:]).manifest)

    whole = merge_manifests("both", str(tmp_path / "both.json"), both)
    partly = merge_manifests("both", str(tmp_path / "both.json"), [both[0], (both[1][0], bare)])

    assert whole.codes == both[0][1].codes
    assert all(shard.codes_sha256 and shard.views for shard in whole.shards)
    assert partly.codes is None
    assert not any(shard.codes_sha256 or shard.views for shard in partly.shards)


def test_shards_at_an_address_get_codes_beside_them(tmp_path, request_for, weights):
    far = fsspec.filesystem("memory")
    shards = world(tmp_path)[:2]
    for shard in shards:
        for path in Path(shard.path).parent.glob(f"{shard.part:05d}.*"):
            far.pipe(f"/far/{path.name}", path.read_bytes())
    moved = [
        shard.model_copy(update={"path": f"memory://far/{Path(shard.path).name}"})
        for shard in shards
    ]

    there = make_codes(request_for(*moved, views=2)).manifest
    again = make_codes(request_for(*moved, views=2)).manifest
    here = make_codes(request_for(*shards, views=2)).manifest

    assert there.digest == again.digest == here.digest
    assert far.exists("/far/00001.codes.safetensors")


def test_a_shard_whose_workers_die_leaves_the_manifest_unchanged(
    tmp_path, request_for, monkeypatch
):
    request = request_for(*world(tmp_path))
    bare = load_manifest(request.manifest)

    class Deadly:
        def run(self, function, tasks, _watch):
            for number, task in enumerate(tasks):
                yield task, function(task, lambda _: None) if number else WorkerDied(f"by {task}")

    monkeypatch.setattr(coding, "open_pool", lambda *a, **k: nullcontext(Deadly()))
    found = make_codes(request)
    monkeypatch.undo()

    assert found.failures == ["by codes of part 00000 of one"]
    assert load_manifest(request.manifest) == found.manifest == bare
    assert make_codes(request).manifest.codes is not None


SPREAD = [
    pytest.param("local", 2, marks=pytest.mark.slow, id="processes"),
    pytest.param("ray", 2, marks=pytest.mark.slow, id="ray"),
]


@pytest.mark.parametrize(("runner", "workers"), SPREAD)
def test_codes_are_the_same_on_any_runner(tmp_path, request_for, runner, workers):
    shards = world(tmp_path)
    here = make_codes(request_for(*shards, views=3)).manifest
    content = files(tmp_path)
    for path in tmp_path.rglob("*.codes.*"):
        path.unlink()

    there = make_codes(request_for(*shards, views=3, runner=runner, workers=workers)).manifest

    assert there == here
    assert files(tmp_path) == content


def test_codes_do_not_depend_on_decoding_threads(tmp_path, request_for, monkeypatch):
    shard = random_shard(tmp_path, count=40)
    first = make_codes(request_for(shard, views=3)).manifest
    for path in tmp_path.rglob("*.codes.*"):
        path.unlink()
    code_one = coding.code_shard
    monkeypatch.setattr(
        coding, "code_shard", lambda task, tick: code_one(replace(task, threads=5), tick)
    )

    assert make_codes(request_for(shard, views=3)).manifest == first


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_same_command(tmp_path, request_for):
    shards = [random_shard(tmp_path, part, count=60) for part in range(12)]
    request = request_for(*shards, views=8)
    whole = make_codes(request).manifest
    content = files(tmp_path)
    for path in tmp_path.rglob("*.codes.*"):
        path.unlink()
    request = request_for(*shards, views=8)
    command = [
        *(sys.executable, "-c", "from pmd_pipeline.cli import main; main()", "codes"),
        *(request.manifest, "--weights", request.weights, "--grid", "2", "--views", "8"),
        *("--runner", "local", "--workers", "1", "-q"),
    ]
    kills = 0
    for done in (1, 4, 8):
        with subprocess.Popen(command) as run:
            while len(list(tmp_path.rglob("*.codes.json"))) < done and run.poll() is None:
                time.sleep(0.005)
            kills += run.poll() is None
            run.send_signal(signal.SIGKILL)
    assert kills
    assert load_manifest(request.manifest).codes is None

    subprocess.run(command, check=True, env=os.environ)

    assert load_manifest(request.manifest) == whole
    assert files(tmp_path) == content


def test_a_codes_file_names_its_tokenizer_and_its_tar(tmp_path, request_for):
    shard = random_shard(tmp_path)
    manifest = make_codes(request_for(shard)).manifest

    header = Path(shard.path).with_suffix(".codes.safetensors").read_bytes()[8:1200]

    assert manifest.codes.sha256.encode() in header
    assert shard.sha256.encode() in header
