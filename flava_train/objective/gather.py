"""Exchange of embeddings between ranks, with gradients."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from flava_train.shapes import Float


def is_distributed() -> bool:
    """Whether there are other ranks to exchange with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this rank; 0 without `torch.distributed`."""
    return dist.get_rank() if is_distributed() else 0


def gather_rows(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    *,
    gradients: Literal["global", "local"] = "global",
) -> tuple[Float[Tensor, "all d"], Float[Tensor, "all d"]]:
    """The rows of all ranks, in the order of ranks; one exchange serves both sides.

    Args:
        image: as many rows as on every other rank.
        text: likewise.
        gradients: `global` gives each rank the gradient of all ranks' losses at its rows; `local`
            leaves out what flows through rows of other ranks.
    """
    if not is_distributed():
        return image, text
    both = torch.cat([image, text], dim=1)
    if gradients == "global":
        rows = _GatherRows.apply(both)  # type: ignore[no-untyped-call]  # torch has none here
    else:
        rows = _gathered(both.detach())
        start = rank() * len(both)
        rows = torch.cat([rows[:start], both, rows[start + len(both) :]])
    all_image, all_text = rows.split(image.shape[1], dim=1)
    return all_image, all_text


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; the backward pass sums all ranks' gradients at this rank's rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        """Gather."""
        ctx.num_rows = len(rows)  # type: ignore[attr-defined]  # a context takes any attribute
        return _gathered(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        """Sum over the ranks, and keep this rank's rows."""
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.num_rows  # type: ignore[attr-defined]  # set in forward
        return total[start : start + ctx.num_rows]  # type: ignore[attr-defined]


def _gathered(rows: Float[Tensor, "n d"]) -> Float[Tensor, "all d"]:
    per_rank = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(per_rank, rows.contiguous())
    return torch.cat(per_rank)
