import json
import sys
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny import TINY, images, pairs, texts
from torch.utils.flop_counter import FlopCounterMode
from trials import small_config, write_datasets
from user_losses import with_user_losses

from flava_train.data.batches import micro_batches
from flava_train.model.flava import Flava
from flava_train.objective.objective import Objective
from flava_train.objective.step import train_step
from flava_train.run import flops, loggers
from flava_train.run.flops import FlopCounter, peak_of
from flava_train.run.loggers import (
    METRICS,
    RunLogger,
    Terminal,
    external_loggers,
    flat_numbers,
    truncate_metrics,
)
from flava_train.train import train
from pmd_pipeline.contract.errors import PmdError

STEP = {"step": 0, "stream": "pairs", "losses": {"itm": 0.7, "mlm": 3.0}, "grad_norm": 2.0}


def lines(*metrics):
    return "".join(json.dumps(one) + "\n" for one in metrics)


def test_lines_of_steps_that_are_repeated_are_removed(tmp_path):
    path = tmp_path / METRICS
    kept = [{"step": 0}, {"step": 1}, {"after": 2, "r1": 0.5}]
    path.write_text(lines(*kept, {"step": 2}, {"step": 3}, {"after": 4}))

    truncate_metrics(path, 2)

    assert path.read_text() == lines(*kept)


@pytest.mark.parametrize("partial", ['{"step": 1, "los', '{"step": 1}', "\0\0\0\0", "5\n", "[]\n"])
def test_a_partial_line_is_removed(tmp_path, partial):
    path = tmp_path / METRICS
    path.write_text(lines({"step": 0}) + partial)

    truncate_metrics(path, 9)

    assert path.read_text() == lines({"step": 0})


def test_a_first_run_has_no_lines_to_remove(tmp_path):
    truncate_metrics(tmp_path / METRICS, 0)

    assert not (tmp_path / METRICS).exists()


def test_the_line_of_an_evaluation_without_a_checkpoint_is_removed(tmp_path):
    path = tmp_path / METRICS
    path.write_text(lines({"step": 0}, {"after": 1, "r1": 0.5}))

    truncate_metrics(path, 0)

    assert path.read_text() == ""


def printed(steps, *metrics, is_terminal=False):
    out = StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=200, color_system=None)
    terminal = Terminal(steps, console)
    for one in metrics:
        terminal.log(one)
    terminal.close()
    return out.getvalue()


def test_without_a_terminal_there_is_a_line_every_few_seconds():
    output = printed(9, *({**STEP, "step": step} for step in range(5)))

    assert output.splitlines()[0].startswith("step 1 of 9, itm 0.7000, mlm 3.0000, grad norm 2.000")
    assert output.splitlines()[-1].startswith("step 5 of 9")
    assert len(output.splitlines()) == 2


def test_a_terminal_shows_the_losses_of_all_streams():
    output = printed(
        9, STEP, {"step": 1, "stream": "images", "losses": {"mim": 4.0}}, is_terminal=True
    )

    assert "itm 0.7000, mlm 3.0000, mim 4.0000" in output.splitlines()[-1]


def test_a_terminal_shows_the_metrics_of_all_streams():
    steps = [
        {**STEP, "metrics": {"itm_accuracy": 0.25}},
        {"step": 1, "stream": "texts", "losses": {}, "metrics": {"mlm_accuracy": 0.5}},
    ]

    output = printed(9, *steps)

    assert "itm_accuracy 0.2500, mlm_accuracy 0.5000" in output.splitlines()[-1]


def test_an_evaluation_is_printed_with_chance():
    metrics = {"after": 1000, "text_to_image_r1": 0.5, "chance": {"text_to_image_r1": 0.01}}

    output = printed(9, metrics)

    assert "after 1,000 steps: text to image r1 0.5000 (chance 0.0100)" in output


