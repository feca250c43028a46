"""The losses of FLAVA, as sums, and the objective that says which of them count.

Every function returns a sum over what it was given; the caller divides by a count over the whole
global batch. So neither micro-batches nor ranks change a loss, and a batch with nothing to
predict gives zero instead of NaN. `docs/model.md` has what the paper leaves open.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  # its name in all of PyTorch's documentation
from torch import Tensor

from flava_train.data.batches import ImageBatch, PairBatch, TextBatch
from flava_train.data.masking import IGNORE
from flava_train.data.needs import DataNeeds, StreamShares
from flava_train.model.flava import Flava
from flava_train.shapes import Bool, Float, Int


@dataclass(frozen=True)
class Objective:
    """What is trained: weights of the losses, kinds of contrast and of negatives, streams.

    Args:
        contrastive: weight of the contrastive loss; what weighs 0 is not computed.
        mmm_image: weight of masked multimodal modelling, patches.
        mmm_text: the same, tokens.
        itm: weight of image-text matching.
        mim: weight of masked image modelling, on images alone.
        mlm: weight of masked language modelling, on texts alone.
        contrast: `global` has gradients through every rank, `local` only through the own rows
            (the paper's ablation), `siglip` is the sigmoid loss (arXiv:2303.15343), global too.
        itm_negatives: whose captions stand in for mismatched ones. `dataset`: the loader's, which
            then count as wrong in all losses. `batch`: any of the micro-batch. `hard`: those of
            the micro-batch that look alike, as in ALBEF (arXiv:2107.07651). The last two are
            only seen by the multimodal encoder.
        itm_rate: share of pairs that get a mismatched caption.
        streams: which batches the losses meet, and how often.
        unimodal_init: start from DINO's image encoder and a text encoder trained by MLM alone.
    """

    contrastive: float = 1.0
    mmm_image: float = 1.0
    mmm_text: float = 1.0
    itm: float = 1.0
    mim: float = 1.0
    mlm: float = 1.0
    contrast: Literal["global", "local", "siglip"] = "global"
    itm_negatives: Literal["dataset", "batch", "hard"] = "dataset"
    itm_rate: float = 0.1
    streams: StreamShares = field(default_factory=StreamShares)
    unimodal_init: bool = True

    @property
    def fuses(self) -> bool:
        """Whether any loss needs the multimodal encoder."""
        return bool(self.mmm_image or self.mmm_text or self.itm)

    @property
    def data_needs(self) -> DataNeeds:
        """What the losses need of the data."""
        predicted = {"pairs": self.mmm_image, "images": self.mim}
        return DataNeeds(
            shares=self.streams,
            codes=frozenset(stream for stream, weight in predicted.items() if weight),
            masks_pairs=self.fuses,
            mismatch_rate=self.itm_rate if self.itm and self.itm_negatives == "dataset" else 0.0,
        )


_ONLY_PAIRS = StreamShares(pairs=1.0, images=0.0, texts=0.0)

ABLATIONS = {
    "mim": Objective(streams=StreamShares(0.0, 1.0, 0.0), unimodal_init=False),
    "mlm": Objective(streams=StreamShares(0.0, 0.0, 1.0), unimodal_init=False),
    "flava_c": Objective(
        mmm_image=0.0, mmm_text=0.0, itm=0.0, streams=_ONLY_PAIRS, unimodal_init=False
    ),
    "flava_mm": Objective(streams=_ONLY_PAIRS, unimodal_init=False),
    "flava_without_init": Objective(unimodal_init=False),
    "flava": Objective(),
}
"""Rows of the paper's ablation, in its order."""


def masked_image_sum(model: Flava, images: ImageBatch) -> Float[Tensor, ""]:
    """MIM: cross-entropy of the codes of masked patches, from the image alone, in nats."""
    hidden = masked_patches(images, model.config.grid**2)
    states = model.image(images.pixels, hidden, at=1 + images.masked_positions)
    return _cross_entropy_sum(model.mim_head(model.image.norm(states)), images.codes)


def masked_text_sum(model: Flava, texts: TextBatch) -> Float[Tensor, ""]:
    """MLM: cross-entropy of masked tokens, from the text alone, in nats."""
    states = model.text(texts.masked_tokens, texts.lengths, at=texts.masked_positions)
    return _cross_entropy_sum(model.mlm_head(model.text.norm(states)), texts.labels)


def masked_pair_sums(
    model: Flava, pairs: PairBatch, objective: Objective
) -> dict[str, Float[Tensor, ""]]:
    """MMM for patches and tokens, over matched pairs, and ITM over all, in nats.

    One pass with both sides masked serves the three, ITM included, as in both public ports.
    """
    images, texts = pairs.images, pairs.texts
    hidden = masked_patches(images, model.config.grid**2)
    image = model.image(images.pixels, hidden)
    text = model.text(texts.masked_tokens, texts.lengths)
    cls = torch.zeros_like(images.masked_positions[:, :1])
    patches = 2 + images.masked_positions  # after [CLS_M] and [CLS_I]
    words = 1 + image.shape[1] + texts.masked_positions
    at = torch.cat([cls, patches, words], dim=1)
    states = model.multimodal(image, text, texts.lengths, at)
    parts = states.split([1, patches.shape[1], words.shape[1]], dim=1)
    # after the cut, so that heads get whole tensors, of one layout whatever the width
    of_cls, of_patches, of_words = map(model.multimodal.norm, parts)
    sums = {}
    if objective.mmm_image:
        codes = only_matched(images.codes, pairs.matched)
        sums["mmm_image"] = _cross_entropy_sum(model.mmm_image_head(of_patches), codes)
    if objective.mmm_text:
        labels = only_matched(texts.labels, pairs.matched)
        sums["mmm_text"] = _cross_entropy_sum(model.mmm_text_head(of_words), labels)
    if objective.itm:
        logits = model.itm_head(of_cls[:, 0])
        sums["itm"] = _cross_entropy_sum(logits, pairs.matched.long())
    return sums


def masked_patches(images: ImageBatch, num_patches: int) -> Bool[Tensor, "b {num_patches}"]:
    """The masked patches as a mask."""
    patch = torch.arange(num_patches, device=images.codes.device)
    hits = (images.masked_positions[..., None] == patch) & (images.codes != IGNORE)[
        ..., None
    ]  # b m n
    return hits.any(1)


def only_matched(labels: Int[Tensor, "b m"], matched: Bool[Tensor, " b"]) -> Int[Tensor, "b m"]:
    """The labels, without those of mismatched pairs, from which nothing true can be learnt."""
    return torch.where(matched[:, None], labels, IGNORE)


def contrastive_sum(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    matched: Bool[Tensor, " n"],
    scale: Float[Tensor, " 1"],
    *,
    through: Literal["global", "local"] = "global",
) -> Float[Tensor, ""]:
    """Mean of image-to-text and text-to-image cross-entropy, summed over matched rows, in nats.

    The columns are the rows of all ranks, those of mismatched pairs included, as further
    negatives. Every rank brings as many rows. The sum of all ranks' gradients is the gradient
    of the sum over the global batch if `through` is `global`; `local` leaves out what flows
    through columns of other ranks.

    Args:
        image: unit vectors.
        text: unit vectors; row i belongs to row i of `image`.
        matched: false for rows that are columns only.
        scale: inverse temperature, already exponentiated.
        through: how far gradients flow.
    """
    all_image, all_text = all_rows(image, text, through=through)
    target = _rank() * len(image) + torch.arange(len(image), device=image.device)
    target = torch.where(matched, target, IGNORE)
    to_text = F.cross_entropy(
        scale * image @ all_text.T, target, ignore_index=IGNORE, reduction="sum"
    )
    to_image = F.cross_entropy(
        scale * text @ all_image.T, target, ignore_index=IGNORE, reduction="sum"
    )
    return (to_text + to_image) / 2


def sigmoid_sum(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    matched: Bool[Tensor, " n"],
    scale: Float[Tensor, " 1"],
    bias: Float[Tensor, " 1"],
) -> Float[Tensor, ""]:
    """SigLIP's loss: every image with every text of all ranks is one yes-or-no question, in nats.

    The answer is yes for row i with text i if they are matched. Divided by the number of pairs,
    as published. Arguments as for `contrastive_sum`.
    """
    _, all_text = all_rows(image, text)
    logits = scale * image @ all_text.T + bias  # n all
    column = torch.arange(logits.shape[1], device=image.device)
    own = _rank() * len(image) + torch.arange(len(image), device=image.device)
    answer = (column == own[:, None]) & matched[:, None]
    return -F.logsigmoid(torch.where(answer, logits, -logits)).sum()


def all_rows(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    *,
    through: Literal["global", "local"] = "global",
) -> tuple[Float[Tensor, "all d"], Float[Tensor, "all d"]]:
    """The rows of all ranks, in the order of ranks; in one exchange for both sides."""
    if not is_distributed():
        return image, text
    both = torch.cat([image, text], dim=1)
    if through == "global":
        everything = _GatherRows.apply(both)  # type: ignore[no-untyped-call]  # torch has none here
    else:
        everything = _gathered(both.detach())
        start = _rank() * len(both)
        everything = torch.cat([everything[:start], both, everything[start + len(both) :]])
    all_image, all_text = everything.split(image.shape[1], dim=1)
    return all_image, all_text


def is_distributed() -> bool:
    """Whether there are other ranks to exchange with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; backward, each rank gets what all ranks' losses say about its rows."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        """Gather."""
        ctx.num_rows = len(rows)  # type: ignore[attr-defined]  # a context takes any attribute
        return _gathered(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        """Add up over the ranks, and keep the own rows."""
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.num_rows  # type: ignore[attr-defined]  # set in forward
        return total[start : start + ctx.num_rows]  # type: ignore[attr-defined]


def _gathered(rows: Float[Tensor, "n d"]) -> Float[Tensor, "all d"]:
    pieces = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, rows.contiguous())
    return torch.cat(pieces)


def _rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def _cross_entropy_sum(
    logits: Float[Tensor, "*b v"], labels: Int[Tensor, "*b"]
) -> Float[Tensor, ""]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.flatten(0, -2).to(wide), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
