"""What is trained: which losses count, with which weights, on which streams."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from flava_train.data.needs import DataNeeds, StreamShares
from flava_train.model.flava import HeadFactory
from flava_train.objective.losses import CONTRASTIVE_LOSSES, LOSSES, EmbeddingLoss, Loss


@dataclass(frozen=True)
class ExtraLoss:
    """A loss besides those that have a weight in `Objective`.

    Args:
        function: `module:function` of the user's own, which returns a `Loss` or an
            `EmbeddingLoss`; or a name in `LOSSES`. Empty: the name of this loss, in `LOSSES`.
        weight: of the loss.
        arguments: keyword arguments of the function.
    """

    function: str = ""
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadedLoss(ExtraLoss):
    """The same, with what the function returned."""

    entry: Loss | EmbeddingLoss


@dataclass(frozen=True)
class WeightedLoss:
    """A loss that counts, since its weight is not 0."""

    name: str
    weight: float
    entry: Loss | EmbeddingLoss


@dataclass(frozen=True)
class Objective:
    """Weights of the losses, kinds of contrastive loss and of negatives, streams.

    A loss of weight 0 is not computed, and the model has no head for it.

    Args:
        contrastive: weight of the contrastive loss.
        mmm_image: weight of masked multimodal modelling of patches.
        mmm_text: weight of masked multimodal modelling of tokens.
        itm: weight of image-text matching.
        mim: weight of masked image modelling, on images alone.
        mlm: weight of masked language modelling, on texts alone.
        losses: further losses, by name.
        contrastive_loss: `clip_global` has gradients through the rows of all ranks; `clip_local`
            only through a rank's own rows (the paper's ablation); `siglip` is the sigmoid loss
            (arXiv:2303.15343), with gradients through all rows.
        itm_negatives: where mismatched captions come from. `dataset`: the loader swaps captions,
            and the pairs are mismatched in all losses. `batch`: any caption of the micro-batch.
            `hard`: one of the micro-batch that is similar, as in ALBEF (arXiv:2107.07651). The
            last two are swapped for masked losses only.
        itm_rate: share of pairs that get a mismatched caption.
        streams: probability of each stream.
        unimodal_init: start from DINO's image encoder and from a text encoder trained by MLM.
    """

    contrastive: float = 1.0
    mmm_image: float = 1.0
    mmm_text: float = 1.0
    itm: float = 1.0
    mim: float = 1.0
    mlm: float = 1.0
    losses: Mapping[str, ExtraLoss] = field(default_factory=dict)
    contrastive_loss: Literal["clip_global", "clip_local", "siglip"] = "clip_global"
    itm_negatives: Literal["dataset", "batch", "hard"] = "dataset"
    itm_rate: float = 0.1
    streams: StreamShares = field(default_factory=StreamShares)
    unimodal_init: bool = True

    @cached_property
    def active_losses(self) -> tuple[WeightedLoss, ...]:
        """The losses whose weight is not 0, those with a weight here first.

        Raises:
            TypeError: a further loss was not loaded (`config.load_objective`).
        """
        entries: dict[str, Loss | EmbeddingLoss] = {
            "contrastive": CONTRASTIVE_LOSSES[self.contrastive_loss],
            **LOSSES,
        }
        ours = [
            WeightedLoss(name, getattr(self, name, 0.0), entry) for name, entry in entries.items()
        ]
        return tuple(loss for loss in (*ours, *self._extra_losses()) if loss.weight)

    @property
    def heads(self) -> dict[str, HeadFactory]:
        """What makes the heads of the losses that count, by name of the loss."""
        return {
            loss.name: loss.entry.head
            for loss in self.active_losses
            if isinstance(loss.entry, Loss) and loss.entry.head
        }

    @property
    def uses_fusion(self) -> bool:
        """Whether a loss reads the multimodal encoder."""
        return any(loss.encoder == "multimodal" for loss in self._of_states())

    @property
    def data_needs(self) -> DataNeeds:
        """What the losses need of the data."""
        losses = self._of_states()
        return DataNeeds(
            shares=self.streams,
            codes=frozenset(loss.stream for loss in losses if loss.predicts_codes),
            masks_pairs=any(loss.stream == "pairs" and loss.masked for loss in losses),
            mismatch_rate=self.itm_rate if self.itm and self.itm_negatives == "dataset" else 0.0,
        )

    def _of_states(self) -> list[Loss]:
        return [loss.entry for loss in self.active_losses if isinstance(loss.entry, Loss)]

    def _extra_losses(self) -> list[WeightedLoss]:
        loaded = []
        for name, loss in self.losses.items():
            if not isinstance(loss, LoadedLoss):
                raise TypeError(f"the loss {name} = {loss.function} is not loaded")
            loaded.append(WeightedLoss(name, loss.weight, loss.entry))
        return loaded
