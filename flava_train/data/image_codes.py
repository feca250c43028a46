"""Image codes and the boxes of their crops, in the file beside each shard."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from flava_train.shapes import Array, Int
from pmd_pipeline.contract.boxes import Box, is_box
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.models import CodeRules, ShardEntry
from pmd_pipeline.contract.schemas import CODES_DTYPES

_BOX_TOLERANCE = 1e-4
"""Greatest difference between a box beside the codes and the one beside its caption; rounding to
half precision stays below it."""

_SAFETENSORS_DTYPES = {"float32": "F32", "uint16": "U16", "int64": "I64"}


@dataclass(frozen=True)
class ShardCodes:
    """The open codes file of a shard; boxes and codes are read when they are asked for.

    Args:
        first: row of the first crop of each sample, and the number of rows at the end.
        name: address of the file, for errors.
        boxes: of the crops, as fractions.
        codes: of the crops, `grid` by `grid`.
        vocabulary: codes are below it.
    """

    first: Int[Array, " n"]
    name: str
    boxes: Any
    codes: Any
    vocabulary: int

    def num_crops(self, sample: int) -> int:
        """Crops of a sample, the whole image included."""
        return int(self.first[sample + 1] - self.first[sample])

    def box(self, sample: int, crop: int) -> Box:
        """The box of a crop, as fractions of the stored image."""
        row = self._row(sample, crop)
        x0, y0, x1, y1 = (float(side) for side in self.boxes[row : row + 1][0])
        if not is_box((x0, y0, x1, y1)):
            raise PmdError(f"{self.name} has a box that is not within its image: row {row}")
        return x0, y0, x1, y1

    def codes_of(self, sample: int, crop: int) -> Int[Array, " p"]:
        """The codes of a crop, row by row from the top left."""
        row = self._row(sample, crop)
        codes: Array = self.codes[row : row + 1].reshape(-1).astype(np.int64)
        if int(codes.max(initial=0)) >= self.vocabulary:
            raise PmdError(
                f"{self.name} has the code {codes.max()}, beyond the {self.vocabulary} of its "
                "tokenizer: run `pmd codes` again"
            )
        return codes

    def _row(self, sample: int, crop: int) -> int:
        if crop >= self.num_crops(sample):
            raise PmdError(
                f"{self.name} has no crop {crop} of sample {sample}: run `pmd codes` again"
            )
        return int(self.first[sample]) + crop


def open_codes(path: Path, shard: ShardEntry, rules: CodeRules) -> ShardCodes:
    """Open a codes file.

    Raises:
        PmdError: it is no such file, or not that of `shard`.
        FileNotFoundError: it does not exist.
    """
    try:
        file: Any = safe_open(path, framework="np")
        tensors = {name: file.get_slice(name) for name in CODES_DTYPES}
        layout = {name: (one.get_shape(), one.get_dtype()) for name, one in tensors.items()}
        first = tensors["first"][:]
    except (SafetensorError, ValueError) as error:
        raise PmdError(f"{path} holds no codes ({error}): run `pmd codes` again") from error
    shapes = {
        "boxes": [shard.views, 4],
        "codes": [shard.views, rules.grid, rules.grid],
        "first": [shard.images + 1],
    }
    expected = {
        name: (shapes[name], _SAFETENSORS_DTYPES[dtype]) for name, dtype in CODES_DTYPES.items()
    }
    counts = np.diff(first)
    if layout != expected or first[0] != 0 or first[-1] != shard.views or (counts < 1).any():
        raise PmdError(f"{path} does not hold the codes of {shard.path}: run `pmd codes` again")
    return ShardCodes(first, str(path), tensors["boxes"], tensors["codes"], rules.vocabulary)


def boxes_match(one: Box, other: Box) -> bool:
    """Whether two boxes are equal up to rounding."""
    return all(abs(a - b) <= _BOX_TOLERANCE for a, b in zip(one, other, strict=True))
