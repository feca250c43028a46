"""The ranks of a run: process group, sums over ranks, sharded parameters.

`torchrun` starts one process for each GPU and numbers them in the environment. Without it there
is one rank, and the functions here return their arguments.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flava_train.config import ComputeConfig
from flava_train.model.flava import Block, Flava, MaskedHead
from flava_train.objective.gather import is_distributed
from flava_train.shapes import Float
from pmd_pipeline.contract.errors import PmdError

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Ranks:
    """The number of this rank, how many there are, and the device of this rank."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and messages."""
        return self.rank == 0


@contextmanager
def init_ranks(compute: ComputeConfig) -> Iterator[Ranks]:
    """Join the process group if `torchrun` started this process; leave it at the end.

    Raises:
        PmdError: there is no GPU for this rank, although the configuration requires one or other
            ranks of this machine have one.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    num_gpus = 0 if compute.device == "cpu" else torch.cuda.device_count()
    # all ranks or none: a rank on a CPU cannot join a group of GPUs
    if local >= num_gpus and (num_gpus or compute.device == "cuda"):
        raise PmdError(
            f"compute.device = {compute.device}, but there are {num_gpus} GPUs for rank {local} "
            "of this machine: start fewer ranks, or set compute.device=cpu"
        )
    device = torch.device("cuda", local) if local < num_gpus else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def sum_over_ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Sums over the ranks, in place."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def broadcast_from_rank_0(number: _Number, device: torch.device) -> _Number:
    """The number that rank 0 passes, on all ranks; it waits until all have called."""
    if not is_distributed():
        return number
    value = torch.tensor(number, dtype=torch.float64, device=device)
    dist.broadcast(value, 0)
    return type(number)(value.item())


def shard_model(model: Flava, device: torch.device) -> None:
    """Shard the parameters of blocks and masked heads over the ranks, along their first axis.

    These are nine tenths of all parameters. The others stay whole on every rank: encoders and
    losses use them without a module's `forward`, where FSDP2 would gather them. Gradients are
    summed, not averaged, as `train_step` does for the others.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in _sharded_modules(model):
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(enable=True)  # gloo has no other
    # it warns of tensor views changed in place; no caller of a head changes one
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


def free_gathered(model: Flava) -> None:
    """Free gathered parameters, which remain after a forward pass without a backward pass."""
    for part in _sharded_modules(model):
        if isinstance(part, FSDPModule):
            part.reshard()


def _sharded_modules(model: Flava) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, Block | MaskedHead)]


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds only a part of it."""
    return isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's part of it; a change in place changes the whole tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, on the device of `pattern` and sharded in the same way."""
    moved = tensor.to(pattern.device)
    if not isinstance(pattern, DTensor):
        return moved
    return distribute_tensor(moved, pattern.device_mesh, pattern.placements, src_data_rank=None)


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor], device: torch.device) -> Float[Tensor, ""]:
    """L2 norm of all gradients together, with all parts of sharded ones."""
    square = _sum_of_squares([one for one in gradients if not is_sharded(one)], device)
    parts = [local_shard(one) for one in gradients if is_sharded(one)]
    if parts:
        square = square + sum_over_ranks(_sum_of_squares(parts, device))
    return square.sqrt()[0]


@torch.no_grad()
def scale_gradients(gradients: Iterable[Tensor], factor: Float[Tensor, ""] | float) -> None:
    """Multiply in place."""
    torch._foreach_mul_([local_shard(gradient) for gradient in gradients], factor)


def _sum_of_squares(gradients: list[Tensor], device: torch.device) -> Float[Tensor, " 1"]:
    if not gradients:
        return torch.zeros(1, device=device)
    norms = torch._foreach_norm(gradients)  # noqa: SLF001  # as torch's own clipping does
    return torch.stack(norms).float().square().sum()[None]
