import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_datasets
import torch
from trials import command, losses, run, said, told, write_world

from flava_train.evaluation.result import EvaluationResult
from flava_train.model.flava import Flava
from flava_train.run import checkpoint
from flava_train.run.checkpoint import find_checkpoint, load_progress, newest_checkpoint
from flava_train.run.init import init_model, read_tensors
from flava_train.run.loggers import METRICS
from flava_train.train import open_data, train
from pmd_pipeline.contract.errors import PmdError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """A run of eight steps, evaluated twice, that nobody disturbed."""
    config = told(world, tmp_path_factory.mktemp("alone") / "run", evaluated(world))
    train(config, quiet=True)
    return Path(config.out)


def evaluated(world):
    return {"evaluation.retrieval": str(world / "held-out.json"), "evaluation.every": 4}


def content(place):
    """All tensors of a checkpoint."""
    folder = find_checkpoint(place)
    return [read_tensors(folder / name) for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS)]


def same(one, other):
    """Whether two runs ended at the same bits."""
    return all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        for ours, theirs in zip(content(one), content(other), strict=True)
    )


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def kill_at(monkeypatch, module, name, at):
    """The call number `at` of a function ends the process, so to speak."""
    real, calls = getattr(module, name), []

    def dying(*rest, **more):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return real(*rest, **more)

    monkeypatch.setattr(module, name, dying)


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_a_run_killed_in_a_step_ends_at_the_same_bits(world, alone, tmp_path, monkeypatch, steps):
    config = told(world, tmp_path / "run", evaluated(world))
    with monkeypatch.context() as patch:
        kill_at(patch, torch.optim.AdamW, "step", steps)
        with pytest.raises(Killed):
            train(config, quiet=True)

    train(config, quiet=True)

    assert said(tmp_path / "run") == said(alone)
    assert same(tmp_path / "run", alone)


@pytest.mark.parametrize("call", range(1, 8))
def test_a_run_killed_while_it_saves_ends_at_the_same_bits(
    world, alone, tmp_path, monkeypatch, call
):
    config = told(world, tmp_path / "run", evaluated(world))
    with monkeypatch.context() as patch:
        kill_at(patch, checkpoint, "_sync", call)
        with pytest.raises(Killed):
            train(config, quiet=True)

    train(config, quiet=True)

    assert said(tmp_path / "run") == said(alone)
    assert same(tmp_path / "run", alone)
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {path.name for path in (alone / "checkpoints").iterdir()}


def test_no_checkpoint_is_found_before_it_is_whole(world, tmp_path, monkeypatch):
    config = told(world, tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(patch, checkpoint, "_sync", 3)
        with pytest.raises(Killed):
            train(config, quiet=True)

    assert newest_checkpoint(tmp_path / "run") is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("workers", "kills"), [(0, 4), (1, 2), (3, 2)])
