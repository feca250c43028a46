"""A user's own image tokenizer, in a module beside the data, used by the real commands."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.cli.app import err_console
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.dataset.build import BuildRequest, build_all
from pmd_pipeline.demo.world import serve, write_world

ROOT = Path(__file__).parents[2]
MODULE = '''
"""Codes of 16 x 16 pixels: the mean colour, with two bits for each of red, green and blue."""

import numpy as np

from pmd_pipeline.codes.tokenizers import Tokenizer

PATCH = 16


def mean_colours(images):
    grid = images.shape[1] // PATCH
    patches = images.reshape(len(images), grid, PATCH, grid, PATCH, 3)
    red, green, blue = np.moveaxis(patches.mean((2, 4)).astype(np.uint16) >> 6, -1, 0)
    return red << 4 | green << 2 | blue


def open_tokenizer(weights, *, dtype, device):
    return Tokenizer(patch_size=PATCH, vocabulary=64, codes=mean_colours)
'''
MANIFEST = "manifests/coco.json"
GRID = 4
TRAINER = {
    "data.pairs": MANIFEST,
    "data.tokenizer": "vocab.txt",
    "model.image_size": 64,
    "model.patch_size": 16,
    "model.image_vocab": 64,
    "batch": 8,
    "out": "run",
}
"""Settings over `flava_tiny.toml`, which has neither images nor texts alone."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """COCO of a small sample world, and the user's module."""
    folder = tmp_path_factory.mktemp("own-tokenizer")
    world = write_world(folder / "world", scenes=20, only=("coco",))
    with serve(world) as origin:
        request = BuildRequest(
            recipes=("coco",),
            out=str(folder / "data"),
            manifests=str(folder / "manifests"),
            raw=str(folder / "world" / "raw"),
            changes={"fetch": {"connect_to": {"*": origin}}, "part_records": 20},
            runner="local",
            workers=1,
        )
        build_all(request, Reporter(err_console, quiet=True))
    (folder / "my_tokenizer.py").write_text(MODULE)
    return folder


def run(folder, module, *arguments):
    """A command of ours in `folder`: exit code and what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    ended = subprocess.run(
        command, cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    return ended.returncode, ended.stdout, ended.stderr


def pmd(folder, *arguments):
    return run(folder, "pmd_pipeline.cli", *arguments)


def make_codes(folder, *options):
    own = ("--tokenizer", "my_tokenizer:open_tokenizer", "--grid", GRID, "--views", 2)
    return pmd(folder, "codes", MANIFEST, *own, "--runner", "local", *options)


def test_a_tokenizer_of_16_pixels_makes_codes_that_verify_and_train(built):
    code, out, err = make_codes(built, "--workers", 1)

    manifest = load_manifest(str(built / MANIFEST))
    assert (code, out) == (0, f"{MANIFEST}  {manifest.digest}\n"), err
    rules = manifest.codes
    assert rules.tokenizer == "my_tokenizer:open_tokenizer"
    assert rules.source_sha256 == hashlib.sha256(MODULE.encode()).hexdigest()
    assert (rules.size, rules.grid, rules.vocabulary) == (16 * GRID, GRID, 64)
    for command in (
        ["verify", MANIFEST],
        ["lock", MANIFEST, "--out", "locked"],
        ["codes", "export", MANIFEST, "--out", "exported", "--runner", "local"],
        ["bundle", MANIFEST, "--out", "bundle"],
        ["tokenizer", MANIFEST, "--out", "vocab.txt", "--size", 200],
    ):
        code, out, err = pmd(built, *command)
        assert code == 0, out + err
    assert "--tokenizer my_tokenizer:open_tokenizer" in (built / "bundle/README.md").read_text()
    settings = [word for key, value in TRAINER.items() for word in ("--set", f"{key}={value}")]
    config = ROOT / "recipes" / "flava_tiny.toml"
    explain = ("--config", config, *settings, "--explain-step", 1)
    code, out, err = run(built, "flava_train.cli", *explain)
    assert code == 0, err
    assert out
    code, _, err = run(built, "flava_train.cli", *explain, "--set", "model.patch_size=8")
    assert code == 2
    assert "4 x 4 codes per image, but the model 8 x 8 patches" in err


def test_worker_processes_import_the_module_too(built):
    make_codes(built, "--workers", 1)
    digest = load_manifest(str(built / MANIFEST)).digest
    for path in built.rglob("*.codes.json"):
        path.unlink()

    code, out, err = make_codes(built, "--workers", 2)

    assert code == 0, err
    assert out.split()[1] == digest


def test_a_changed_module_makes_codes_again(built):
    make_codes(built, "--workers", 1)
    before = load_manifest(str(built / MANIFEST))

    (built / "my_tokenizer.py").write_text(MODULE + "# a change\n")
    make_codes(built, "--workers", 1)
    (built / "my_tokenizer.py").write_text(MODULE)

    after = load_manifest(str(built / MANIFEST))
    assert after.codes.source_sha256 != before.codes.source_sha256
    assert after.digest != before.digest


MISTAKES = {
    "vocabulary=64": ("vocabulary=8", "it returned the code"),
    "return red << 4 | green << 2 | blue": ("return red.astype(int)", "must return uint16"),
    "return Tokenizer(patch": ("return dict(patch", "must return a pmd_pipeline.codes.tokenizers"),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_in_the_module_is_one_sentence(built, line):
    changed, words = MISTAKES[line]
    (built / "my_tokenizer.py").write_text(MODULE.replace(line, changed))

    code, _, err = make_codes(built, "--workers", 1, "--seed", 1)
    (built / "my_tokenizer.py").write_text(MODULE)

    assert code == 2
    assert err.startswith("pmd: --tokenizer my_tokenizer:open_tokenizer: ")
    assert words in " ".join(err.split())
