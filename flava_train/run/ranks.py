"""The processes that learn together: who they are, what they add up, what they share out.

`torchrun` starts one for each GPU and says in the environment which is which. Without it there
is one rank, and nothing here costs anything.
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
from flava_train.objective.losses import is_distributed
from flava_train.shapes import Float
from pmd_pipeline.contract.errors import PmdError

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Ranks:
    """This rank among all of them, and its device. Rank 0 is the one that writes."""

    rank: int
    size: int
    device: torch.device

    @property
    def writes(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0


@contextmanager
def joined(compute: ComputeConfig) -> Iterator[Ranks]:
    """Meet the other ranks that `torchrun` started, if it did.

    Raises:
        PmdError: a GPU is asked for, or other ranks of this machine have one, and there is
            none for this rank.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    num_gpus = 0 if compute.device == "cpu" else torch.cuda.device_count()
    # all ranks or none: one on a CPU could not meet those that have GPUs
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


def total(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Sums over the ranks."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def as_rank_0_has_it(number: _Number, device: torch.device) -> _Number:
    """A number of which rank 0 decides; also a point that all ranks have reached."""
    if not is_distributed():
        return number
    held = torch.tensor(number, dtype=torch.float64, device=device)
    dist.broadcast(held, 0)
    return type(number)(held.item())


def shard(model: Flava, device: torch.device) -> None:
    """Share the blocks and heads out over the ranks, each tensor along its first axis.

    That is nine tenths of the parameters. The rest stays whole on every rank: encoders and
    losses reach into it without passing through a module's `forward`, where FSDP2 would gather
    it. Gradients are added up, not averaged, as `train_step` does for the rest.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in _shared_out(model):
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(enable=True)  # gloo has no other
    # about views changed in place, which no caller of a head does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


def forget_gathered(model: Flava) -> None:
    """Drop gathered parameters, which a forward pass without a backward pass leaves behind."""
    for part in _shared_out(model):
        if isinstance(part, FSDPModule):
            part.reshard()


def _shared_out(model: Flava) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, Block | MaskedHead)]


def is_shared(tensor: Tensor) -> bool:
    """Whether each rank has a part of it only."""
    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank has of it; changed in place, the whole changes."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it. Every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor, on the device of `pattern` and shared out as that one is."""
    there = tensor.to(pattern.device)
    if not isinstance(pattern, DTensor):
        return there
    return distribute_tensor(there, pattern.device_mesh, pattern.placements, src_data_rank=None)


@torch.no_grad()
def gradient_norm(gradients: Sequence[Tensor], device: torch.device) -> Float[Tensor, ""]:
    """Root of the sum of all squares, over what every rank has."""
    square = _square([gradient for gradient in gradients if not is_shared(gradient)], device)
    parts = [own_part(gradient) for gradient in gradients if is_shared(gradient)]
    if parts:
        square = square + total(_square(parts, device))
    return square.sqrt()[0]


@torch.no_grad()
def scale(gradients: Iterable[Tensor], factor: Float[Tensor, ""] | float) -> None:
    """Multiply in place."""
    torch._foreach_mul_([own_part(gradient) for gradient in gradients], factor)


def _square(gradients: list[Tensor], device: torch.device) -> Float[Tensor, " 1"]:
    if not gradients:
        return torch.zeros(1, device=device)
    norms = torch._foreach_norm(gradients)  # noqa: SLF001  # as torch's own clipping does
    return torch.stack(norms).float().square().sum()[None]