def test_only_rank_0_logs(tmp_path):
    config = small_config(tmp_path, tmp_path / "run")

    logger = RunLogger(tmp_path, config, 0, quiet=False, is_main=False)
    logger.log(STEP)
    logger.print("nothing")
    logger.sync()
    logger.close()

    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_number_of_a_step(tmp_path, monkeypatch):
    calls = []
    writer = SimpleNamespace(
        add_scalar=lambda *point: calls.append(point), close=lambda: calls.append("closed")
    )
    made = []
    module = SimpleNamespace(SummaryWriter=lambda *w, **more: made.append((w, more)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(loggers, "find_spec", lambda name: name == "tensorboard")

    [logger] = external_loggers(tmp_path, small_config(tmp_path, "run"), 5)
    logger.log(STEP)
    logger.log({"after": 4, "r1": 0.5, "chance": {"r1": 0.1}})
    logger.close()

    assert made == [((str(tmp_path / "tensorboard"),), {"purge_step": 5})]
    assert calls == [
        ("losses/itm", 0.7, 0),
        ("losses/mlm", 3.0, 0),
        ("grad_norm", 2.0, 0),
        ("r1", 0.5, 4),
        ("chance/r1", 0.1, 4),
        "closed",
    ]


def test_a_resumed_run_continues_its_run_of_wandb(tmp_path, monkeypatch):
    started, logged = [], []
    wandb_run = SimpleNamespace(
        id="abc", log=lambda metrics, step: logged.append((metrics, step)), finish=lambda: None
    )
    module = SimpleNamespace(init=lambda **more: started.append(more) or wandb_run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(loggers, "find_spec", lambda name: name == "wandb")
    config = small_config(tmp_path, "run", {"metrics.wandb": "flava"})

    for _ in range(2):
        [logger] = external_loggers(tmp_path, config, 0)
        logger.log(STEP)
        logger.close()

    assert [more["id"] for more in started] == [None, "abc"]
    assert started[0]["project"] == "flava"
    assert started[0]["config"]["steps"] == 8
    assert logged[0] == ({"losses.itm": 0.7, "losses.mlm": 3.0, "grad_norm": 2.0}, 0)


def test_a_logger_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda _: None)

    assert external_loggers(tmp_path, small_config(tmp_path, "run"), 0) == []
    with pytest.raises(PmdError, match="wandb is not installed"):
        external_loggers(tmp_path, small_config(tmp_path, "run", {"metrics.wandb": "flava"}), 0)


def test_only_numbers_are_drawn():
    assert flat_numbers({"step": 1, "stream": "pairs", "updated": True, "a": {"b": 2}}) == {
        "updated": True,
        "a.b": 2,
    }


@pytest.mark.parametrize("make", [pairs, images, texts])
def test_counted_operations_are_those_of_a_step(make):
    objective = Objective()
    batch = make(6)
    model = Flava(TINY).double()
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        train_step(model, [batch], objective)

    counted = FlopCounter(TINY, objective).count([batch])

    # logits of the contrastive loss, forward and backward, are not counted
    logits = 3 * 2 * 2 * 6 * 6 * TINY.projection_dim if make is pairs else 0
    assert counted + logits == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_losses_of_the_users_own_count_no_operations():
    with_them = FlopCounter(TINY, with_user_losses(Objective()))
    only_them = FlopCounter(TINY, with_user_losses(Objective(mim=0.0)))

    assert with_them.count([images(4)]) == FlopCounter(TINY, Objective()).count([images(4)]) > 0
    assert only_them.count([images(4)]) == 0


def test_operations_of_micro_batches_add_up_and_each_width_is_counted_once(monkeypatch):
    batch = pairs(8, lengths=[16, 16, 15, 14, 9, 8, 7, 3])
    pieces = micro_batches(batch, 2, widths=(8, 16))
    counter = FlopCounter(TINY, Objective(mmm_text=0.0))

    both = counter.count(pieces)

    assert both == sum(counter.count([piece]) for piece in pieces)
    assert len(counter._per_row) == 2


def test_a_card_has_the_peak_of_the_first_name_that_matches(monkeypatch):
    cards = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA GH200": 989, "X": None}
    for card, peak in cards.items():
        monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda _, card=card: card)

        assert peak_of(torch.device("cuda")) == peak
    assert peak_of(torch.device("cpu")) is None


def test_a_run_logs_its_utilisation_of_a_known_peak(tmp_path):
    datasets = write_datasets(tmp_path)
    config = small_config(datasets, tmp_path / "run", {"metrics.peak": 0.001, "steps": 3})

    train(config, quiet=True)

    logged = (tmp_path / "run" / METRICS).read_text().splitlines()
    assert len(logged) == 3
    assert all(0 < json.loads(line)["mfu"] < 10 for line in logged)
