"""Two ranks on this machine, over gloo."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import TINY, flava, gradients, images, max_difference, pairs, texts
from user_losses import with_user_losses

from flava_train.config import ComputeConfig
from flava_train.data.batches import select_rows
from flava_train.model.flava import FlavaConfig
from flava_train.objective import step
from flava_train.objective.metrics import STEP_METRICS, MetricSums
from flava_train.objective.objective import Objective
from flava_train.objective.step import train_step
from flava_train.run.ranks import broadcast_from_rank_0, init_ranks
from pmd_pipeline.contract.errors import PmdError

SIGLIP = FlavaConfig(**{**TINY.__dict__, "logit_bias": -10.0})
CASES = {
    "flava": (Objective(), pairs(10, mismatched=(1, 2, 8))),
    "siglip": (Objective(contrastive_loss="siglip"), pairs(10, mismatched=(1, 2, 8))),
    "local": (Objective(contrastive_loss="clip_local"), pairs(10, mismatched=(1, 2, 8))),
    "one side without positives": (Objective(), pairs(10, mismatched=range(5))),
    "mim": (Objective(), images(10)),
    "mlm": (Objective(), texts(10)),
    "a user's losses of pairs": (with_user_losses(Objective()), pairs(10, mismatched=(1, 2, 8))),
    "a user's losses of texts": (with_user_losses(Objective()), texts(10)),
}
METRICS = STEP_METRICS | {"sum": lambda outputs: (outputs.predictions.sum(), torch.zeros(()))}
CUTS = {"whole": ([5], [5]), "uneven": ([2, 3], [4, 1]), "cached on one": ([5], [1, 2, 2])}


def rank(number, folder):
    """Compute each case with each cut; the second rank has the second half of the rows."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    step.BUCKET = 1000  # many buckets
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=number, world_size=2)
    results = {}
    for case, (objective, batch) in CASES.items():
        own = select_rows(batch, torch.arange(5) + 5 * number)
        for name, cuts in CUTS.items():
            model = flava(SIGLIP, heads=objective.heads)
            pieces = [select_rows(own, rows) for rows in torch.arange(5).split(cuts[number])]
            metrics = MetricSums(METRICS, torch.device("cpu"))
            losses = train_step(model, pieces, objective, metrics=metrics)
            results[case, name] = losses, gradients(model), metrics.sums
    cpu = torch.device("cpu")
    results["broadcast"] = [broadcast_from_rank_0(one, cpu) for one in (3 + number, 0.1 + number)]
    torch.save(results, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{number}.pt") for number in range(2)]


def one_rank(case):
    objective, batch = CASES[case]
    model = flava(SIGLIP, heads=objective.heads)
    return train_step(model, [batch], objective), gradients(model)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("case", [case for case in CASES if case != "local"])
def test_two_ranks_give_the_gradient_of_one(results, case, cut):
    losses, expected = one_rank(case)

    (ours, first, _), (theirs, second, _) = (result[case, cut] for result in results)

    assert max_difference(expected, first) < 1e-10
    assert max_difference(first, second) == 0
    assert max_difference(losses, {name: ours[name] + theirs[name] for name in ours}) < 1e-10


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_metrics_of_one(results, case, cut):
    objective, batch = CASES[case]
    metrics = MetricSums(METRICS, torch.device("cpu"))
    train_step(flava(SIGLIP, heads=objective.heads), [batch], objective, metrics=metrics)

    sums = sum(result[case, cut][2] for result in results)

    assert torch.allclose(sums, metrics.sums, rtol=0, atol=1e-9)
    assert metrics.sums.any()


@pytest.mark.parametrize("cut", CUTS)
def test_the_local_contrastive_loss_has_the_same_value_and_another_gradient(results, cut):
    losses, expected = one_rank("local")  # on one rank, local and global are equal

    (ours, first, _), (theirs, _, _) = (result["local", cut] for result in results)

    assert max_difference(losses, {name: ours[name] + theirs[name] for name in ours}) < 1e-10
    assert max_difference(expected, first) > 1e-3
    assert max_difference(results[0]["local", "whole"][1], first) < 1e-10


def test_all_ranks_get_the_number_of_rank_0(results):
    assert [one["broadcast"] for one in results] == [[3, 0.1], [3, 0.1]]
    assert [type(number) for number in results[1]["broadcast"]] == [int, float]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_rank_without_a_gpu_does_not_join_others_that_have_one(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")  # with more, a rank that joined would wait for others

    with (
        pytest.raises(PmdError, match=f"device = {device}, but there are 1 GPUs for rank 1"),
        init_ranks(ComputeConfig(device=device)),
    ):
        pass


def test_without_gpus_all_ranks_are_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "1")

    with init_ranks(ComputeConfig()) as ranks:
        assert ranks.device == torch.device("cpu")
