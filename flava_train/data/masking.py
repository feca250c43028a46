"""Which patches and tokens are masked: pure functions of (seed, sample number), for whole batches.

The masks of a sample depend neither on its neighbours in the batch nor on the worker, so a resumed
run, or one with more ranks, masks the same patches and tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flava_train.shapes import Array, Bool, Float, Int, UInt

IGNORE = -100
"""Label of padding: no loss."""

TOKEN_MASK_RATIO = 0.15
"""Share of a text's tokens that are masked, as in BERT."""


@dataclass(frozen=True)
class PatchMasking:
    """BEiT's blockwise masking (arXiv:2106.08254, algorithm 1), as FLAVA uses it.

    Args:
        grid: patches along each side, at most 64.
        num_masked: patches to mask; a few images get fewer, none gets more.
        min_block: least patches that a block aims at.
        min_aspect: least aspect ratio of a block; the greatest is its inverse.
        attempts: tries for one block before masking ends with the blocks so far.
    """

    grid: int = 14
    num_masked: int = 75
    min_block: int = 16
    min_aspect: float = 0.3
    attempts: int = 10

    @classmethod
    def for_grid(cls, grid: int) -> "PatchMasking":
        """FLAVA's masking of 14 by 14 patches, with numbers of patches in proportion to the grid's.

        >>> PatchMasking.for_grid(28).num_masked
        300
        """
        paper = cls()
        factor = (grid / paper.grid) ** 2
        num_masked = max(1, round(paper.num_masked * factor))
        min_block = max(1, round(paper.min_block * factor))
        return cls(grid=grid, num_masked=num_masked, min_block=min_block)


@dataclass(frozen=True)
class TokenMasking:
    """BERT's masking: of the selected tokens, 80 % become `[MASK]`, 10 % any token, 10 % stay.

    Args:
        vocabulary_size: replacements are drawn from token ids below it.
        mask_id: token id of `[MASK]`.
        never: token ids that are never selected: padding and the other special tokens.
    """

    vocabulary_size: int = 30_522
    mask_id: int = 103
    never: tuple[int, ...] = (0, 100, 101, 102, 103)


def mask_patches(
    seed: int, numbers: Int[Array, " b"], masking: PatchMasking
) -> Bool[Array, "b patches"]:
    """Patches to mask for each sample number, row by row from the top left."""
    blocks = _BlockMasks(len(numbers), masking)
    chunk = 32  # attempts drawn at once: an image needs about this many
    start = 0
    while blocks.unfinished.any():
        rows = np.flatnonzero(blocks.unfinished)
        draws = _philox_uniforms(seed, "patches", numbers[rows], chunk, start=start)  # rows chunk 4
        for attempt in range(chunk):
            unfinished = blocks.unfinished[rows]
            if not unfinished.any():
                break
            blocks.attempt(rows[unfinished], draws[unfinished, attempt])
        start += chunk
    columns = np.arange(masking.grid, dtype=np.uint64)
    bits: Array = (blocks.lines[:, :, None] >> columns) & np.uint64(1)
    return bits.astype(bool).reshape(len(numbers), masking.grid**2)


def mask_tokens(
    seed: int,
    numbers: Int[Array, " b"],
    tokens: Int[Array, "b l"],
    masking: TokenMasking,
    *,
    starts: Bool[Array, " vocab"] | None = None,
) -> tuple[Int[Array, "b l"], Bool[Array, "b l"]]:
    """The tokens after masking, and which of them the model has to predict.

    Of n tokens that may be selected, `max(1, round(0.15 n))` are; with whole words, as many as
    fit into that number, so a caption of one long word may have none, as in BERT.

    Args:
        seed: of the run.
        numbers: sample numbers.
        tokens: padded rows.
        masking: what replaces the selected tokens.
        starts: for each token id, whether it begins a word (`word_starts`). If given, whole words
            are selected; each of their tokens is replaced independently, as in BERT.
    """
    eligible = ~np.isin(tokens, masking.never)
    num_eligible = eligible.sum(1)
    limits = np.where(
        num_eligible > 0, np.maximum(1, np.rint(TOKEN_MASK_RATIO * num_eligible)), 0
    ).astype(int)
    draws = _philox_uniforms(
        seed, "tokens", numbers, tokens.shape[1]
    )  # a block for each position, so
    priority, action, other = np.moveaxis(draws, 2, 0)[:3]  # that masks do not depend on padding
    if starts is None:
        selected = _select_tokens(np.where(eligible, priority, np.inf), limits)
    else:
        selected = _select_words(priority, eligible, starts[tokens], limits)
    masked = np.where(selected & (action < 0.8), masking.mask_id, tokens)
    replacements = (other * masking.vocabulary_size).astype(tokens.dtype)
    masked = np.where(selected & (action >= 0.9), replacements, masked)
    return masked.astype(tokens.dtype), selected


