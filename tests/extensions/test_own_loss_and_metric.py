"""A user's own loss with its head, and metrics, in a module beside the data: `flava-train`."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "train"))
import tiny_datasets  # noqa: E402  # a folder of tests is no package
from trials import small_config, write_datasets  # noqa: E402  # a folder of tests is no package

from flava_train.config import as_toml  # noqa: E402
from flava_train.run.checkpoint import load_progress  # noqa: E402
from pmd_pipeline.contract.tokens import SPECIAL_TOKENS  # noqa: E402

MODULE = '''
"""Whether the sum of a caption's tokens is odd, predicted from its image; the mean token."""

import torch
from torch import nn

from flava_train.objective.losses import Loss


def caption_parity(width=4):
    def head(config):
        return nn.Sequential(nn.Linear(config.image.width, width), nn.GELU(), nn.Linear(width, 2))

    def parity(pairs):
        return (pairs.texts.tokens.sum(1) % 2)[:, None]

    return Loss(stream="pairs", encoder="image", head=head, targets=parity)


def mean_token(outputs):
    if outputs.loss != "parity":
        return None
    texts = outputs.batch.texts
    return texts.tokens.sum(), texts.lengths.sum()


def parity_accuracy(outputs):
    if outputs.loss != "parity":
        return None
    correct = outputs.predictions.argmax(-1) == outputs.targets
    return correct.sum(), torch.ones_like(correct).sum()
'''
WRONG_STREAM = """
from flava_train.objective.losses import Loss

def loss():
    return Loss(stream="pair", targets=len)
"""
LOSS = {"function": "my_losses:caption_parity", "weight": 0.5, "arguments": {"width": 8}}
VOCABULARY = len(SPECIAL_TOKENS) + len(tiny_datasets.WORDS)
SETTINGS = {
    "objective.losses.parity": LOSS,
    "metrics.step_metrics": ["my_losses:mean_token", "itm_accuracy", "my_losses:parity_accuracy"],
    "objective.streams": {"pairs": 1.0, "images": 0.0, "texts": 0.0},
    "checkpoint.every": 2,
    "steps": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of a small world, and the user's module."""
    folder = write_datasets(tmp_path_factory.mktemp("own-loss"))
    (folder / "my_losses.py").write_text(MODULE)
    return folder


def flava_train(folder, out, *options, ranks=1, changes=None):
    """The command, in `folder`, which is where it finds the user's module."""
    config = small_config(folder, folder / out, SETTINGS | (changes or {}))
    path = folder / f"{out}.toml"
    path.write_text(as_toml(config))
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    module = ["-m", "flava_train.cli"]
    command = [*(start if ranks > 1 else []), *module, "--config", path.name, *options]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )


def lines(folder, out):
    content = (folder / out / "metrics.jsonl").read_text()
    return [json.loads(line) for line in content.splitlines()]


def curve(folder, out):
    """What a run logged of each step, without times."""
    names = ("step", "losses", "metrics", "grad_norm")
    return [{name: line[name] for name in names} for line in lines(folder, out)]


@pytest.fixture(scope="module")
def trained(folder):
    done = flava_train(folder, "run")
    assert done.returncode == 0, done.stderr
    return done


def test_the_loss_and_the_metrics_are_logged_and_shown(folder, trained):
    logged = lines(folder, "run")

    assert [line["step"] for line in logged] == [0, 1, 2, 3]
    for line in logged:
        assert 0 < line["losses"]["parity"] < 2
        assert line["metrics"].keys() == {"mean_token", "itm_accuracy", "parity_accuracy"}
        assert 0 < line["metrics"]["mean_token"] < VOCABULARY
        assert (line["metrics"]["parity_accuracy"] * 8).is_integer()
    last_line = trained.stderr.splitlines()[-1]
    assert ", parity 0." in last_line
    assert ", mean_token " in last_line


def test_the_checkpoint_has_the_head_and_the_digest_of_the_module(folder, trained):
    progress = load_progress(folder / "run" / "checkpoints" / "step-00000004")
    weights = (folder / "run" / "checkpoints" / "step-00000004" / "model.safetensors").read_bytes()

    assert b"parity_head.0.weight" in weights
    assert progress.code.keys() == {
        "my_losses:caption_parity",
        "my_losses:mean_token",
        "my_losses:parity_accuracy",
    }
    assert set(progress.code.values()) == {hashlib.sha256(MODULE.encode()).hexdigest()}


def test_a_resumed_run_has_the_losses_and_metrics_of_an_uninterrupted_one(folder, trained):
    checkpoint = folder / "run" / "checkpoints" / "step-00000002"

    done = flava_train(folder, "resumed", "--resume", checkpoint)

    assert done.returncode == 0, done.stderr
    assert curve(folder, "resumed") == curve(folder, "run")[2:]


def test_a_changed_module_is_reported_on_resume(folder, trained, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "my_losses.py").write_text(MODULE)
    config = small_config(folder, moved / "run", SETTINGS | {"steps": 3})
    (moved / "run.toml").write_text(as_toml(config))
    command = [sys.executable, "-m", "flava_train.cli", "--config", "run.toml"]
    options = {"cwd": moved, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    subprocess.run(command, check=True, capture_output=True, **options)
    (moved / "my_losses.py").write_text(f"{MODULE}\n# changed\n")

    again = [*command, "--set", "steps=4"]
    done = subprocess.run(again, check=False, capture_output=True, text=True, **options)

    assert done.returncode == 0, done.stderr
    assert "my_losses:caption_parity: its source file differs from that of" in done.stderr


def test_evaluation_and_export_need_no_module(folder, trained, tmp_path):
    for words in (["export", folder / "run", "--hf", tmp_path / "hf"], ["model", tmp_path / "hf"]):
        done = subprocess.run(
            [sys.executable, "-m", "flava_train.cli", *map(str, words)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert "itm_head" in done.stdout
    assert "parity" not in done.stdout


@pytest.mark.parametrize(
    ("code", "function", "sentence"),
    [
        ("import nowhere_to_be_found", "broken:loss", "importing broken fails"),
        ("def loss(:", "broken:loss", "importing broken fails: SyntaxError"),
        ("", "absent:loss", "there is no module 'absent'"),
        (
            WRONG_STREAM,
            "broken:loss",
            "ValueError: there is no stream 'pair'; there are pairs, images, texts (broken.py",
        ),
    ],
)
def test_a_broken_module_is_one_sentence_and_exit_code_2(folder, code, function, sentence):
    (folder / "broken.py").write_text(code)
    changes = {"objective.losses.parity": {"function": function}, "metrics.step_metrics": []}

    done = flava_train(folder, "broken", changes=changes)

    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_two_ranks_have_the_losses_and_metrics_of_one(folder, trained):
    done = flava_train(folder, "two-ranks", "--quiet", ranks=2)

    assert done.returncode == 0, done.stderr
    for two, one in zip(curve(folder, "two-ranks"), curve(folder, "run"), strict=True):
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-6)
        assert two["metrics"] == one["metrics"]