def test_real_kills_at_random_moments_change_no_bit(world, tmp_path, workers, kills):
    """Every step is saved, so that most of the time is spent in saving."""
    changes = {"steps": 40, "checkpoint.every": 1, "data.workers": workers}
    left_alone = told(world, tmp_path / "alone", changes | {"data.workers": 0})
    train(left_alone, quiet=True)
    config = told(world, tmp_path / "run", changes)
    moments = random.Random(workers)
    lines = tmp_path / "run" / METRICS
    num_kills = 0
    for more in (moments.randrange(1, 12) for _ in range(kills)):
        with subprocess.Popen(command(config), stderr=subprocess.DEVNULL) as process:
            goal = count(lines) + more
            while count(lines) < goal and process.poll() is None:
                time.sleep(moments.random() / 200)
            num_kills += process.poll() is None
            process.kill()
    assert num_kills > 0

    done = run(config)

    assert done.returncode == 0, done.stderr
    assert said(tmp_path / "run") == said(tmp_path / "alone")
    assert same(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_sigterm_ends_a_process_with_exit_0_and_a_checkpoint(world, tmp_path):
    config = told(world, tmp_path / "run", {"steps": 100_000, "checkpoint.every": 100_000})
    lines = tmp_path / "run" / METRICS
    with subprocess.Popen(command(config), stderr=subprocess.PIPE, text=True) as process:
        while count(lines) < 5 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, words = process.communicate(timeout=60)

    assert process.returncode == 0
    assert "run the same command to resume" in words
    assert newest_checkpoint(tmp_path / "run") == len(losses(tmp_path / "run"))


def count(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_may_go_on_in_another_folder(world, alone, tmp_path):
    config = told(world, tmp_path / "run", evaluated(world))

    train(config, resume=str(alone / "checkpoints" / "step-00000006"), quiet=True)

    assert same(tmp_path / "run", alone)
    assert [line["step"] for line in said(tmp_path / "run") if "step" in line] == [6, 7]


@pytest.mark.parametrize("named", [".", "checkpoints/step-00000006"])
def test_the_same_command_goes_on_after_it_began_from_another_run(
    world, alone, tmp_path, monkeypatch, named
):
    theirs = tmp_path / "theirs"
    shutil.copytree(alone, theirs)
    shutil.rmtree(theirs / "checkpoints" / "step-00000008")
    config = told(world, tmp_path / "run", evaluated(world))
    train(replace(config, steps=7), resume=str(theirs / named), quiet=True)
    assert find_checkpoint(tmp_path / "run").name == "step-00000007"
    monkeypatch.chdir(tmp_path)

    train(config, resume=str(Path("theirs") / named), quiet=True)  # by another spelling

    assert [line["step"] for line in said(tmp_path / "run") if "step" in line] == [6, 7]
    with pytest.raises(PmdError, match="has a checkpoint of 8 steps"):
        train(config, resume=str(alone), quiet=True)


def test_a_run_may_name_its_own_folder_in_any_spelling(world, tmp_path, monkeypatch):
    config = told(world, tmp_path / "run", evaluated(world))
    train(replace(config, steps=5), quiet=True)
    best = load_progress(find_checkpoint(tmp_path / "run")).best
    monkeypatch.chdir(tmp_path)

    for steps, spelling in ((6, "run"), (7, "run/../run/checkpoints/step-00000006")):
        train(replace(config, steps=steps), resume=spelling, quiet=True)
        now = load_progress(find_checkpoint(tmp_path / "run"))
        assert (now.steps, now.begun_from) == (steps, None)
        assert now.best is not None
        assert now.best.value >= best.value


def test_a_finished_run_is_left_as_it_is(world, alone):
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*.safetensors")}

    outcome = train(told(world, alone, evaluated(world)), quiet=True)

    assert outcome.steps == 8
    assert before == {path: path.stat().st_mtime_ns for path in alone.rglob("*.safetensors")}


def test_resume_never_does_not_touch_a_run(world, alone):
    with pytest.raises(PmdError, match="has checkpoints: name another --out"):
        train(told(world, alone), resume="never", quiet=True)


def test_newer_checkpoints_are_not_overwritten(world, alone):
    older = str(alone / "checkpoints" / "step-00000006")

    with pytest.raises(PmdError, match="has a checkpoint of 8 steps: name another --out"):
        train(told(world, alone), resume=older, quiet=True)


def test_there_is_nothing_to_go_on_from(world, tmp_path):
    with pytest.raises(PmdError, match="is neither a checkpoint nor a run with a checkpoint"):
        train(told(world, tmp_path / "run"), resume=str(tmp_path), quiet=True)


def test_only_the_newest_and_the_best_are_kept(world, tmp_path, monkeypatch):
    recalls = iter([0.9, 0.1, 0.2, 0.3])
    monkeypatch.setattr(
        "flava_train.trainer.evaluate",
        lambda *_, **__: EvaluationResult({"text_to_image_r1": next(recalls)}, {}),
    )
    changes = evaluated(world) | {"evaluation.every": 2, "checkpoint.every": 1}

    train(told(world, tmp_path / "run", changes), quiet=True)

    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000007", "step-00000008"]
    assert find_checkpoint(tmp_path / "run", best=True).name == "step-00000002"
    assert load_progress(find_checkpoint(tmp_path / "run")).best.value == 0.9


@pytest.mark.parametrize(
    "error",
    [PmdError("gone"), OSError(5, "input/output error"), torch.OutOfMemoryError("no memory")],
)
def test_an_evaluation_that_fails_takes_no_step_with_it(world, alone, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    config = told(world, tmp_path / "run", evaluated(world))
    with monkeypatch.context() as patch:
        patch.setattr("flava_train.trainer.evaluate", fail)
        with pytest.raises(type(error)) as caught:
            train(config, quiet=True)

    assert caught.value is error
    assert find_checkpoint(tmp_path / "run").name == "step-00000004"
    train(config, quiet=True)
    assert same(tmp_path / "run", alone)


def test_rank_0_decides_whether_a_model_is_the_best(world, tmp_path, monkeypatch):
    monkeypatch.setattr("flava_train.trainer.broadcast_from_rank_0", lambda *_: 0.875)

    train(told(world, tmp_path / "run", evaluated(world)), quiet=True)

    assert load_progress(find_checkpoint(tmp_path / "run")).best.value == 0.875


def test_the_best_of_a_run_that_was_never_evaluated_is_refused(world, tmp_path):
    train(told(world, tmp_path / "run", {"steps": 3}), quiet=True)

    with pytest.raises(PmdError, match="was never evaluated"):
        find_checkpoint(tmp_path / "run", best=True)


@pytest.fixture
def started(world, tmp_path):
    """A run that has taken three steps, in a world of its own."""
    own = write_world(tmp_path)
    train(told(own, tmp_path / "run", {"steps": 3}), quiet=True)
    return own


def test_changed_pairs_are_refused_unless_allowed(started):
    shards = [tiny_datasets.samples(16, captions=2, start=start) for start in (0, 50)]
    tiny_datasets.write_pairs(started / "pairs.json", shards)
    config = told(started, started / "run")

    with pytest.raises(PmdError, match=r"pairs: .* was trained on .* --allow-changed-data"):
        train(config, quiet=True)

    assert train(config, allow_changed_data=True, quiet=True).steps == 8


def test_a_changed_tokenizer_is_refused(started):
    words = (started / "vocab.txt").read_text().replace("dog", "cow")
    (started / "vocab.txt").write_text(words)

    with pytest.raises(PmdError, match=r"tokenizer: .* was trained on"):
        train(told(started, started / "run"), quiet=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "seed was 0 in .*, and is 1: batches would differ"),
        ({"batch": 4}, "batch was 8"),
        ({"objective.streams.pairs": 0.5, "objective.streams.images": 0.3}, "objective.streams"),
        ({"model.image.layers": 3}, "model.image.layers was 2 in .*: its weights do not fit"),
    ],
)
def test_other_steps_and_other_models_are_refused(started, changes, says):
    with pytest.raises(PmdError, match=says):
        train(told(started, started / "run", changes), quiet=True)


def test_what_shapes_no_batch_may_change(started, capfd):
    train(told(started, started / "run", {"optimizer.lr": 0.5}))

    assert "optimizer.lr was 0.001 in" in capfd.readouterr().err


def test_data_may_move(started, tmp_path):
    for path in started.glob("*"):
        if path.name != "run":
            (tmp_path / "moved").mkdir(exist_ok=True)
            path.rename(tmp_path / "moved" / path.name)

    assert train(told(tmp_path / "moved", started / "run"), quiet=True).steps == 8


def test_loading_runs_no_code(started, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
        path = find_checkpoint(started / "run") / name
        held = path.read_bytes()
        torch.save({"logit_scale": Evil()}, path)
        with pytest.raises(PmdError, match="cannot read"):
            train(told(started, started / "run"), quiet=True)
        path.write_bytes(held)

    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (checkpoint.WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot read"),
        (checkpoint.MOMENTS, lambda path: path.unlink(), "cannot read"),
        (checkpoint.STATE, lambda path: path.write_text("{}"), "of this version"),
        (
            checkpoint.WEIGHTS,
            lambda path: path.write_bytes(path.with_name(checkpoint.MOMENTS).read_bytes()),
            "is of another model",
        ),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence(started, name, damage, says):
    damage(find_checkpoint(started / "run") / name)

    with pytest.raises(PmdError, match=says) as caught:
        train(told(started, started / "run"), quiet=True)

    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(started, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", full)
        with pytest.raises(PmdError, match="make room and run"):
            train(told(started, started / "run"), quiet=True)

    assert [path.name for path in (started / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert train(told(started, started / "run"), quiet=True).steps == 8


def test_an_old_checkpoint_that_cannot_be_removed_is_one_sentence(started, monkeypatch):
    def busy(_):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", busy)
        with pytest.raises(PmdError, match=r"cannot remove .*: Device or resource busy"):
            train(told(started, started / "run"), quiet=True)


def test_a_checkpoint_says_what_it_is_of(started):
    progress = load_progress(find_checkpoint(started / "run"))

    state = json.loads((find_checkpoint(started / "run") / "state.json").read_text())
    assert progress.steps == state["steps"] == 3
    assert set(progress.digests) == {"pairs", "images", "texts", "tokenizer"}
    assert progress.config["seed"] == 0
    assert set(progress.versions) == {"numpy", "pillow", "torch"}


def test_moments_of_a_head_whose_turn_has_not_come_are_absent(world, tmp_path):
    streams = {"objective.streams": {"pairs": 1.0, "images": 0.0, "texts": 0.0}}
    config = told(world, tmp_path / "run", {"steps": 3, **streams})

    train(config, quiet=True)

    moments = content(tmp_path / "run")[1]
    assert "exp_avg.itm_head.dense.weight" in moments
    assert not any("mim_head" in name for name in moments)


def test_a_run_resumes_without_the_head_of_a_loss_that_is_turned_off(world, tmp_path):
    train(told(world, tmp_path / "run", {"steps": 5}), quiet=True)

    train(told(world, tmp_path / "run", {"objective.itm": 0.0}), quiet=True)

    held = content(tmp_path / "run")
    assert not any("itm_head" in name for tensors in held for name in tensors)
    assert any("mmm_text_head" in name for tensors in held for name in tensors)


def test_a_run_does_not_resume_with_a_head_that_its_checkpoint_lacks(world, tmp_path):
    train(told(world, tmp_path / "run", {"steps": 3, "objective.mim": 0.0}), quiet=True)

    with pytest.raises(PmdError, match="has no mim_head: it was trained without this loss"):
        train(told(world, tmp_path / "run"), quiet=True)


def test_another_run_may_start_from_weights_without_a_head(world, tmp_path, caplog):
    before = told(world, tmp_path / "before", {"steps": 3, "objective.mim": 0.0})
    train(before, quiet=True)
    config = told(world, tmp_path / "run", {"model.weights": before.out})

    model = init_model(open_data(config)[0], "", from_scratch=True)
    torch.manual_seed(0)
    fresh = Flava(model.config)

    assert f"{before.out} has no mim_head: its weights are random" in caplog.text
    theirs, ours = content(tmp_path / "before")[0], model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert torch.equal(ours["mim_head.dense.weight"], fresh.mim_head.dense.weight)


def test_a_checkpoint_of_another_format_is_one_sentence(started):
    path = find_checkpoint(started / "run") / checkpoint.STATE
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))

    with pytest.raises(PmdError, match="is no checkpoint of this version"):
        train(told(started, started / "run"), quiet=True)


def test_steps_of_checkpoints_are_compared_as_numbers():
    names = [checkpoint.checkpoint_name(steps) for steps in (9, 99_999_999, 100_000_000)]

    assert all(len(one) <= len(other) for one, other in pairwise(names))
    assert names[2] == "step-100000000"
