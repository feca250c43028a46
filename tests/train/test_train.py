import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_model import dino
from tiny import TINY
from trials import (
    logged_losses,
    logged_steps,
    run_train,
    small_config,
    train_command,
    write_datasets,
)

from flava_train import trainer
from flava_train.config import OptimizerConfig, validate_config
from flava_train.data.loader import load_batches
from flava_train.evaluation.trained_model import load_trained_model
from flava_train.model.flava import Flava
from flava_train.model.hf import export_hf, load_hf, untrained_heads
from flava_train.run.checkpoint import find_checkpoint, load_progress
from flava_train.run.init import init_model, load_tensors
from flava_train.run.optimizer import adamw, learning_rate
from flava_train.run.ranks import Ranks
from flava_train.run.run_dir import lock_run_dir
from flava_train.train import open_data, train
from pmd_pipeline.contract.errors import PmdError


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def uninterrupted(datasets, tmp_path_factory):
    """The folder of an uninterrupted run of eight steps."""
    config = small_config(datasets, tmp_path_factory.mktemp("uninterrupted") / "run")
    train(config, quiet=True)
    return Path(config.out)


def weights(run):
    return load_tensors(find_checkpoint(run) / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SHORT = OptimizerConfig(lr=8e-4, warmup=10, end=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule_starts_and_ends_at_its_exact_values(schedule):
    config = replace(SHORT, schedule=schedule)

    assert learning_rate(config, 0, 100) == 8e-5
    assert learning_rate(config, 9, 100) == 8e-4
    assert learning_rate(config, 100, 100) == 1e-5
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_in_the_middle_of_the_decrease_the_rate_is_the_mean_of_its_ends(schedule):
    config = replace(SHORT, schedule=schedule, warmup=11)

    assert learning_rate(config, 60, 110) == pytest.approx((8e-4 + 1e-5) / 2, rel=1e-12)
    assert learning_rate(config, 11, 110) < 8e-4  # the decrease starts at once


def test_a_constant_schedule_keeps_the_highest_rate():
    config = replace(SHORT, schedule="constant")

    assert {learning_rate(config, step, 100) for step in range(9, 100)} == {8e-4}


def test_only_weights_of_linear_layers_have_weight_decay():
    model = Flava(TINY)
    optimizer = adamw(model, OptimizerConfig(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    decayed, others = (
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        & {
            names[id(p)]
            for g in optimizer.param_groups
            if g["weight_decay"] == d
            for p in g["params"]
        }
        for d in (0.1, 0.0)
    )

    assert decayed | others == set(names.values())
    assert all(name.endswith("weight") for name in decayed)
    assert {"image.patches.weight", "text.blocks.0.qkv.weight", "itm_head.classifier.weight"} <= (
        decayed
    )
    assert {
        "logit_scale",
        "image.cls",
        "image.mask",
        "image.positions",
        "text.words.weight",
        "text.positions.weight",
        "text.blocks.0.norm1.weight",
        "multimodal.cls",
    } <= others


def test_decay_all_gives_every_parameter_weight_decay():
    optimizer = adamw(Flava(TINY), OptimizerConfig(weight_decay=0.1, decay_all=True))

    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


def test_first_losses_are_those_of_random_guessing(uninterrupted):
    first = {
        name: loss for one in reversed(logged_losses(uninterrupted)) for name, loss in one.items()
    }

    assert first["contrastive"] == pytest.approx(math.log(8), abs=0.3)
    assert first["mmm_image"] == pytest.approx(math.log(67), abs=0.3)
    assert first["itm"] == pytest.approx(math.log(2), abs=0.3)


def test_every_step_is_logged_once(uninterrupted):
    assert [line["step"] for line in logged_steps(uninterrupted)] == list(range(8))


def test_micro_batches_change_memory_and_not_losses(datasets, uninterrupted, tmp_path):
    config = small_config(datasets, tmp_path / "run", {"micro_batch_size": 3})

    train(config, quiet=True)

    for ours, theirs in zip(
        logged_losses(tmp_path / "run"), logged_losses(uninterrupted), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_recomputing_activations_changes_no_loss(datasets, uninterrupted, tmp_path):
    train(small_config(datasets, tmp_path / "run", {"compute.recompute": True}), quiet=True)

    assert logged_losses(tmp_path / "run") == logged_losses(uninterrupted)


COMPILED = """
import sys
import time

sys.path.insert(0, {here!r})
import torch
from tiny import max_difference, flava, gradients, pairs

from flava_train.objective.objective import Objective
from flava_train.objective.step import train_step

plain, model = flava(), flava()
for encoder in (model.image, model.text, model.multimodal):
    encoder.recompute = True
model.compile_regions(backend="aot_eager")
for one in (plain, model):
    train_step(one, [pairs(4)], Objective())
print(max_difference(gradients(plain), gradients(model)) < 1e-10)
"""


@pytest.mark.slow
def test_blocks_can_be_recomputed_and_compiled():
    script = COMPILED.format(here=str(Path(__file__).parent))

    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )

    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_has_about_the_same_losses(
    datasets, uninterrupted, tmp_path, monkeypatch, precision
):
    monkeypatch.setattr(
        "flava_train.train.FIRST_LOSS_SCALE", 8.0
    )  # first embeddings are very similar
    train(small_config(datasets, tmp_path / "run", {"compute.precision": precision}), quiet=True)

    for ours, theirs in zip(
        logged_losses(tmp_path / "run"), logged_losses(uninterrupted), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=0.05)


def test_an_overflow_of_float16_skips_the_update(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr("flava_train.train.FIRST_LOSS_SCALE", 2.0**60)
    config = small_config(datasets, tmp_path / "run", {"compute.precision": "fp16", "steps": 3})

    train(config, quiet=True)

    lines = logged_steps(tmp_path / "run")
    assert [line["updated"] for line in lines] == [False, False, False]
    assert [line["loss_scale"] for line in lines] == [2.0**59, 2.0**58, 2.0**57]
    fresh = init_model(open_data(config)[0], "", from_scratch=True)
    assert same(weights(tmp_path / "run"), dict(fresh.state_dict()))


def test_the_loss_scale_doubles_after_enough_good_steps(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "LOSS_SCALE_STEPS", 2)
    monkeypatch.setattr("flava_train.train.FIRST_LOSS_SCALE", 8.0)

    train(
        small_config(datasets, tmp_path / "run", {"compute.precision": "fp16", "steps": 5}),
        quiet=True,
    )

    assert [line["loss_scale"] for line in logged_steps(tmp_path / "run")] == [
        8.0,
        16.0,
        16.0,
        32.0,
        32.0,
    ]


def test_a_loss_scale_of_1_survives_a_resume(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr("flava_train.train.FIRST_LOSS_SCALE", 1.0)
    changes = {"compute.precision": "fp16", "steps": 3}
    train(small_config(datasets, tmp_path / "run", changes), quiet=True)
    monkeypatch.setattr("flava_train.train.FIRST_LOSS_SCALE", 8.0)

    train(small_config(datasets, tmp_path / "run", changes | {"steps": 5}), quiet=True)

    assert [line["loss_scale"] for line in logged_steps(tmp_path / "run")] == [1.0] * 5
    assert load_progress(find_checkpoint(tmp_path / "run")).good_steps == 5


@pytest.mark.parametrize("before", ["fp16", "fp32"])
def test_the_loss_scale_starts_anew_when_the_precision_changes_to_float16(
    datasets, tmp_path, monkeypatch, before
):
    monkeypatch.setattr("flava_train.train.FIRST_LOSS_SCALE", 8.0)
    steps = {"fp16": "fp32", "fp32": "fp16"}
    train(
        small_config(datasets, tmp_path / "run", {"compute.precision": before, "steps": 3}),
        quiet=True,
    )

    after = {"compute.precision": steps[before], "steps": 4}
    train(small_config(datasets, tmp_path / "run", after), quiet=True)

    last = load_progress(find_checkpoint(tmp_path / "run"))
    assert (last.loss_scale, last.good_steps) == ((1.0, 0) if before == "fp16" else (8.0, 1))


def test_a_gradient_is_clipped_to_the_configured_norm(datasets, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def record_norm(self, *args):
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record_norm)

    train(small_config(datasets, tmp_path / "run", {"optimizer.grad_clip_norm": 0.5}), quiet=True)

    assert norms == pytest.approx(
        [min(0.5, line["grad_norm"]) for line in logged_steps(tmp_path / "run")]
    )
    assert max(line["grad_norm"] for line in logged_steps(tmp_path / "run")) > 0.5


@pytest.fixture
def make_nan(monkeypatch):
    """Makes the losses of one call of `train_step` NaN."""

    def make_call_nan(number):
        real, calls = trainer.train_step, []

        def step(*args, **kwargs):
            losses = real(*args, **kwargs)
            calls.append(1)
            factor = math.nan if len(calls) == number else 1.0
            return {name: loss * factor for name, loss in losses.items()}

        monkeypatch.setattr(trainer, "train_step", step)

    return make_call_nan


def test_a_loss_of_nan_stops_before_the_update_and_names_the_keys(datasets, tmp_path, make_nan):
    config = small_config(datasets, tmp_path / "run", {"checkpoint.every": 100})
    make_nan(6)

    with pytest.raises(PmdError, match=r"step 5: .* not finite") as caught:
        train(config, quiet=True)

    keys = json.loads((tmp_path / "run" / "not-finite-5.json").read_text())["keys"]
    assert keys == [slot.key for slot in open_data(config)[1].describe(5)]
    assert keys[0] in str(caught.value)
    assert "skip_steps=[5]" in str(caught.value)
    assert find_checkpoint(tmp_path / "run").name == "step-00000005"


def test_a_loss_of_nan_in_a_batch_of_one_names_its_key(datasets, tmp_path, make_nan):
    config = small_config(datasets, tmp_path / "run", {"batch": 1, "micro_batch_size": 1})
    make_nan(1)

    with pytest.raises(PmdError, match=r"step 0: .* not finite") as caught:
        train(config, quiet=True)

    (key,) = json.loads((tmp_path / "run" / "not-finite-0.json").read_text())["keys"]
    assert f" {key} not finite" in str(caught.value)


def test_a_run_resumes_after_nan_with_the_same_losses(datasets, uninterrupted, tmp_path, make_nan):
    config = small_config(datasets, tmp_path / "run")
    make_nan(6)
    with pytest.raises(PmdError):
        train(config, quiet=True)

    train(config, quiet=True)

    assert logged_steps(tmp_path / "run") == logged_steps(uninterrupted)


def test_an_infinite_gradient_stops_the_run(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "gradient_norm", lambda *_: torch.tensor(math.inf))

    with pytest.raises(PmdError, match="step 0: grad_norm"):
        train(small_config(datasets, tmp_path / "run"), quiet=True)


def test_a_step_can_be_skipped(datasets, uninterrupted, tmp_path):
    train(small_config(datasets, tmp_path / "run", {"skip_steps": [2], "steps": 4}), quiet=True)

    lines = logged_steps(tmp_path / "run")
    assert lines[2] == {
        "step": 2,
        "stream": logged_steps(uninterrupted)[2]["stream"],
        "skipped": True,
    }
    assert lines[1]["losses"] == logged_losses(uninterrupted)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_the_step_ends_and_is_saved(
    datasets, uninterrupted, tmp_path, monkeypatch, number
):
    real, calls = trainer.train_step, []

    def step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", step)
    config = small_config(datasets, tmp_path / "run")

    result = train(config, quiet=True)

    assert (result.steps, result.signal) == (2, number)
    assert find_checkpoint(tmp_path / "run").name == "step-00000002"
    assert train(config, quiet=True).signal is None
    assert logged_steps(tmp_path / "run") == logged_steps(uninterrupted)
    assert same(weights(tmp_path / "run"), weights(uninterrupted))


def test_the_description_of_a_step_equals_its_batch(datasets, tmp_path):
    config, data = open_data(small_config(datasets, tmp_path / "run"))

    for batch in load_batches(data, 0, 8):
        slots = data.describe(batch.step)
        assert [slot.key for slot in slots] == batch.keys
        if batch.stream == "images":
            continue
        tokens, encode = batch.rows, data.wordpiece.encode_documents
        if batch.stream == "pairs":
            tokens, encode = batch.rows.texts, data.wordpiece.encode
            assert [slot.matched for slot in slots] == batch.rows.matched.tolist()
        expected, _ = encode([slot.text for slot in slots], tokens.tokens.shape[1])
        assert torch.equal(tokens.tokens, torch.from_numpy(expected))
    assert config.model.text_vocab == len(data.wordpiece.vocabulary)


def test_two_trainers_cannot_write_to_one_folder(datasets, tmp_path):
    with lock_run_dir(tmp_path / "run"), pytest.raises(PmdError, match="another flava-train"):
        train(small_config(datasets, tmp_path / "run"), quiet=True)


def test_workers_of_a_killed_run_do_not_hold_its_lock(tmp_path):
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    with lock_run_dir(tmp_path / "run"):
        worker = fork.Process(target=lambda: (started.set(), time.sleep(60)))
        worker.start()
        assert started.wait(30)
        with pytest.raises(PmdError, match="another"), lock_run_dir(tmp_path / "run"):
            pass
    try:
        with lock_run_dir(tmp_path / "run"):
            assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()


def test_sizes_of_vocabularies_come_from_the_data(datasets, tmp_path, uninterrupted):
    config = validate_config(
        load_progress(find_checkpoint(uninterrupted)).config, source="a checkpoint"
    )

    assert config.model.image_vocab == 67
    assert config.model.text_vocab == len((uninterrupted / "vocab.txt").read_text().splitlines())


def test_unimodal_init_without_encoders_is_refused(datasets, tmp_path):
    config = small_config(datasets, tmp_path / "run", {"objective.unimodal_init": True})

    with pytest.raises(PmdError, match="name DINO's file"):
        train(config, quiet=True)


def test_a_text_encoder_can_be_taken_from_a_run(datasets, uninterrupted, tmp_path):
    changes = {
        "objective.unimodal_init": True,
        "model.init_image": "",
        "model.init_text": str(uninterrupted),
    }
    config, data = open_data(small_config(datasets, tmp_path / "run", changes))

    model = init_model(config, data.digests["tokenizer"], from_scratch=True)

    theirs = weights(uninterrupted)
    ours = model.state_dict()
    assert all(
        torch.equal(ours[n], theirs[n]) == n.startswith("text.") for n in ours if "words" in n
    )
    assert not torch.equal(ours["image.patches.weight"], theirs["image.patches.weight"])
    with pytest.raises(PmdError, match="has another tokenizer"):
        init_model(config, "other", from_scratch=True)


def test_a_whole_model_can_be_taken_from_a_run(datasets, uninterrupted, tmp_path):
    config = open_data(
        small_config(datasets, tmp_path / "run", {"model.weights": str(uninterrupted)})
    )[0]

    assert same(
        dict(init_model(config, "", from_scratch=True).state_dict()), weights(uninterrupted)
    )


def test_a_file_of_an_image_encoder_runs_no_code(datasets, tmp_path):
    path = tmp_path / "dino.pth"
    torch.save({"cls_token": torch.zeros(1), "more": os.system}, path)
    changes = {
        "objective.unimodal_init": True,
        "model.init_image": str(path),
        "model.init_text": "",
    }
    config = open_data(small_config(datasets, tmp_path / "run", changes))[0]

    with pytest.raises(PmdError, match=r"cannot read .*dino.pth"):
        init_model(config, "", from_scratch=True)
    torch.save({"cls_token": torch.zeros(1)}, path)
    with pytest.raises(PmdError, match="not the weights of a DINO"):
        init_model(config, "", from_scratch=True)


def test_an_image_encoder_can_be_taken_from_dino(datasets, tmp_path):
    changes = {
        "objective.unimodal_init": True,
        "model.init_image": str(tmp_path / "dino.pth"),
        "model.init_text": "",
    }
    config = open_data(small_config(datasets, tmp_path / "run", changes))[0]
    state = {name: tensor.float() for name, tensor in dino(config.model).items()}
    torch.save(state, tmp_path / "dino.pth")

    model = init_model(config, "", from_scratch=True)

    assert torch.equal(model.image.cls, state["cls_token"])
    assert torch.equal(model.image.blocks[1].fc2.weight, state["blocks.1.mlp.fc2.weight"])


def test_a_whole_model_can_be_taken_from_a_folder_of_transformers(
    datasets, uninterrupted, tmp_path
):
    trained = load_trained_model(uninterrupted)
    export_hf(trained.model, tmp_path / "hf")
    config = open_data(
        small_config(datasets, tmp_path / "run", {"model.weights": str(tmp_path / "hf")})
    )[0]

    assert same(
        dict(init_model(config, "", from_scratch=True).state_dict()), weights(uninterrupted)
    )
    other = replace(config, model=replace(config.model, projection_dim=12))
    with pytest.raises(PmdError, match="has projection_dim = 24, and the configuration 12"):
        init_model(other, "", from_scratch=True)


def test_a_run_without_a_loss_starts_from_a_folder_of_transformers(
    datasets, uninterrupted, tmp_path
):
    export_hf(load_trained_model(uninterrupted).model, tmp_path / "hf")
    changes = {"model.weights": str(tmp_path / "hf"), "objective.mmm_text": 0.0}
    config = open_data(small_config(datasets, tmp_path / "run", changes))[0]

    state = init_model(config, "", from_scratch=True).state_dict()

    expected = weights(uninterrupted)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert {name.split(".")[0] for name in expected.keys() - state.keys()} == {"mmm_text_head"}


def test_a_model_trained_without_a_loss_can_be_evaluated_and_exported(datasets, tmp_path):
    changes = {"steps": 3, "objective.mim": 0.0, "objective.mlm": 0.0}
    train(small_config(datasets, tmp_path / "run", changes), quiet=True)

    model = load_trained_model(tmp_path / "run").model
    export_hf(model, tmp_path / "hf")

    assert untrained_heads(load_hf(tmp_path / "hf")) == ["mim", "mlm"]


def test_step_metrics_are_logged_for_the_steps_that_they_measure(datasets, uninterrupted, tmp_path):
    changes = {"metrics.step_metrics": ["itm_accuracy", "mlm_accuracy"]}
    train(small_config(datasets, tmp_path / "run", changes), quiet=True)

    lines = logged_steps(tmp_path / "run")
    names = {"pairs": {"itm_accuracy"}, "texts": {"mlm_accuracy"}, "images": set()}
    assert [line["losses"] for line in lines] == logged_losses(uninterrupted)
    assert all(line.get("metrics", {}).keys() == names[line["stream"]] for line in lines)
    assert {line["stream"] for line in lines} >= {"pairs", "images"}


def test_a_batch_that_cannot_be_split_over_the_ranks_is_refused(datasets, tmp_path, monkeypatch):
    @contextmanager
    def init_ranks(_):
        yield Ranks(1, 3, torch.device("cpu"))

    monkeypatch.setattr("flava_train.train.init_ranks", init_ranks)

    with pytest.raises(PmdError, match="a batch of 8 cannot be split equally over 3 ranks"):
        train(small_config(datasets, tmp_path / "run"), quiet=True)


def test_a_mistake_of_the_user_is_one_line(datasets, tmp_path):
    config = small_config(datasets, tmp_path / "run", {"data.pairs": str(tmp_path / "none.json")})

    refused = run_train(config)

    assert refused.returncode == 2
    assert refused.stderr.startswith("flava-train: ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"compute.shard": True, "compute.recompute": True}])
def test_two_ranks_have_the_losses_of_one_and_one_rank_can_resume(datasets, tmp_path, more):
    changes = {"optimizer.grad_clip_norm": 5.0, "optimizer.schedule": "constant"}
    one = small_config(datasets, tmp_path / "one", changes)
    train(one, quiet=True)
    config = small_config(datasets, tmp_path / "run", changes | more | {"steps": 5})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    done = subprocess.run(
        [*torchrun, *train_command(config)[1:]],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr
    assert load_progress(find_checkpoint(tmp_path / "run")).ranks == 2
    # a checkpoint has full tensors, so one rank can read it
    train(small_config(datasets, tmp_path / "run", changes), quiet=True)
    for ours, theirs in zip(
        logged_steps(tmp_path / "run"), logged_steps(tmp_path / "one"), strict=True
    ):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