def max_masked_tokens(num_tokens: int) -> int:
    """The most tokens that `mask_tokens` selects in a row of `num_tokens`."""
    return max(1, round(TOKEN_MASK_RATIO * num_tokens))


def gather_masked(
    mask: Bool[Array, "b n"], labels: Int[Array, "b n"], width: int
) -> tuple[Int[Array, "b {width}"], Int[Array, "b {width}"]]:
    """Masked positions in ascending order, and their labels; padded with 0 and `IGNORE`.

    Raises:
        ValueError: a row has more than `width` masked positions.
    """
    counts = mask.sum(1)
    if len(counts) and counts.max() > width:
        raise ValueError(f"{counts.max()} masked positions do not fit a width of {width}")
    rows, positions = np.nonzero(mask)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    masked_positions = np.zeros((len(mask), width), np.int64)
    masked_labels = np.full((len(mask), width), IGNORE, np.int64)
    masked_positions[rows, columns] = positions
    masked_labels[rows, columns] = labels[rows, positions]
    return masked_positions, masked_labels


def word_starts(vocabulary: Sequence[str]) -> Bool[Array, " vocab"]:
    """For each WordPiece token, whether it begins a word, that is, has no `##`."""
    return np.array([not token.startswith("##") for token in vocabulary], dtype=bool)


def draw_uniforms(seed: int, numbers: Int[Array, " b"]) -> Float[Array, "b 2"]:
    """Two random numbers in [0, 1) for each sample number, for the choice of ITM negatives."""
    drawn = _philox_uniforms(seed, "negatives", numbers, 1)[:, 0, :2]
    rounded: Array = np.floor(drawn * 2**24) * 2.0**-24  # else float32 would round some up to 1
    return rounded.astype(np.float32)


class _BlockMasks:
    """Masks of a batch while blocks are added; each line of patches is one word of bits."""

    def __init__(self, num_rows: int, masking: PatchMasking) -> None:
        self.masking = masking
        self.lines = np.zeros((num_rows, masking.grid), np.uint64)
        self.count = np.zeros(num_rows, np.int64)
        self.failures = np.zeros(num_rows, np.int64)
        self.unfinished = np.full(num_rows, masking.num_masked > 0)

    def attempt(self, rows: Int[Array, " n"], draws: Float[Array, "n 4"]) -> None:
        """Try one block for each of `rows`; `draws` give area, aspect ratio, top and left."""
        masking, grid = self.masking, self.masking.grid
        remaining = masking.num_masked - self.count[rows]
        # below `min_block` where fewer patches remain
        area = masking.min_block + (remaining - masking.min_block) * draws[:, 0]
        ratio = np.exp(math.log(masking.min_aspect) * (1 - 2 * draws[:, 1]))
        height = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        width = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (height < grid) & (width < grid)
        top = (draws[:, 2] * (grid - height + 1)).astype(np.int64)
        left = (draws[:, 3] * (grid - width + 1)).astype(np.int64)

        one = np.uint64(1)
        # a block that does not fit is rejected below; the clip keeps its shift defined
        strip = ((one << width.clip(0, grid - 1).astype(np.uint64)) - one) << left.clip(0).astype(
            np.uint64
        )
        line = np.arange(grid)
        inside = (line >= top[:, None]) & (line < (top + height)[:, None])
        before = self.lines[rows]
        added = np.where(inside, strip[:, None], np.uint64(0)) & ~before
        num_added = np.bitwise_count(added).sum(1, dtype=np.int64)

        accepted = fits & (num_added > 0) & (num_added <= remaining)
        self.lines[rows[accepted]] = before[accepted] | added[accepted]
        self.count[rows] += np.where(accepted, num_added, 0)
        self.failures[rows] = np.where(accepted, 0, self.failures[rows] + 1)
        self.unfinished[rows] = (self.count[rows] < masking.num_masked) & (
            self.failures[rows] < masking.attempts
        )


