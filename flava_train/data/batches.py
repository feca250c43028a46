"""What a loader hands to a training step, and how a batch is cut into micro-batches.

A loader builds one `PairBatch`, `ImageBatch` or `TextBatch` per step and rank in host memory, cuts
pairs with `micro_batches`, and copies the micro-batches with `to_device`. All widths are fixed by
the configuration, so that a compiled model sees few shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from flava_train.data.masking import max_masked_tokens
from flava_train.shapes import Bool, Float, Int, Shaped

WIDTHS = (16, 24, 32, 48, 64, 80)
"""Caption widths that get compiled: multiples of 8, of which the last holds the usual 77."""


@dataclass(frozen=True)
class ImageBatch:
    """Images with the patches to be predicted.

    Args:
        pixels: uint8 RGB as decoded, normalised on the device; or floats, already normalised.
        masked_positions: numbers of the masked patches, row by row from the top left; 0 as padding.
        codes: the image tokenizer's codes of these patches; `IGNORE` marks padding.
    """

    pixels: Shaped[Tensor, "b 3 height width"]
    masked_positions: Int[Tensor, "b m"]
    codes: Int[Tensor, "b m"]

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class TextBatch:
    """Tokenized texts, `[CLS]` first, `[SEP]` last, then padding, with the tokens to be predicted.

    Args:
        tokens: as written, padded with 0.
        masked_tokens: the same after masking.
        lengths: tokens in each row, `[CLS]` and `[SEP]` included, at least 1.
        masked_positions: positions of the masked tokens, from the left; 0 as padding.
        labels: the tokens that stood there; `IGNORE` marks padding.
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
        matched: false where the loader put another image's caption (ITM negatives `dataset`).
        image_ids: equal for rows that show the same image (50 captions of one Visual Genome
            image are 50 pairs), so that none becomes the other's negative.
        uniforms: two numbers in [0, 1) from `masking.draw_uniforms`, with which the step draws
            negatives (ITM negatives `batch` and `hard`).
    """

    images: ImageBatch
    texts: TextBatch
    matched: Bool[Tensor, " b"]
    image_ids: Int[Tensor, " b"]
    uniforms: Float[Tensor, "b 2"]

    def __len__(self) -> int:
        return len(self.matched)


_Kind = TypeVar("_Kind", bound=ImageBatch | TextBatch | PairBatch)


def micro_batches(
    pairs: PairBatch, size: int, *, widths: Sequence[int] = WIDTHS
) -> list[PairBatch]:
    """Cut one rank's batch into micro-batches of `size` pairs, with captions of about one length.

    The losses do not depend on the order of pairs, so sorting them by length costs nothing and
    removes nearly all padding. Longest first: memory is claimed once.

    Args:
        pairs: a batch in host memory, since shapes must be known there.
        size: pairs in each micro-batch; the last may be smaller.
        widths: ascending; each micro-batch has the first that holds its longest caption.

    Raises:
        ValueError: a caption is longer than every width.
    """
    order = torch.argsort(pairs.texts.lengths, descending=True, stable=True)
    pieces = []
    for rows in order.split(size):
        piece = select_rows(pairs, rows)
        longest = int(piece.texts.lengths.max())
        width = next((width for width in widths if width >= longest), None)
        if width is None:
            raise ValueError(f"a caption of {longest} tokens fits none of the widths {widths}")
        pieces.append(replace(piece, texts=pad_to_width(piece.texts, width)))
    return pieces


def select_rows(batch: _Kind, rows: Int[Tensor, " n"]) -> _Kind:
    """Copy the given rows, in the given order."""
    taken: dict[str, Any] = {}
    for field in fields(batch):
        column = getattr(batch, field.name)
        taken[field.name] = (
            column[rows] if isinstance(column, Tensor) else select_rows(column, rows)
        )
    return replace(batch, **taken)


def pad_to_width(texts: TextBatch, width: int) -> TextBatch:
    """Cut or pad rows to `width` tokens, and their masked ones to as many as that may have.

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


def to_device(batch: _Kind, device: torch.device | str) -> _Kind:
    """Copy to `device`; without waiting for it, where memory is pinned."""
    moved: dict[str, Any] = {}
    for field in fields(batch):
        column = getattr(batch, field.name)
        if isinstance(column, Tensor):
            moved[field.name] = column.to(device, non_blocking=True)
        else:
            moved[field.name] = to_device(column, device)
    return replace(batch, **moved)
