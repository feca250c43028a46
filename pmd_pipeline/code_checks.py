"""What can be wrong with a file of image codes."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from pmd_pipeline.format import CodeRules

_TYPES = {"boxes": ("F32", np.float32), "codes": ("U16", np.uint16), "first": ("I64", np.int64)}
"""The tensors of the file, with their types as safetensors and as NumPy name them."""

Tensors: TypeAlias = dict[str, NDArray[Any]]
Boxes: TypeAlias = list[list[float]]


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
    content: bytes, rules: CodeRules, views: int, boxes: Sequence[Boxes | None]
) -> Iterator[str]:
    """What is wrong with the codes of a shard, a sentence each.

    Args:
        content: of the safetensors file.
        views: rows that it should have.
        boxes: of each image, those that its captions are about, or None.
    """
    tensors = code_tensors(content)
    if isinstance(tensors, str):
        yield tensors
        return
    stated = {
        "boxes": (views, 4),
        "codes": (views, rules.grid, rules.grid),
        "first": (len(boxes) + 1,),
    }
    wrong = [name for name in stated if tensors[name].shape != stated[name]]
    for name in wrong:
        yield f"has {name} of the shape {tensors[name].shape}, not {stated[name]}"
    if wrong:
        return
    first, codes = tensors["first"], tensors["codes"]
    counts = [rules.views if own is None else 1 + len(own) for own in boxes]
    if first[0] != 0 or first[-1] != views or (np.diff(first) != counts).any():
        yield "gives its images other numbers of views than they have (first)"
        return
    if codes.size and int(codes.max()) >= rules.vocabulary:
        yield f"has the code {int(codes.max())}; the last one is {rules.vocabulary - 1}"
    yield from _box_faults(tensors["boxes"], first, boxes)


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


def _box_faults(
    views: NDArray[Any], first: NDArray[Any], boxes: Sequence[Boxes | None]
) -> Iterator[str]:
    inside = np.isfinite(views).all() and (views >= 0).all() and (views <= 1).all()
    if not inside or (views[:, :2] >= views[:, 2:]).any():
        yield "has views that are no boxes"
    if (views[first[:-1]] != np.array([0, 0, 1, 1], dtype=np.float32)).any():
        yield "has images whose first view is not the whole image"
    for start, stop, own in zip(first[:-1] + 1, first[1:], boxes, strict=True):
        if own and (views[start:stop] != np.array(own, dtype=np.float32)).any():
            yield "has views that are not the boxes of their captions"
            return
