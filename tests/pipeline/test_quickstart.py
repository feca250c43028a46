"""The quickstart end to end, as a user runs it: few scenes and steps, so it learns nothing yet."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image
from toy import toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.demo.quickstart import _refuse_overlap
from pmd_pipeline.demo.training_summary import LOSSES

STEPS = 16

pytestmark = pytest.mark.timeout(900)  # the fixture builds, trains, and trains again


def command(out, *options):
    words = ["quickstart", "--out", out, "--scenes", 80, "--runner", "local", *options]
    return [sys.executable, "-m", "pmd_pipeline.cli", *map(str, words)]


def run(out, *options):
    return subprocess.run(command(out, *options), capture_output=True, text=True, check=False)


def steps_in(out):
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if "step" in line]


def files(folder):
    return {
        path.relative_to(folder): path.stat().st_mtime_ns
        for kind in ("*.tar", "*.parquet", "*.safetensors")
        for path in folder.rglob(kind)
        if "world" not in path.parts
    }


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("quick") / "start"


@pytest.fixture(scope="module")
def done(out):
    """A run that Ctrl-C interrupts while it trains, and the run that goes on from there."""
    process = subprocess.Popen(
        command(out, "--steps", STEPS),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a terminal sends Ctrl-C to all of a group
    )
    with process:
        while not (out / "run" / "metrics.jsonl").exists() or len(steps_in(out)) < 3:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        talk = process.communicate()[0]
    return SimpleNamespace(
        code=process.returncode,
        talk=talk,
        steps=steps_in(out),
        resumed=run(out, "--steps", STEPS),
    )


@pytest.mark.slow
def test_ctrl_c_during_training_saves_and_the_same_command_resumes(out, done):
    assert done.code == 130, done.talk
    assert "run the same command to resume" in done.talk
    assert 3 <= len(done.steps) < STEPS
    assert steps_in(out) == list(range(STEPS))


@pytest.mark.slow
def test_a_model_that_learned_too_little_is_exit_code_1(done):
    assert done.resumed.returncode == 1, done.resumed.stderr
    assert "not learned: R@1 text to image is" in done.resumed.stderr
    for words in LOSSES.values():
        assert words in done.resumed.stdout


@pytest.mark.slow
def test_a_poster_is_drawn_and_its_path_is_printed(out, done):
    assert f"picture   {out / 'learned.png'}" in done.resumed.stdout
    with Image.open(out / "learned.png") as image:
        assert image.width > 1000


@pytest.mark.slow
def test_held_out_images_are_of_another_world(out, done):
    assert done.resumed.stderr.count("another world") == 1
    held_out = load_manifest(str(out / "held_out" / "manifests" / "coco.json"))

    assert held_out.sources["coco"].images > 150
    assert held_out.digest != load_manifest(str(out / "manifests" / "coco.json")).digest


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do(out, done):
    before = files(out)

    again = run(out, "--steps", STEPS)

    assert again.stdout == done.resumed.stdout
    assert files(out) == before


@pytest.mark.slow
def test_without_the_libraries_for_training_it_ends_after_the_build_with_advice(
    out, done, tmp_path
):
    shutil.copytree(out / "data", tmp_path / "data")  # so that all is built already
    hidden = "sys.modules |= dict.fromkeys(['torch', 'tokenizers', 'matplotlib'])"
    code = f"import sys; {hidden}; from pmd_pipeline.cli import main; main()"
    words = [*command(tmp_path)[3:], "--quiet"]

    ended = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == (
        "no training, since these packages are not installed: torch, tokenizers; "
        'pip install "pmd-flava[train]"\n'
    )
    assert not (tmp_path / "run").exists()


def test_too_few_scenes_to_train_on_are_refused_at_once(tmp_path):
    ended = subprocess.run(
        command(tmp_path, "--scenes", 40), capture_output=True, text=True, check=False
    )

    assert ended.returncode == 2
    assert ended.stderr == (
        "pmd: 40 scenes are too few for training: give --scenes 80 or --no-train\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_held_out_image_that_is_trained_on_is_an_error(tmp_path):
    write_rows(tmp_path / "raw", toy_rows(3))
    pictures = write_pictures(tmp_path / "pictures", [f"{n}.jpg" for n in range(3)])
    order = toy_source_build(tmp_path, toy_recipe(), pictures=pictures)
    toy_build(order)

    with pytest.raises(PmdError, match=r"3 images of .* are among those of"):
        _refuse_overlap(SimpleNamespace(held_out=order.manifest, manifest=lambda _: order.manifest))
