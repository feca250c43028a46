"""What is masked, as pure functions of (seed, sample number): numpy only, a batch at a time.

A sample's masks depend on nothing else, neither on its neighbours nor on the worker, so a run
that is resumed, or spread over other ranks, masks the same patches and tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flava_train.shapes import Array, Bool, Float, Int, UInt

IGNORE = -100
"""Label of padding: no loss."""

TOKEN_SHARE = 0.15
"""Of the tokens of a text, as in BERT."""


@dataclass(frozen=True)
class PatchMasking:
    """BEiT's blockwise masking (arXiv:2106.08254, algorithm 1), as FLAVA uses it.

    Args:
        grid: patches along each side, at most 64.
        masked: patches to mask; a few rows get fewer, none gets more.
        least: patches that a block aims at, at least.
        narrowest: least ratio of a block's sides; the greatest is its inverse.
        attempts: places tried for one block before the row is left as it is.
    """

    grid: int = 14
    masked: int = 75
    least: int = 16
    narrowest: float = 0.3
    attempts: int = 10


@dataclass(frozen=True)
class TokenMasking:
    """BERT's masking: of the chosen tokens, 80 % become `[MASK]`, 10 % any token, 10 % stay.

    Args:
        vocab: tokens to draw replacements from.
        mask: the number of `[MASK]`.
        never: tokens that are not chosen: padding and the specials.
    """

    vocab: int = 30_522
    mask: int = 103
    never: tuple[int, ...] = (0, 100, 101, 102, 103)


def mask_patches(
    seed: int, numbers: Int[Array, " b"], rule: PatchMasking
) -> Bool[Array, "b patches"]:
    """Patches to mask, for each sample number, row by row from the top left."""
    blocks = _Blocks(len(numbers), rule)
    chunk = 32  # tries drawn at once: a row needs about this many
    start = 0
    while blocks.open.any():
        rows = np.flatnonzero(blocks.open)
        draws = _uniform(seed, "patches", numbers[rows], chunk, start=start)  # rows chunk 4
        for attempt in range(chunk):
            still = blocks.open[rows]
            if not still.any():
                break
            blocks.attempt(rows[still], draws[still, attempt])
        start += chunk
    columns = np.arange(rule.grid, dtype=np.uint64)
    bits: Array = (blocks.lines[:, :, None] >> columns) & np.uint64(1)
    return bits.astype(bool).reshape(len(numbers), rule.grid**2)


def mask_tokens(
    seed: int,
    numbers: Int[Array, " b"],
    tokens: Int[Array, "b l"],
    rule: TokenMasking,
    *,
    starts: Bool[Array, " vocab"] | None = None,
) -> tuple[Int[Array, "b l"], Bool[Array, "b l"]]:
    """The tokens as the model sees them, and which of them it has to predict.

    Of n tokens that may be chosen, `max(1, round(0.15 n))` are, or as many as whole words allow
    without exceeding that; a caption of one long word may go unmasked, as in BERT.

    Args:
        seed: of the run.
        numbers: of the samples.
        tokens: padded rows.
        rule: what replaces the chosen tokens.
        starts: of each token of the vocabulary, whether a word begins with it (`word_starts`).
            Where given, whole words are chosen; each piece is then replaced for itself, as in
            BERT.
    """
    allowed = ~np.isin(tokens, rule.never)
    eligible = allowed.sum(1)
    wanted = np.where(eligible > 0, np.maximum(1, np.rint(TOKEN_SHARE * eligible)), 0).astype(int)
    draws = _uniform(seed, "tokens", numbers, tokens.shape[1])  # a block for each position, so
    order, action, other = np.moveaxis(draws, 2, 0)[:3]  # that masks do not depend on padding
    if starts is None:
        chosen = _lowest(np.where(allowed, order, np.inf), wanted)
    else:
        chosen = _whole_words(order, allowed, starts[tokens], wanted)
    seen = np.where(chosen & (action < 0.8), rule.mask, tokens)
    anything = (other * rule.vocab).astype(tokens.dtype)
    return np.where(chosen & (action >= 0.9), anything, seen).astype(tokens.dtype), chosen


def max_masked_tokens(tokens: int) -> int:
    """As many tokens as `mask_tokens` chooses at most in a row of `tokens`."""
    return max(1, round(TOKEN_SHARE * tokens))


def gather_masked(
    mask: Bool[Array, "b n"], labels: Int[Array, "b n"], width: int
) -> tuple[Int[Array, "b {width}"], Int[Array, "b {width}"]]:
    """Positions that are masked, in order, and their labels; padded with 0 and `IGNORE`.

    Raises:
        ValueError: a row has more than `width`.
    """
    counts = mask.sum(1)
    if len(counts) and counts.max() > width:
        raise ValueError(f"{counts.max()} masked positions do not fit a width of {width}")
    rows, columns = np.nonzero(mask)
    slots = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = np.zeros((len(mask), width), np.int64)
    kept = np.full((len(mask), width), IGNORE, np.int64)
    at[rows, slots] = columns
    kept[rows, slots] = labels[rows, columns]
    return at, kept


def word_starts(vocabulary: Sequence[str]) -> Bool[Array, " vocab"]:
    """Whether each WordPiece begins a word, that is, has no `##`."""
    return np.array([not piece.startswith("##") for piece in vocabulary], dtype=bool)


def draw_uniforms(seed: int, numbers: Int[Array, " b"]) -> Float[Array, "b 2"]:
    """Two numbers in [0, 1) for each sample, to draw ITM negatives with."""
    drawn = _uniform(seed, "negatives", numbers, 1)[:, 0, :2]
    coarse: Array = np.floor(drawn * 2**24) * 2.0**-24  # else float32 would round some up to 1
    return coarse.astype(np.float32)


class _Blocks:
    """Rows of blocks under way; a line of patches is one word of bits."""

    def __init__(self, num_rows: int, rule: PatchMasking) -> None:
        self.rule = rule
        self.lines = np.zeros((num_rows, rule.grid), np.uint64)
        self.count = np.zeros(num_rows, np.int64)
        self.failed = np.zeros(num_rows, np.int64)
        self.open = np.full(num_rows, rule.masked > 0)

    def attempt(self, rows: Int[Array, " n"], draw: Float[Array, "n 4"]) -> None:
        """Try one block for each of `rows`; `draw` gives area, ratio, top and left."""
        rule, grid = self.rule, self.rule.grid
        room = rule.masked - self.count[rows]
        area = rule.least + (room - rule.least) * draw[:, 0]  # below `least` where room is
        ratio = np.exp(math.log(rule.narrowest) * (1 - 2 * draw[:, 1]))
        height = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        width = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (height < grid) & (width < grid)
        top = (draw[:, 2] * (grid - height + 1)).astype(np.int64)
        left = (draw[:, 3] * (grid - width + 1)).astype(np.int64)

        one = np.uint64(1)
        # a block that does not fit is refused below; the clip keeps its shift defined
        strip = ((one << width.clip(0, grid - 1).astype(np.uint64)) - one) << left.clip(0).astype(
            np.uint64
        )
        line = np.arange(grid)
        inside = (line >= top[:, None]) & (line < (top + height)[:, None])
        before = self.lines[rows]
        fresh = np.where(inside, strip[:, None], np.uint64(0)) & ~before
        gained = np.bitwise_count(fresh).sum(1, dtype=np.int64)

        good = fits & (gained > 0) & (gained <= room)
        self.lines[rows[good]] = before[good] | fresh[good]
        self.count[rows] += np.where(good, gained, 0)
        self.failed[rows] = np.where(good, 0, self.failed[rows] + 1)
        self.open[rows] = (self.count[rows] < rule.masked) & (self.failed[rows] < rule.attempts)


def _lowest(keys: Float[Array, "b l"], wanted: Int[Array, " b"]) -> Bool[Array, "b l"]:
    """Mark the `wanted` lowest keys of each row."""
    most = int(wanted.max(initial=0))
    order = np.argsort(keys, axis=1)[:, :most]
    marked = np.zeros(keys.shape, bool)
    np.put_along_axis(marked, order, np.arange(most) < wanted[:, None], axis=1)
    return marked


def _whole_words(
    order: Float[Array, "b l"],
    allowed: Bool[Array, "b l"],
    starts: Bool[Array, "b l"],
    wanted: Int[Array, " b"],
) -> Bool[Array, "b l"]:
    """Choose words in random order, passing over those that would exceed `wanted` tokens."""
    num_rows, width = order.shape
    begins = allowed & (starts | ~np.roll(allowed, 1, axis=1))
    word = np.where(allowed, np.cumsum(begins, axis=1), 0)  # 0: no word
    flat = word + np.arange(num_rows)[:, None] * (width + 1)
    sizes = np.bincount(flat.ravel(), minlength=num_rows * (width + 1)).reshape(num_rows, -1)
    sizes[:, 0] = 0
    keys = np.full((num_rows, width + 1), np.inf)
    keys[np.nonzero(begins)[0], word[begins]] = order[begins]
    turns = np.argsort(keys, axis=1)
    taken = np.zeros((num_rows, width + 1), bool)
    left = wanted.copy()
    rows = np.arange(num_rows)
    num_words = begins.sum(1)
    for turn in range(int(num_words.max(initial=0))):
        rows = rows[(left[rows] > 0) & (turn < num_words[rows])]
        if not len(rows):
            break
        this = turns[rows, turn]
        size = sizes[rows, this]
        good = size <= left[rows]
        taken[rows[good], this[good]] = True
        left[rows] -= np.where(good, size, 0)
    return np.take_along_axis(taken, word, axis=1)


_PURPOSES = {"patches": 1, "tokens": 2, "negatives": 3}


def _uniform(
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
