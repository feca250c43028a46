"""Weights of image tokenizers: found, checked, and named by one sha256 wherever they come from.

Only safetensors are read here. OpenAI's pickle is read by `pickles`, once, to be converted.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from pmd_pipeline.codes.tokenizers.kmeans import PATCH
from pmd_pipeline.contract.digests import canonical_json
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, local_path, read_bytes

WEIGHTS = "model.safetensors"
"""What the hub, and a folder saved by transformers, calls the file."""

_GROUPS = (1, 2, 4, 8)
"""Widths of the groups of the dVAE's encoder, in widths of the first."""

_MOST_CODES = 1 << 16
_REVISION = re.compile("[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of an image tokenizer.

    Args:
        sha256: of the safetensors file that `pmd` writes of them; the same for weights from OpenAI,
            from the hub, and from our own file.
        vocabulary: codes are 0 to `vocabulary - 1`.
        facts: what the file says of itself.
    """

    tokenizer: Literal["dalle", "kmeans"]
    sha256: str
    vocabulary: int
    tensors: dict[str, NDArray[Any]]
    facts: dict[str, Any]


def find_weights(name: str, revision: str | None) -> str:
    """The address of the weights that a user calls `name`: a file, a folder, or an id of the hub.

    Raises:
        PmdError: it is none of them, or cannot be had from the hub.
    """
    here = local_path(name)
    if here is None or here.is_file():
        return name
    if here.is_dir():
        return join(name, WEIGHTS)
    if not _HUB_ID.fullmatch(name):
        raise PmdError(f"--weights {name}: there is no such file or folder")
    if revision is None or not _REVISION.fullmatch(revision):
        raise PmdError(
            f"--weights {name}: there is no such file or folder; for weights of the hub also give "
            "--revision, the commit's 40 hex digits"
        )
    return _downloaded(name, revision)


def read_weights(address: str) -> Weights:
    """The weights in the safetensors file at `address`: ours, or a `FlavaImageCodebook`.

    Raises:
        PmdError: it is no such file.
    """
    if address.endswith((".pkl", ".bin", ".pt", ".pth")):
        raise PmdError(
            f"{address} is a pickle, which can run anything: convert it once with "
            f"`pmd codes convert {address} dvae.safetensors`, and give that"
        )
    content = read_bytes(address)
    try:
        tensors = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PmdError(f"{address} cannot be read as safetensors: {error}") from error
    if "centroids" in tensors:
        return _kmeans_weights(tensors, content, address)
    return dalle_weights(tensors, address)


def dalle_weights(tensors: Mapping[str, NDArray[Any]], origin: str) -> Weights:
    """The dVAE's weights by our names, from OpenAI's or Hugging Face's.

    Raises:
        PmdError: these are not the tensors of DALL-E's encoder.
    """
    ours = {_our_name(name): array for name, array in tensors.items()}
    if whole := {name for name in ours if name.startswith("image_codebook.")}:
        ours = {name.removeprefix("image_codebook."): ours[name] for name in whole}
    expected = dict(_shapes(ours))
    if wrong := sorted(
        name
        for name in ours.keys() | expected.keys()
        if name not in ours or ours[name].shape != expected.get(name)
    ):
        raise PmdError(
            f"{origin} does not hold DALL-E's image encoder: {wrong[0]} is missing, of another "
            "shape, or unknown"
        )
    weights = {name: np.ascontiguousarray(ours[name], dtype="<f4") for name in sorted(ours)}
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise PmdError(f"{origin}: {name} has values that are no finite numbers")
    content = tensor_file(weights, {"tokenizer": "dalle"})
    return Weights(
        tokenizer="dalle",
        sha256=hashlib.sha256(content).hexdigest(),
        vocabulary=len(weights["blocks.output.conv.weight"]),
        tensors=dict(weights),
        facts={},
    )


def tensor_file(tensors: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> bytes:
    """A safetensors file, the same bytes for the same tensors and facts."""
    # under one name, since the library writes several names of metadata in any order
    return safetensors.numpy.save(dict(tensors), metadata={"pmd": canonical_json(dict(facts))})


def _kmeans_weights(tensors: dict[str, NDArray[Any]], content: bytes, origin: str) -> Weights:
    centroids = tensors["centroids"]
    fits = centroids.ndim == 4 and centroids.shape[1:] == (PATCH, PATCH, 3)
    if not fits or centroids.dtype != np.uint8 or not 0 < len(centroids) <= _MOST_CODES:
        raise PmdError(f"{origin}: `centroids` are not patches of {PATCH} x {PATCH} RGB pixels")
    return Weights(
        tokenizer="kmeans",
        sha256=hashlib.sha256(content).hexdigest(),
        vocabulary=len(centroids),
        tensors={"centroids": centroids},
        facts=_facts(content),
    )


def _facts(content: bytes) -> dict[str, Any]:
    """What `tensor_file` was given beside the tensors; nothing where others wrote the file."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    try:
        facts = json.loads(header.get("__metadata__", {}).get("pmd", "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _downloaded(name: str, revision: str) -> str:
    try:
        from huggingface_hub import hf_hub_download  # noqa: PLC0415 - only the hub needs it
    except ModuleNotFoundError as error:
        raise PmdError(
            f"--weights {name}: the hub needs huggingface_hub: pip install 'pmd-flava[train]', or "
            "download the file and name it"
        ) from error
    try:
        return str(hf_hub_download(name, WEIGHTS, revision=revision))
    except (OSError, ValueError) as error:
        raise PmdError(
            f"--weights {name}: {WEIGHTS} of {revision[:12]} cannot be had from the hub "
            f"({str(error).splitlines()[0]}); of a pickle that is there, `pmd codes convert` makes "
            "a file to name here"
        ) from error


def _our_name(name: str) -> str:
    """The name that OpenAI's, Hugging Face's and our own spelling of a tensor share."""
    name = name.replace(".group.block_", ".block_").replace(".res_path.path.", ".res_path.")
    return re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name))


def _shapes(tensors: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes that an encoder has, of the width, depth and vocabulary of `tensors`."""
    width, vocabulary = (
        len(tensors[name]) if name in tensors and tensors[name].ndim else 1
        for name in ("blocks.input.weight", "blocks.output.conv.weight")
    )
    blocks = sum(
        re.fullmatch(r"blocks\.group_1\.block_\d+\.res_path\.conv_1\.weight", name) is not None
        for name in tensors
    )
    convolutions = {"input": (width, 3, 7)}
    before = width
    for group, times in enumerate(_GROUPS, 1):
        for block in range(1, blocks + 1):
            at, after = f"group_{group}.block_{block}", times * width
            hidden = after // 4
            if before != after:
                convolutions[f"{at}.id_path"] = (after, before, 1)
            convolutions[f"{at}.res_path.conv_1"] = (hidden, before, 3)
            convolutions[f"{at}.res_path.conv_2"] = (hidden, hidden, 3)
            convolutions[f"{at}.res_path.conv_3"] = (hidden, hidden, 3)
            convolutions[f"{at}.res_path.conv_4"] = (after, hidden, 1)
            before = after
    convolutions["output.conv"] = (min(vocabulary, _MOST_CODES), before, 1)
    for name, (after, before, side) in convolutions.items():
        yield f"blocks.{name}.weight", (after, before, side, side)
        yield f"blocks.{name}.bias", (after,)
