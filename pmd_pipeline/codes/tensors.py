"""Files of image codes, read and checked."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from pmd_pipeline.contract.models import CodeRules
from pmd_pipeline.contract.schemas import CODES_DTYPES

_SAFETENSORS_DTYPES = {"float32": "F32", "uint16": "U16", "int64": "I64"}

Tensors: TypeAlias = dict[str, NDArray[Any]]
Boxes: TypeAlias = NDArray[np.float32]

_BOX_TOLERANCE = 1e-5
"""Difference allowed between a stored side and the one computed here: math libraries round
differently."""


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
    content: bytes, rules: CodeRules, crops: int, expected: Sequence[Boxes]
) -> Iterator[str]:
    """Faults of the codes of a shard, one sentence each.

    Args:
        content: of the safetensors file.
        crops: rows that it should have.
        expected: the boxes of the crops of each image.
    """
    tensors = code_tensors(content)
    if isinstance(tensors, str):
        yield tensors
        return
    shapes = {
        "boxes": (crops, 4),
        "codes": (crops, rules.grid, rules.grid),
        "first": (len(expected) + 1,),
    }
    wrong = [name for name in shapes if tensors[name].shape != shapes[name]]
    for name in wrong:
        yield f"has {name} of the shape {tensors[name].shape}, not {shapes[name]}"
    if wrong:
        return
    first, codes = tensors["first"], tensors["codes"]
    if first[0] != 0 or first[-1] != crops or (np.diff(first) != [*map(len, expected)]).any():
        yield "has other numbers of crops per image than it should have (first)"
        return
    if codes.size and int(codes.max()) >= rules.vocabulary:
        yield f"has the code {int(codes.max())}, and the largest is {rules.vocabulary - 1}"
    all_boxes = np.concatenate([np.empty((0, 4), np.float32), *expected])
    if not np.allclose(tensors["boxes"], all_boxes, rtol=0, atol=_BOX_TOLERANCE):
        yield "has crops that are neither whole images, nor their captions' boxes, nor random boxes"


def code_tensors(content: bytes) -> Tensors | str:
    """The tensors of a safetensors file of image codes; a sentence if it is not such a file.

    The format: the length of the header (8 bytes, little endian), the header in JSON, the tensors.
    """
    length = int.from_bytes(content[:8], "little")
    try:
        header = _Header.model_validate_json(content[8 : 8 + length])
    except ValidationError as error:
        first_error = error.errors()[0]
        where = ".".join(str(step) for step in first_error["loc"])
        return f"is not a file of image codes ({where}: {first_error['msg'].lower()})"
    body = content[8 + length :]
    tensors: Tensors = {}
    position = 0
    headers = {"boxes": header.boxes, "codes": header.codes, "first": header.first}
    for name, tensor in sorted(headers.items(), key=lambda item: item[1].data_offsets):
        dtype = np.dtype(CODES_DTYPES[name])
        start, stop = tensor.data_offsets
        if tensor.dtype != _SAFETENSORS_DTYPES[dtype.name] or start != position or stop > len(body):
            return f"holds {name} as {tensor.dtype}, impossibly from byte {start:,} to {stop:,}"
        if stop - start != dtype.itemsize * math.prod(tensor.shape):
            return f"holds {name} of the shape {tensor.shape} in {stop - start:,} bytes"
        tensors[name] = np.frombuffer(body[start:stop], dtype=dtype).reshape(tensor.shape)
        position = stop
    if position != len(body):
        return f"has {len(body) - position:,} bytes after its tensors"
    return tensors
