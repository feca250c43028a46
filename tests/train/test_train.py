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
from trials import command, losses, run, said, told, write_world

from flava_train import trainer as learner
from flava_train.config import OptimizerConfig, validate_config
from flava_train.data.loader import load_batches
from flava_train.evaluation.trained_model import load_trained_model
from flava_train.model.flava import Flava
from flava_train.model.hf import export_hf, load_hf, untrained_heads
from flava_train.run.checkpoint import find_checkpoint, load_progress
from flava_train.run.init import init_model, read_tensors
from flava_train.run.optimizer import adamw, learning_rate
from flava_train.run.ranks import Ranks
from flava_train.run.run_dir import lock_run_dir
from flava_train.train import open_data, train
from pmd_pipeline.contract.errors import PmdError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """A run of eight steps that nobody disturbed."""
    config = told(world, tmp_path_factory.mktemp("alone") / "run")
    train(config, quiet=True)
    return Path(config.out)


def weights(place):
    return read_tensors(find_checkpoint(place) / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SHORT = OptimizerConfig(lr=8e-4, warmup=10, end=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule_meets_its_ends_exactly(schedule):
    config = replace(SHORT, schedule=schedule)

    assert learning_rate(config, 0, 100) == 8e-5
    assert learning_rate(config, 9, 100) == 8e-4
    assert learning_rate(config, 100, 100) == 1e-5
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_half_way_down_the_schedule_is_half_way(schedule):
    config = replace(SHORT, schedule=schedule, warmup=11)

    assert learning_rate(config, 60, 110) == pytest.approx((8e-4 + 1e-5) / 2, rel=1e-12)
    assert learning_rate(config, 11, 110) < 8e-4  # it comes down at once


def test_a_constant_schedule_stays_at_the_top():
    config = replace(SHORT, schedule="constant")

    assert {learning_rate(config, step, 100) for step in range(9, 100)} == {8e-4}


def test_only_weights_of_linear_layers_are_decayed():
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


def test_all_parameters_are_decayed_if_told_so():
    optimizer = adamw(Flava(TINY), OptimizerConfig(weight_decay=0.1, decay_all=True))

    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}


def test_losses_begin_where_guessing_leaves_them(alone):
    seen = {name: loss for one in reversed(losses(alone)) for name, loss in one.items()}

    assert seen["contrastive"] == pytest.approx(math.log(8), abs=0.3)
    assert seen["mmm_image"] == pytest.approx(math.log(67), abs=0.3)
    assert seen["itm"] == pytest.approx(math.log(2), abs=0.3)


def test_every_step_is_told_once(alone):
    assert [line["step"] for line in said(alone)] == list(range(8))


def test_micro_batches_change_memory_and_not_losses(world, alone, tmp_path):
    config = told(world, tmp_path / "run", {"micro_batch_size": 3})

    train(config, quiet=True)

    for ours, theirs in zip(losses(tmp_path / "run"), losses(alone), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_recomputing_activations_changes_nothing(world, alone, tmp_path):
    train(told(world, tmp_path / "run", {"compute.recompute": True}), quiet=True)

    assert losses(tmp_path / "run") == losses(alone)


COMPILED = """
import sys
import time

sys.path.insert(0, {here!r})
import torch
from tiny import farthest, flava, gradients, pairs

from flava_train.objective.objective import Objective
from flava_train.objective.step import train_step

plain, model = flava(), flava()
for encoder in (model.image, model.text, model.multimodal):
    encoder.recompute = True
model.compile_regions(backend="aot_eager")
for one in (plain, model):
    train_step(one, [pairs(4)], Objective())
print(farthest(gradients(plain), gradients(model)) < 1e-10)
"""


@pytest.mark.slow
def test_blocks_may_be_recomputed_and_compiled():
    script = COMPILED.format(here=str(Path(__file__).parent))

    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )

    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_about_the_same(world, alone, tmp_path, monkeypatch, precision):
    monkeypatch.setattr("flava_train.train.FIRST_LOSS_SCALE", 8.0)  # embeddings begin very alike
    train(told(world, tmp_path / "run", {"compute.precision": precision}), quiet=True)

    for ours, theirs in zip(losses(tmp_path / "run"), losses(alone), strict=True):
        assert ours == pytest.approx(theirs, abs=0.05)


def test_an_overflow_of_float16_is_passed_over(world, tmp_path, monkeypatch):
    monkeypatch.setattr("flava_train.train.FIRST_LOSS_SCALE", 2.0**60)
    config = told(world, tmp_path / "run", {"compute.precision": "fp16", "steps": 3})

    train(config, quiet=True)

    lines = said(tmp_path / "run")
    assert [line["updated"] for line in lines] == [False, False, False]
    assert [line["loss_scale"] for line in lines] == [2.0**59, 2.0**58, 2.0**57]
    fresh = init_model(open_data(config)[0], "", from_scratch=True)
    assert same(weights(tmp_path / "run"), dict(fresh.state_dict()))


def test_the_loss_scale_doubles_after_enough_good_steps(world, tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "LOSS_SCALE_STEPS", 2)
    monkeypatch.setattr("flava_train.train.FIRST_LOSS_SCALE", 8.0)

    train(told(world, tmp_path / "run", {"compute.precision": "fp16", "steps": 5}), quiet=True)

    assert [line["loss_scale"] for line in said(tmp_path / "run")] == [
        8.0,
        16.0,
        16.0,
        32.0,
        32.0,
    ]


def test_a_loss_scale_that_came_down_to_1_stays_there(world, tmp_path, monkeypatch):
    monkeypatch.setattr("flava_train.train.FIRST_LOSS_SCALE", 1.0)
    changes = {"compute.precision": "fp16", "steps": 3}
    train(told(world, tmp_path / "run", changes), quiet=True)
    monkeypatch.setattr("flava_train.train.FIRST_LOSS_SCALE", 8.0)

    train(told(world, tmp_path / "run", changes | {"steps": 5}), quiet=True)

    assert [line["loss_scale"] for line in said(tmp_path / "run")] == [1.0] * 5
    assert load_progress(find_checkpoint(tmp_path / "run")).good_steps == 5


@pytest.mark.parametrize("before", ["fp16", "fp32"])
def test_a_loss_scale_begins_where_the_precision_changes_to_float16(
    world, tmp_path, monkeypatch, before
):
    monkeypatch.setattr("flava_train.train.FIRST_LOSS_SCALE", 8.0)
    steps = {"fp16": "fp32", "fp32": "fp16"}
    train(told(world, tmp_path / "run", {"compute.precision": before, "steps": 3}), quiet=True)

    after = {"compute.precision": steps[before], "steps": 4}
    train(told(world, tmp_path / "run", after), quiet=True)

    last = load_progress(find_checkpoint(tmp_path / "run"))
    assert (last.loss_scale, last.good_steps) == ((1.0, 0) if before == "fp16" else (8.0, 1))


def test_a_gradient_is_clipped_to_its_greatest_norm(world, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def noted(self, *rest):
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)

    train(told(world, tmp_path / "run", {"optimizer.grad_clip_norm": 0.5}), quiet=True)

    assert norms == pytest.approx([min(0.5, line["grad_norm"]) for line in said(tmp_path / "run")])
    assert max(line["grad_norm"] for line in said(tmp_path / "run")) > 0.5


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the losses of the given call of `train_step` NaN."""

    def poison(at):
        real, calls = learner.train_step, []

        def step(*rest, **more):
            found = real(*rest, **more)
            calls.append(1)
            return {n: loss * math.nan for n, loss in found.items()} if len(calls) == at else found

        monkeypatch.setattr(learner, "train_step", step)

    return poison


def test_nan_stops_before_the_update_and_names_the_keys(world, tmp_path, poisoned):
    config = told(world, tmp_path / "run", {"checkpoint.every": 100})
    poisoned(6)

    with pytest.raises(PmdError, match=r"step 5: .* not finite") as caught:
        train(config, quiet=True)

    found = json.loads((tmp_path / "run" / "not-finite-5.json").read_text())
    _, streams = open_data(config)
    assert found["keys"] == [row.key for row in streams.describe(5)]
    assert found["keys"][0] in str(caught.value)
    assert "skip_steps=[5]" in str(caught.value)
    assert find_checkpoint(tmp_path / "run").name == "step-00000005"


def test_nan_in_a_batch_of_one_names_its_key(world, tmp_path, poisoned):
    config = told(world, tmp_path / "run", {"batch": 1, "micro_batch_size": 1})
    poisoned(1)

    with pytest.raises(PmdError, match=r"step 0: .* not finite") as caught:
        train(config, quiet=True)

    (key,) = json.loads((tmp_path / "run" / "not-finite-0.json").read_text())["keys"]
    assert f" {key} not finite" in str(caught.value)


def test_learning_goes_on_after_nan_as_if_nothing_had_been(world, alone, tmp_path, poisoned):
    config = told(world, tmp_path / "run")
    poisoned(6)
    with pytest.raises(PmdError):
        train(config, quiet=True)

    train(config, quiet=True)

    assert said(tmp_path / "run") == said(alone)


def test_an_infinite_gradient_is_refused_too(world, tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "gradient_norm", lambda *_: torch.tensor(math.inf))

    with pytest.raises(PmdError, match="step 0: grad_norm"):
        train(told(world, tmp_path / "run"), quiet=True)


def test_a_step_can_be_passed_over(world, alone, tmp_path):
    train(told(world, tmp_path / "run", {"skip_steps": [2], "steps": 4}), quiet=True)

    lines = said(tmp_path / "run")
    assert lines[2] == {"step": 2, "stream": said(alone)[2]["stream"], "skipped": True}
    assert lines[1]["losses"] == losses(alone)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_a_step_saves_after_it(
    world, alone, tmp_path, monkeypatch, number
):
    real, calls = learner.train_step, []

    def step(*rest, **more):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return real(*rest, **more)

    monkeypatch.setattr(learner, "train_step", step)
    config = told(world, tmp_path / "run")

    outcome = train(config, quiet=True)

    assert (outcome.steps, outcome.signal) == (2, number)
    assert find_checkpoint(tmp_path / "run").name == "step-00000002"
    assert train(config, quiet=True).signal is None
    assert said(tmp_path / "run") == said(alone)
    assert same(weights(tmp_path / "run"), weights(alone))


def test_what_a_step_saw_can_be_explained(world, tmp_path):
    config, streams = open_data(told(world, tmp_path / "run"))

    for batch in load_batches(streams, 0, 8):
        rows = streams.describe(batch.step)
        assert [row.key for row in rows] == batch.keys
        if batch.stream == "pairs":
            texts = [row.text for row in rows]
            assert [row.matched for row in rows] == batch.rows.matched.tolist()
        elif batch.stream == "texts":
            texts = [row.text for row in rows]
        else:
            continue
        encode = (
            streams.wordpiece.encode
            if batch.stream == "pairs"
            else (streams.wordpiece.encode_documents)
        )
        tokens = batch.rows.texts.tokens if batch.stream == "pairs" else batch.rows.tokens
        expected, _ = encode(texts, tokens.shape[1])
        assert torch.equal(tokens, torch.from_numpy(expected))
    assert config.model.text_vocab == len(streams.wordpiece.vocabulary)


def test_two_runs_do_not_write_into_one_folder(world, tmp_path):
    with lock_run_dir(tmp_path / "run"), pytest.raises(PmdError, match="another flava-train"):
        train(told(world, tmp_path / "run"), quiet=True)


def test_a_run_that_is_gone_is_not_held_by_the_workers_it_leaves(tmp_path):
    fork = multiprocessing.get_context("fork")
    runs = fork.Event()
    with lock_run_dir(tmp_path / "run"):
        worker = fork.Process(target=lambda: (runs.set(), time.sleep(60)))
        worker.start()
        assert runs.wait(30)
        with pytest.raises(PmdError, match="another"), lock_run_dir(tmp_path / "run"):
            pass
    try:
        with lock_run_dir(tmp_path / "run"):
            assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()


def test_vocabularies_are_as_large_as_the_data_says(world, tmp_path, alone):
    config = validate_config(load_progress(find_checkpoint(alone)).config, source="there")

    assert config.model.image_vocab == 67
    assert config.model.text_vocab == len((alone / "vocab.txt").read_text().splitlines())


def test_unimodal_encoders_must_be_named(world, tmp_path):
    config = told(world, tmp_path / "run", {"objective.unimodal_init": True})

    with pytest.raises(PmdError, match="name DINO's file"):
        train(config, quiet=True)


def test_a_text_encoder_comes_from_its_own_run(world, alone, tmp_path):
    changes = {
        "objective.unimodal_init": True,
        "model.init_image": "",
        "model.init_text": str(alone),
    }
    config, streams = open_data(told(world, tmp_path / "run", changes))

    model = init_model(config, streams.digests["tokenizer"], from_scratch=True)

    theirs = weights(alone)
    ours = model.state_dict()
    assert all(
        torch.equal(ours[n], theirs[n]) == n.startswith("text.") for n in ours if "words" in n
    )
    assert not torch.equal(ours["image.patches.weight"], theirs["image.patches.weight"])
    with pytest.raises(PmdError, match="has another tokenizer"):
        init_model(config, "other", from_scratch=True)


def test_a_whole_model_comes_from_a_run(world, alone, tmp_path):
    config = open_data(told(world, tmp_path / "run", {"model.weights": str(alone)}))[0]

    assert same(dict(init_model(config, "", from_scratch=True).state_dict()), weights(alone))


def test_an_image_encoder_comes_from_a_file_that_runs_no_code(world, tmp_path):
    path = tmp_path / "dino.pth"
    torch.save({"cls_token": torch.zeros(1), "more": os.system}, path)
    changes = {
        "objective.unimodal_init": True,
        "model.init_image": str(path),
        "model.init_text": "",
    }
    config = open_data(told(world, tmp_path / "run", changes))[0]

    with pytest.raises(PmdError, match=r"cannot read .*dino.pth"):
        init_model(config, "", from_scratch=True)
    torch.save({"cls_token": torch.zeros(1)}, path)
    with pytest.raises(PmdError, match="not the weights of a DINO"):
        init_model(config, "", from_scratch=True)


def test_an_image_encoder_comes_from_dino(world, tmp_path):
    changes = {
        "objective.unimodal_init": True,
        "model.init_image": str(tmp_path / "dino.pth"),
        "model.init_text": "",
    }
    config = open_data(told(world, tmp_path / "run", changes))[0]
    state = {name: tensor.float() for name, tensor in dino(config.model).items()}
    torch.save(state, tmp_path / "dino.pth")

    model = init_model(config, "", from_scratch=True)

    assert torch.equal(model.image.cls, state["cls_token"])
    assert torch.equal(model.image.blocks[1].fc2.weight, state["blocks.1.mlp.fc2.weight"])


def test_a_whole_model_comes_from_a_folder_of_transformers(world, alone, tmp_path):
    trained = load_trained_model(alone)
    export_hf(trained.model, tmp_path / "hf")
    config = open_data(told(world, tmp_path / "run", {"model.weights": str(tmp_path / "hf")}))[0]

    assert same(dict(init_model(config, "", from_scratch=True).state_dict()), weights(alone))
    other = replace(config, model=replace(config.model, projection_dim=12))
    with pytest.raises(PmdError, match="has projection_dim = 24, and the configuration 12"):
        init_model(other, "", from_scratch=True)


def test_a_run_without_a_loss_starts_from_a_folder_of_transformers(world, alone, tmp_path):
    export_hf(load_trained_model(alone).model, tmp_path / "hf")
    changes = {"model.weights": str(tmp_path / "hf"), "objective.mmm_text": 0.0}
    config = open_data(told(world, tmp_path / "run", changes))[0]

    state = init_model(config, "", from_scratch=True).state_dict()

    expected = weights(alone)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert {name.split(".")[0] for name in expected.keys() - state.keys()} == {"mmm_text_head"}


def test_a_model_trained_without_a_loss_can_be_evaluated_and_exported(world, tmp_path):
    changes = {"steps": 3, "objective.mim": 0.0, "objective.mlm": 0.0}
    train(told(world, tmp_path / "run", changes), quiet=True)

    model = load_trained_model(tmp_path / "run").model
    export_hf(model, tmp_path / "hf")

    assert untrained_heads(load_hf(tmp_path / "hf")) == ["mim", "mlm"]


def test_step_metrics_are_logged_for_the_steps_that_they_measure(world, alone, tmp_path):
    changes = {"metrics.step_metrics": ["itm_accuracy", "mlm_accuracy"]}
    train(told(world, tmp_path / "run", changes), quiet=True)

    lines = said(tmp_path / "run")
    names = {"pairs": {"itm_accuracy"}, "texts": {"mlm_accuracy"}, "images": set()}
    assert [line["losses"] for line in lines] == losses(alone)
    assert all(line.get("metrics", {}).keys() == names[line["stream"]] for line in lines)
    assert {line["stream"] for line in lines} >= {"pairs", "images"}


def test_a_batch_that_cannot_be_split_over_the_ranks_is_refused(world, tmp_path, monkeypatch):
    @contextmanager
    def init_ranks(_):
        yield Ranks(1, 3, torch.device("cpu"))

    monkeypatch.setattr("flava_train.train.init_ranks", init_ranks)

    with pytest.raises(PmdError, match="a batch of 8 cannot be split equally over 3 ranks"):
        train(told(world, tmp_path / "run"), quiet=True)


def test_a_mistake_of_the_user_is_one_line(world, tmp_path):
    config = told(world, tmp_path / "run", {"data.pairs": str(tmp_path / "none.json")})

    refused = run(config)

    assert refused.returncode == 2
    assert refused.stderr.startswith("flava-train: ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"compute.shard": True, "compute.recompute": True}])
def test_two_ranks_learn_what_one_does_and_one_goes_on(world, tmp_path, more):
    changes = {"optimizer.grad_clip_norm": 5.0, "optimizer.schedule": "constant"}
    one = told(world, tmp_path / "one", changes)
    train(one, quiet=True)
    config = told(world, tmp_path / "run", changes | more | {"steps": 5})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    done = subprocess.run(
        [*torchrun, *command(config)[1:]],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr
    assert load_progress(find_checkpoint(tmp_path / "run")).ranks == 2
    train(told(world, tmp_path / "run", changes), quiet=True)  # whole, however it was shared out
    for ours, theirs in zip(said(tmp_path / "run"), said(tmp_path / "one"), strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
