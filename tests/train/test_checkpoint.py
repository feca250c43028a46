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
from trials import (
    logged_losses,
    logged_steps,
    run_train,
    small_config,
    train_command,
    write_datasets,
)

from flava_train.evaluation.result import EvaluationResult
from flava_train.model.flava import Flava
from flava_train.run import checkpoint
from flava_train.run.checkpoint import find_checkpoint, load_progress, newest_checkpoint
from flava_train.run.init import init_model, load_tensors
from flava_train.run.loggers import METRICS
from flava_train.train import open_data, train
from pmd_pipeline.contract.errors import PmdError


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def uninterrupted(datasets, tmp_path_factory):
    """The folder of an uninterrupted run of eight steps with two evaluations."""
    config = small_config(
        datasets, tmp_path_factory.mktemp("uninterrupted") / "run", evaluated(datasets)
    )
    train(config, quiet=True)
    return Path(config.out)


def evaluated(datasets):
    return {"evaluation.retrieval": str(datasets / "held-out.json"), "evaluation.every": 4}


def tensors_of(path):
    """All tensors of a checkpoint: weights and moments."""
    folder = find_checkpoint(path)
    return [load_tensors(folder / name) for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS)]


def same(one, other):
    """Whether two runs ended with the same bits."""
    return all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        for ours, theirs in zip(tensors_of(one), tensors_of(other), strict=True)
    )


class Killed(BaseException):
    """In place of SIGKILL: no code of the package catches it."""


def kill_at(monkeypatch, module, name, at):
    """Let the call number `at` of a function raise `Killed`."""
    real, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, dying)


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_a_run_killed_in_a_step_ends_with_the_same_bits(
    datasets, uninterrupted, tmp_path, monkeypatch, steps
):
    config = small_config(datasets, tmp_path / "run", evaluated(datasets))
    with monkeypatch.context() as patch:
        kill_at(patch, torch.optim.AdamW, "step", steps)
        with pytest.raises(Killed):
            train(config, quiet=True)

    train(config, quiet=True)

    assert logged_steps(tmp_path / "run") == logged_steps(uninterrupted)
    assert same(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("call", range(1, 8))
def test_a_run_killed_while_it_saves_ends_with_the_same_bits(
    datasets, uninterrupted, tmp_path, monkeypatch, call
):
    config = small_config(datasets, tmp_path / "run", evaluated(datasets))
    with monkeypatch.context() as patch:
        kill_at(patch, checkpoint, "_sync", call)
        with pytest.raises(Killed):
            train(config, quiet=True)

    train(config, quiet=True)

    assert logged_steps(tmp_path / "run") == logged_steps(uninterrupted)
    assert same(tmp_path / "run", uninterrupted)
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {path.name for path in (uninterrupted / "checkpoints").iterdir()}


def test_an_incomplete_checkpoint_is_not_found(datasets, tmp_path, monkeypatch):
    config = small_config(datasets, tmp_path / "run")
    with monkeypatch.context() as patch:
        kill_at(patch, checkpoint, "_sync", 3)
        with pytest.raises(Killed):
            train(config, quiet=True)

    assert newest_checkpoint(tmp_path / "run") is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("workers", "kills"), [(0, 4), (1, 2), (3, 2)])
def test_real_kills_at_random_moments_change_no_bit(datasets, tmp_path, workers, kills):
    """Every step is saved, so that saving takes most of the time."""
    changes = {"steps": 40, "checkpoint.every": 1, "data.workers": workers}
    undisturbed = small_config(datasets, tmp_path / "uninterrupted", changes | {"data.workers": 0})
    train(undisturbed, quiet=True)
    config = small_config(datasets, tmp_path / "run", changes)
    moments = random.Random(workers)
    lines = tmp_path / "run" / METRICS
    num_kills = 0
    for more in (moments.randrange(1, 12) for _ in range(kills)):
        with subprocess.Popen(train_command(config), stderr=subprocess.DEVNULL) as process:
            goal = count(lines) + more
            while count(lines) < goal and process.poll() is None:
                time.sleep(moments.random() / 200)
            num_kills += process.poll() is None
            process.kill()
    assert num_kills > 0

    done = run_train(config)

    assert done.returncode == 0, done.stderr
    assert logged_steps(tmp_path / "run") == logged_steps(tmp_path / "uninterrupted")
    assert same(tmp_path / "run", tmp_path / "uninterrupted")


