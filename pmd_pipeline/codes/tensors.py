"""What can be wrong with a file of image codes."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from pmd_pipeline.contract.models import CodeRules

_TYPES = {"boxes": ("F32", np.float32), "codes": ("U16", np.uint16), "first": ("I64", np.int64)}
"""The tensors of the file, with their types as safetensors and as NumPy name them."""

Tensors: TypeAlias = dict[str, NDArray[Any]]
Boxes: TypeAlias = NDArray[np.float32]

_SAME_BOX = 1e-5
"""How far a side may be from where this machine would draw it: libraries round in their own way."""


class _Tensor(BaseModel):
    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")

    boxes: _Tensor
    codes: _Tensor
    first: _Tensor
    metadata: dict[str, str] = Field(default_factory=dict, alias="__metadata__")


def code_faults(
    content: bytes, rules: CodeRules, views: int, expected: Sequence[Boxes]
) -> Iterator[str]:
    """What is wrong with the codes of a shard, a sentence each.

    Args:
        content: of the safetensors file.
        views: rows that it should have.
        expected: the boxes of the views of each image.
    """
    tensors = code_tensors(content)
    if isinstance(tensors, str):
        yield tensors
        return
    stated = {
        "boxes": (views, 4),
        "codes": (views, rules.grid, rules.grid),
        "first": (len(expected) + 1,),
    }
    wrong = [name for name in stated if tensors[name].shape != stated[name]]
    for name in wrong:
        yield f"has {name} of the shape {tensors[name].shape}, not {stated[name]}"
    if wrong:
        return
    first, codes = tensors["first"], tensors["codes"]
    if first[0] != 0 or first[-1] != views or (np.diff(first) != [*map(len, expected)]).any():
        yield "gives its images other numbers of views than they have (first)"
        return
    if codes.size and int(codes.max()) >= rules.vocabulary:
        yield f"has the code {int(codes.max())}; the last one is {rules.vocabulary - 1}"
    together = np.concatenate([np.empty((0, 4), np.float32), *expected])
    if not np.allclose(tensors["boxes"], together, rtol=0, atol=_SAME_BOX):
        yield "has views that are neither whole images, nor their captions' boxes, nor those drawn"


def code_tensors(content: bytes) -> Tensors | str:
    """The tensors of a safetensors file of image codes; a sentence where it is none.

    The format is a length (8 bytes, little endian), so many bytes of JSON, and the tensors.
    """
    length = int.from_bytes(content[:8], "little")
    try:
        header = _Header.model_validate_json(content[8 : 8 + length])
    except ValidationError as error:
        said = error.errors()[0]
        where = ".".join(str(step) for step in said["loc"])
        return f"is no file of image codes ({where}: {said['msg'].lower()})"
    body = content[8 + length :]
    found: Tensors = {}
    place = 0
    described = {"boxes": header.boxes, "codes": header.codes, "first": header.first}
    for name, one in sorted(described.items(), key=lambda item: item[1].data_offsets):
        kind, number = _TYPES[name]
        start, stop = one.data_offsets
        if one.dtype != kind or start != place or stop > len(body):
            return f"holds {name} as {one.dtype} from byte {start:,} to {stop:,}, which cannot be"
        if stop - start != np.dtype(number).itemsize * math.prod(one.shape):
            return f"holds {name} of the shape {one.shape} in {stop - start:,} bytes"
        found[name] = np.frombuffer(body[start:stop], dtype=number).reshape(one.shape)
        place = stop
    if place != len(body):
        return f"has {len(body) - place:,} bytes behind its tensors"
    return found
