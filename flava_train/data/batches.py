"""Batches: what the loader gives to a training step, and how it is cut into micro-batches.

The loader makes one `PairBatch`, `ImageBatch` or `TextBatch` per step and rank in host memory.
`micro_batches` cuts pairs, `to_device` copies. The configuration fixes all widths, so that a
compiled model sees few shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from flava_train.data.masking import max_masked_tokens
from flava_train.shapes import Bool, Float, Int, Shaped

WIDTHS = (16, 24, 32, 48, 64, 80)
"""Padded widths of captions, each compiled once: multiples of 8; the last holds 77 tokens."""


@dataclass(frozen=True)
class ImageBatch:
    """Images with the patches to predict.

    Args:
        pixels: uint8 RGB, to be normalised on the device; or floats, already normalised.
        masked_positions: masked patches, counted row by row from the top left; 0 is padding.
        codes: image codes of these patches; `IGNORE` is padding.
    """

    pixels: Shaped[Tensor, "b 3 height width"]
    masked_positions: Int[Tensor, "b m"]
    codes: Int[Tensor, "b m"]

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class TextBatch:
    """Tokenized texts with the tokens to predict. A row is `[CLS]`, tokens, `[SEP]`, padding.

    Args:
        tokens: token ids before masking, padded with 0.
        masked_tokens: the same after masking.
        lengths: tokens in each row, `[CLS]` and `[SEP]` included, at least 1.
        masked_positions: positions of the masked tokens in ascending order; 0 is padding.
        labels: token ids before masking at these positions; `IGNORE` is padding.
    """

    tokens: Int[Tensor, "b l"]
    masked_tokens: Int[Tensor, "b l"]
    lengths: Int[Tensor, " b"]
    masked_positions: Int[Tensor, "b w"]
    labels: Int[Tensor, "b w"]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PairBatch:
    """Images with one caption each.

    Args:
        images: row i belongs to row i of `texts`.
        texts: captions.
        matched: false where the caption is another image's (ITM negatives `dataset`).
        image_ids: equal for rows of the same image (50 captions of one Visual Genome image are
            50 pairs), so that none becomes a negative of another.
        uniforms: two random numbers in [0, 1) from `masking.draw_uniforms`, by which the step
            chooses ITM negatives (`batch` and `hard`).
    """

    images: ImageBatch
    texts: TextBatch
    matched: Bool[Tensor, " b"]
    image_ids: Int[Tensor, " b"]
    uniforms: Float[Tensor, "b 2"]

    def __len__(self) -> int:
        return len(self.matched)


_Batch = TypeVar("_Batch", bound=ImageBatch | TextBatch | PairBatch)


def micro_batches(
    pairs: PairBatch, size: int, *, widths: Sequence[int] = WIDTHS
) -> list[PairBatch]:
    """Cut one rank's batch into micro-batches of `size` pairs with captions of similar length.

    The losses do not depend on the order of pairs, so sorting by length removes nearly all padding
    and changes nothing else. The longest captions come first, so that the first micro-batch
    allocates the most memory.

    Args:
        pairs: a batch in host memory, where reading a length needs no synchronisation.
        size: pairs in each micro-batch; the last may be smaller.
        widths: ascending; each micro-batch gets the first that holds its longest caption.

    Raises:
        ValueError: a caption is longer than every width.
    """
    order = torch.argsort(pairs.texts.lengths, descending=True, stable=True)
    cut = []
    for rows in order.split(size):
        micro_batch = select_rows(pairs, rows)
        longest = int(micro_batch.texts.lengths.max())
        width = next((width for width in widths if width >= longest), None)
        if width is None:
            raise ValueError(f"a caption of {longest} tokens fits none of the widths {widths}")
        cut.append(replace(micro_batch, texts=pad_to_width(micro_batch.texts, width)))
    return cut


def select_rows(batch: _Batch, rows: Int[Tensor, " n"]) -> _Batch:
    """A batch of the given rows, in the given order."""
    selected: dict[str, Any] = {}
    for field in fields(batch):
        column = getattr(batch, field.name)
        selected[field.name] = (
            column[rows] if isinstance(column, Tensor) else select_rows(column, rows)
        )
    return replace(batch, **selected)


def pad_to_width(texts: TextBatch, width: int) -> TextBatch:
    """Texts padded or cut to `width` tokens, with as many masked positions as that width allows.

    No row may be longer than `width`.
    """
    most = min(texts.masked_positions.shape[1], max_masked_tokens(width))
    missing = width - texts.tokens.shape[1]  # where negative, padding cuts
    return replace(
        texts,
        tokens=torch.nn.functional.pad(texts.tokens, (0, missing)),
        masked_tokens=torch.nn.functional.pad(texts.masked_tokens, (0, missing)),
        masked_positions=texts.masked_positions[:, :most],
        labels=texts.labels[:, :most],
    )


def to_device(batch: _Batch, device: torch.device | str) -> _Batch:
    """A copy on `device`; the copy is asynchronous if the memory is pinned."""
    moved: dict[str, Any] = {}
    for field in fields(batch):
        column = getattr(batch, field.name)
        if isinstance(column, Tensor):
            moved[field.name] = column.to(device, non_blocking=True)
        else:
            moved[field.name] = to_device(column, device)
    return replace(batch, **moved)