def _select_tokens(priority: Float[Array, "b l"], limits: Int[Array, " b"]) -> Bool[Array, "b l"]:
    """The `limits` tokens of each row with the lowest priority."""
    most = int(limits.max(initial=0))
    order = np.argsort(priority, axis=1)[:, :most]
    selected = np.zeros(priority.shape, bool)
    np.put_along_axis(selected, order, np.arange(most) < limits[:, None], axis=1)
    return selected


def _select_words(
    priority: Float[Array, "b l"],
    eligible: Bool[Array, "b l"],
    starts: Bool[Array, "b l"],
    limits: Int[Array, " b"],
) -> Bool[Array, "b l"]:
    """Whole words in random order; a word that would exceed the limit of tokens is skipped."""
    num_rows, width = priority.shape
    begins = eligible & (starts | ~np.roll(eligible, 1, axis=1))
    word = np.where(eligible, np.cumsum(begins, axis=1), 0)  # 0: no word
    flat = word + np.arange(num_rows)[:, None] * (width + 1)
    sizes = np.bincount(flat.ravel(), minlength=num_rows * (width + 1)).reshape(num_rows, -1)
    sizes[:, 0] = 0
    keys = np.full((num_rows, width + 1), np.inf)
    keys[np.nonzero(begins)[0], word[begins]] = priority[begins]
    order = np.argsort(keys, axis=1)
    selected = np.zeros((num_rows, width + 1), bool)
    remaining = limits.copy()
    rows = np.arange(num_rows)
    num_words = begins.sum(1)
    for place in range(int(num_words.max(initial=0))):
        rows = rows[(remaining[rows] > 0) & (place < num_words[rows])]
        if not len(rows):
            break
        candidate = order[rows, place]
        size = sizes[rows, candidate]
        accepted = size <= remaining[rows]
        selected[rows[accepted], candidate[accepted]] = True
        remaining[rows] -= np.where(accepted, size, 0)
    return np.take_along_axis(selected, word, axis=1)


_PURPOSES = {"patches": 1, "tokens": 2, "negatives": 3}


def _philox_uniforms(
    seed: int, purpose: str, numbers: Int[Array, " b"], blocks: int, *, start: int = 0
) -> Float[Array, "b {blocks} 4"]:
    """Four numbers in [0, 1) for each sample and block from `start`."""
    counter = np.empty((4, len(numbers), blocks), np.uint32)
    counter[0] = np.arange(start, start + blocks, dtype=np.uint32)
    counter[1] = (numbers & 0xFFFFFFFF).astype(np.uint32)[:, None]
    counter[2] = (numbers >> 32).astype(np.uint32)[:, None]
    counter[3] = _PURPOSES[purpose]
    words = philox(counter.reshape(4, -1), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    return (words.T.reshape(len(numbers), blocks, 4)) * 2.0**-32


def philox(counter: UInt[Array, "4 n"], key: tuple[int, int]) -> UInt[Array, "4 n"]:
    """Philox4x32-10 (Salmon et al., SC 2011), for many counters at once."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a, b, c, d = counter.astype(np.uint64)
    left, right = key
    for _ in range(10):
        first = a * np.uint64(0xD2511F53)
        second = c * np.uint64(0xCD9E8D57)
        a, b, c, d = (
            (second >> half) ^ b ^ np.uint64(left),
            second & low,
            (first >> half) ^ d ^ np.uint64(right),
            first & low,
        )
        left = (left + 0x9E3779B9) & 0xFFFFFFFF
        right = (right + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([a, b, c, d]).astype(np.uint32)
