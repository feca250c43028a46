"""Image codes and the boxes of the views that they belong to, beside each shard."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from flava_train.shapes import Array, Int
from pmd_pipeline.contract.boxes import Box, is_box
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.models import CodeRules, ShardEntry

_SLACK = 1e-4
"""How far a stored box may be from the one beside its caption: half precision would do."""


@dataclass(frozen=True)
class ShardCodes:
    """The views of a shard's samples, opened; nothing is read before it is asked for.

    Args:
        first: row of the first view of each sample, and one past the last.
        name: of the file, for errors.
        boxes: of the views, as fractions.
        codes: of the views, `grid` by `grid`.
        vocabulary: codes are below it.
    """

    first: Int[Array, " n"]
    name: str
    boxes: Any
    codes: Any
    vocabulary: int

    def count(self, sample: int) -> int:
        """Views of a sample, the whole image included."""
        return int(self.first[sample + 1] - self.first[sample])

    def box(self, sample: int, view: int) -> Box:
        """`x0, y0, x1, y1` of a view, as fractions of the stored image."""
        row = self._row(sample, view)
        x0, y0, x1, y1 = (float(side) for side in self.boxes[row : row + 1][0])
        if not is_box((x0, y0, x1, y1)):
            raise PmdError(f"{self.name} has a box that is not within its image: row {row}")
        return x0, y0, x1, y1

    def of(self, sample: int, view: int) -> Int[Array, " p"]:
        """The codes of a view, row by row from the top left."""
        row = self._row(sample, view)
        codes: Array = self.codes[row : row + 1].reshape(-1).astype(np.int64)
        if int(codes.max(initial=0)) >= self.vocabulary:
            raise PmdError(
                f"{self.name} has the code {codes.max()}, beyond the {self.vocabulary} of its "
                "tokenizer: run `pmd codes` again"
            )
        return codes

    def _row(self, sample: int, view: int) -> int:
        if view >= self.count(sample):
            raise PmdError(
                f"{self.name} has no view {view} of sample {sample}: run `pmd codes` again"
            )
        return int(self.first[sample]) + view


def open_codes(path: Path, shard: ShardEntry, rules: CodeRules) -> ShardCodes:
    """The views in a codes file.

    Raises:
        PmdError: it is no such file, or not that of `shard`.
        FileNotFoundError: there is none.
    """
    try:
        file: Any = safe_open(path, framework="np")
        boxes, codes, first = (file.get_slice(name) for name in ("boxes", "codes", "first"))
        found = [(part.get_shape(), part.get_dtype()) for part in (boxes, codes, first)]
        firsts = first[:]
    except (SafetensorError, ValueError) as error:
        raise PmdError(f"{path} holds no codes ({error}): run `pmd codes` again") from error
    shape = [shard.views, rules.grid, rules.grid]
    wanted = [([shard.views, 4], "F32"), (shape, "U16"), ([shard.images + 1], "I64")]
    steps = np.diff(firsts)
    if found != wanted or firsts[0] != 0 or firsts[-1] != shard.views or (steps < 1).any():
        raise PmdError(f"{path} does not hold the codes of {shard.path}: run `pmd codes` again")
    return ShardCodes(firsts, str(path), boxes, codes, rules.vocabulary)


def boxes_match(one: Box, other: Box) -> bool:
    """Whether two boxes are one, but for rounding."""
    return all(abs(a - b) <= _SLACK for a, b in zip(one, other, strict=True))