@pytest.mark.slow
def test_after_sigterm_a_process_saves_and_exits_with_0(datasets, tmp_path):
    config = small_config(
        datasets, tmp_path / "run", {"steps": 100_000, "checkpoint.every": 100_000}
    )
    lines = tmp_path / "run" / METRICS
    with subprocess.Popen(train_command(config), stderr=subprocess.PIPE, text=True) as process:
        while count(lines) < 5 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)

    assert process.returncode == 0
    assert "run the same command to resume" in stderr
    assert newest_checkpoint(tmp_path / "run") == len(logged_losses(tmp_path / "run"))


def count(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_run_can_resume_in_another_folder(datasets, uninterrupted, tmp_path):
    config = small_config(datasets, tmp_path / "run", evaluated(datasets))

    train(config, resume=str(uninterrupted / "checkpoints" / "step-00000006"), quiet=True)

    assert same(tmp_path / "run", uninterrupted)
    assert [line["step"] for line in logged_steps(tmp_path / "run") if "step" in line] == [6, 7]


@pytest.mark.parametrize("named", [".", "checkpoints/step-00000006"])
def test_the_same_command_resumes_a_run_that_started_from_another(
    datasets, uninterrupted, tmp_path, monkeypatch, named
):
    other = tmp_path / "other"
    shutil.copytree(uninterrupted, other)
    shutil.rmtree(other / "checkpoints" / "step-00000008")
    config = small_config(datasets, tmp_path / "run", evaluated(datasets))
    train(replace(config, steps=7), resume=str(other / named), quiet=True)
    assert find_checkpoint(tmp_path / "run").name == "step-00000007"
    monkeypatch.chdir(tmp_path)

    train(config, resume=str(Path("other") / named), quiet=True)  # by another spelling

    assert [line["step"] for line in logged_steps(tmp_path / "run") if "step" in line] == [6, 7]
    with pytest.raises(PmdError, match="has a checkpoint of 8 steps"):
        train(config, resume=str(uninterrupted), quiet=True)


def test_resume_accepts_any_spelling_of_the_runs_own_folder(datasets, tmp_path, monkeypatch):
    config = small_config(datasets, tmp_path / "run", evaluated(datasets))
    train(replace(config, steps=5), quiet=True)
    best = load_progress(find_checkpoint(tmp_path / "run")).best
    monkeypatch.chdir(tmp_path)

    for steps, spelling in ((6, "run"), (7, "run/../run/checkpoints/step-00000006")):
        train(replace(config, steps=steps), resume=spelling, quiet=True)
        now = load_progress(find_checkpoint(tmp_path / "run"))
        assert (now.steps, now.begun_from) == (steps, None)
        assert now.best is not None
        assert now.best.value >= best.value


def test_a_finished_run_is_not_changed(datasets, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.safetensors")}

    result = train(small_config(datasets, uninterrupted, evaluated(datasets)), quiet=True)

    assert result.steps == 8
    assert before == {
        path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*.safetensors")
    }


def test_resume_never_refuses_a_run_with_checkpoints(datasets, uninterrupted):
    with pytest.raises(PmdError, match="has checkpoints: name another --out"):
        train(small_config(datasets, uninterrupted), resume="never", quiet=True)


def test_a_run_with_newer_checkpoints_refuses_an_older_one(datasets, uninterrupted):
    older = str(uninterrupted / "checkpoints" / "step-00000006")

    with pytest.raises(PmdError, match="has a checkpoint of 8 steps: name another --out"):
        train(small_config(datasets, uninterrupted), resume=older, quiet=True)


def test_a_folder_without_a_checkpoint_cannot_be_resumed(datasets, tmp_path):
    with pytest.raises(PmdError, match="is neither a checkpoint nor a run with a checkpoint"):
        train(small_config(datasets, tmp_path / "run"), resume=str(tmp_path), quiet=True)


def test_only_the_newest_and_the_best_are_kept(datasets, tmp_path, monkeypatch):
    recalls = iter([0.9, 0.1, 0.2, 0.3])
    monkeypatch.setattr(
        "flava_train.trainer.evaluate",
        lambda *_, **__: EvaluationResult({"text_to_image_r1": next(recalls)}, {}),
    )
    changes = evaluated(datasets) | {"evaluation.every": 2, "checkpoint.every": 1}

    train(small_config(datasets, tmp_path / "run", changes), quiet=True)

    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000007", "step-00000008"]
    assert find_checkpoint(tmp_path / "run", best=True).name == "step-00000002"
    assert load_progress(find_checkpoint(tmp_path / "run")).best.value == 0.9


@pytest.mark.parametrize(
    "error",
    [PmdError("gone"), OSError(5, "input/output error"), torch.OutOfMemoryError("no memory")],
)
def test_an_evaluation_that_fails_loses_no_step(
    datasets, uninterrupted, tmp_path, monkeypatch, error
):
    def fail(*_, **__):
        raise error

    config = small_config(datasets, tmp_path / "run", evaluated(datasets))
    with monkeypatch.context() as patch:
        patch.setattr("flava_train.trainer.evaluate", fail)
        with pytest.raises(type(error)) as caught:
            train(config, quiet=True)

    assert caught.value is error
    assert find_checkpoint(tmp_path / "run").name == "step-00000004"
    train(config, quiet=True)
    assert same(tmp_path / "run", uninterrupted)


def test_rank_0_decides_which_checkpoint_is_the_best(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr("flava_train.trainer.broadcast_from_rank_0", lambda *_: 0.875)

    train(small_config(datasets, tmp_path / "run", evaluated(datasets)), quiet=True)

    assert load_progress(find_checkpoint(tmp_path / "run")).best.value == 0.875


def test_a_run_without_an_evaluation_has_no_best_checkpoint(datasets, tmp_path):
    train(small_config(datasets, tmp_path / "run", {"steps": 3}), quiet=True)

    with pytest.raises(PmdError, match="was never evaluated"):
        find_checkpoint(tmp_path / "run", best=True)


@pytest.fixture
def started(datasets, tmp_path):
    """Datasets of their own, with a run of three steps."""
    own = write_datasets(tmp_path)
    train(small_config(own, tmp_path / "run", {"steps": 3}), quiet=True)
    return own


def test_changed_pairs_are_refused_unless_allowed(started):
    shards = [tiny_datasets.samples(16, captions=2, start=start) for start in (0, 50)]
    tiny_datasets.write_pairs(started / "pairs.json", shards)
    config = small_config(started, started / "run")

    with pytest.raises(PmdError, match=r"pairs: .* was trained on .* --allow-changed-data"):
        train(config, quiet=True)

    assert train(config, allow_changed_data=True, quiet=True).steps == 8


def test_a_changed_tokenizer_is_refused(started):
    vocabulary = (started / "vocab.txt").read_text().replace("dog", "cow")
    (started / "vocab.txt").write_text(vocabulary)

    with pytest.raises(PmdError, match=r"tokenizer: .* was trained on"):
        train(small_config(started, started / "run"), quiet=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 in .*, and is 1: batches would differ"),
        ({"batch": 4}, "batch was 8"),
        ({"objective.streams.pairs": 0.5, "objective.streams.images": 0.3}, "objective.streams"),
        ({"model.image.layers": 3}, "model.image.layers was 2 in .*: its weights do not fit"),
    ],
)
def test_a_change_of_batches_or_of_the_model_is_refused(started, changes, message):
    with pytest.raises(PmdError, match=message):
        train(small_config(started, started / "run", changes), quiet=True)


def test_values_that_change_no_batch_may_change(started, capfd):
    train(small_config(started, started / "run", {"optimizer.lr": 0.5}))

    assert "optimizer.lr was 0.001 in" in capfd.readouterr().err


def test_data_may_move(started, tmp_path):
    for path in started.glob("*"):
        if path.name != "run":
            (tmp_path / "moved").mkdir(exist_ok=True)
            path.rename(tmp_path / "moved" / path.name)

    assert train(small_config(tmp_path / "moved", started / "run"), quiet=True).steps == 8


def test_loading_a_checkpoint_runs_no_code(started, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
        path = find_checkpoint(started / "run") / name
        original = path.read_bytes()
        torch.save({"logit_scale": Evil()}, path)
        with pytest.raises(PmdError, match="cannot read"):
            train(small_config(started, started / "run"), quiet=True)
        path.write_bytes(original)

    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
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
def test_a_damaged_checkpoint_is_one_sentence(started, name, damage, message):
    damage(find_checkpoint(started / "run") / name)

    with pytest.raises(PmdError, match=message) as caught:
        train(small_config(started, started / "run"), quiet=True)

    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_sentence_and_leaves_no_partial_checkpoint(started, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", full)
        with pytest.raises(PmdError, match="make room and run"):
            train(small_config(started, started / "run"), quiet=True)

    assert [path.name for path in (started / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert train(small_config(started, started / "run"), quiet=True).steps == 8


def test_an_old_checkpoint_that_cannot_be_removed_is_one_sentence(started, monkeypatch):
    def busy(_):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", busy)
        with pytest.raises(PmdError, match=r"cannot remove .*: Device or resource busy"):
            train(small_config(started, started / "run"), quiet=True)


def test_a_checkpoint_records_steps_data_configuration_and_versions(started):
    progress = load_progress(find_checkpoint(started / "run"))

    state = json.loads((find_checkpoint(started / "run") / "state.json").read_text())
    assert progress.steps == state["steps"] == 3
    assert set(progress.digests) == {"pairs", "images", "texts", "tokenizer"}
    assert progress.config["seed"] == 0
    assert set(progress.versions) == {"numpy", "pillow", "torch"}


def test_a_head_has_no_moments_before_the_first_step_of_its_stream(datasets, tmp_path):
    streams = {"objective.streams": {"pairs": 1.0, "images": 0.0, "texts": 0.0}}
    config = small_config(datasets, tmp_path / "run", {"steps": 3, **streams})

    train(config, quiet=True)

    moments = tensors_of(tmp_path / "run")[1]
    assert "exp_avg.itm_head.dense.weight" in moments
    assert not any("mim_head" in name for name in moments)


def test_a_run_resumes_without_the_head_of_a_loss_that_is_turned_off(datasets, tmp_path):
    train(small_config(datasets, tmp_path / "run", {"steps": 5}), quiet=True)

    train(small_config(datasets, tmp_path / "run", {"objective.itm": 0.0}), quiet=True)

    names = {name for tensors in tensors_of(tmp_path / "run") for name in tensors}
    assert not any("itm_head" in name for name in names)
    assert any("mmm_text_head" in name for name in names)


def test_a_run_does_not_resume_with_a_head_that_its_checkpoint_lacks(datasets, tmp_path):
    train(small_config(datasets, tmp_path / "run", {"steps": 3, "objective.mim": 0.0}), quiet=True)

    with pytest.raises(PmdError, match="has no mim_head: it was trained without this loss"):
        train(small_config(datasets, tmp_path / "run"), quiet=True)


def test_another_run_may_start_from_weights_without_a_head(datasets, tmp_path, caplog):
    before = small_config(datasets, tmp_path / "before", {"steps": 3, "objective.mim": 0.0})
    train(before, quiet=True)
    config = small_config(datasets, tmp_path / "run", {"model.weights": before.out})

    model = init_model(open_data(config)[0], "", from_scratch=True)
    torch.manual_seed(0)
    fresh = Flava(model.config)

    assert f"{before.out} has no mim_head: its weights are random" in caplog.text
    theirs, ours = tensors_of(tmp_path / "before")[0], model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert torch.equal(ours["mim_head.dense.weight"], fresh.mim_head.dense.weight)


def test_a_checkpoint_of_another_format_is_one_sentence(started):
    path = find_checkpoint(started / "run") / checkpoint.STATE
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))

    with pytest.raises(PmdError, match="is no checkpoint of this version"):
        train(small_config(started, started / "run"), quiet=True)


def test_steps_of_checkpoints_are_compared_as_numbers():
    names = [checkpoint.checkpoint_name(steps) for steps in (9, 99_999_999, 100_000_000)]

    assert all(len(one) <= len(other) for one, other in pairwise(names))
    assert names[2] == "step-100000000"
