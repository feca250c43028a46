"""DALL-E's dVAE: its weights checked, and named by one SHA-256 wherever they come from."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmd_pipeline.codes.pickles import read_pickle
from pmd_pipeline.codes.tokenizers import MAX_VOCABULARY, Tokenizer
from pmd_pipeline.codes.weights import read_tensors, tensor_bytes
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import write_whole

PATCH_SIZE = 8

_GROUPS = (1, 2, 4, 8)
"""Widths of the groups of the encoder, as multiples of the width of the first."""


@dataclass(frozen=True, eq=False)
class DalleWeights:
    """Weights of the encoder, by our names.

    Args:
        sha256: of the file that `pmd codes convert` writes of them; equal for weights from OpenAI,
            from the hub, and from that file.
    """

    tensors: dict[str, NDArray[Any]]
    sha256: str

    @property
    def vocabulary(self) -> int:
        """Number of codes."""
        return len(self.tensors["blocks.output.conv.weight"])


def open_tokenizer(weights: str | None, *, dtype: str, device: str) -> Tokenizer:
    """DALL-E's encoder; see `Tokenizer`.

    Raises:
        PmdError: torch is not installed, there is no such device, or these are other weights.
    """
    if weights is None:
        raise PmdError(
            "DALL-E's dVAE needs its weights: give --weights FILE; `pmd codes convert` makes one "
            "of OpenAI's encoder.pkl"
        )
    return dalle_tokenizer(dalle_weights(read_tensors(weights).tensors, weights), dtype, device)


def dalle_tokenizer(
    weights: DalleWeights, dtype: str = "float32", device: str = "cpu"
) -> Tokenizer:
    """The encoder with weights that are in memory.

    Raises:
        PmdError: torch is not installed, or there is no such device.
    """
    try:
        from pmd_pipeline.codes.dvae import BATCH, DvaeEncoder  # noqa: PLC0415 - `convert` needs no torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise PmdError(
            "DALL-E's image tokenizer needs torch: pip install 'pmd-flava[train]', or leave "
            "--weights out for k-means"
        ) from error
    encoder = DvaeEncoder(weights.tensors, dtype=dtype, device=device)
    return Tokenizer(
        patch_size=PATCH_SIZE,
        vocabulary=weights.vocabulary,
        codes=encoder.codes,
        batch=BATCH[device],
        devices=("cuda", "cpu"),
        versions=encoder.versions,
        weights_sha256=weights.sha256,
    )


def convert_weights(pickle: str, out: str) -> str:
    """Write the weights in `pickle`, or in safetensors, to `out`; the SHA-256 of the file.

    Raises:
        PmdError: it is refused or has other weights, or `out` does not end in .safetensors.
    """
    if not out.endswith(".safetensors"):  # `read_tensors` refuses other names
        raise PmdError(f"{out}: weights are written as safetensors: end the name in .safetensors")
    is_safe = pickle.endswith(".safetensors")
    tensors = read_tensors(pickle).tensors if is_safe else read_pickle(pickle)
    if "centroids" in tensors:
        raise PmdError(f"{pickle} holds weights of kmeans, which need no conversion")
    weights = dalle_weights(tensors, pickle)
    write_whole(out, _file(weights.tensors))
    return weights.sha256


def dalle_weights(tensors: Mapping[str, NDArray[Any]], origin: str) -> DalleWeights:
    """The encoder's weights by our names, from OpenAI's or Hugging Face's.

    Raises:
        PmdError: these are not the tensors of DALL-E's encoder.
    """
    if "centroids" in tensors:
        raise PmdError(f"{origin} holds weights of kmeans, not dalle")
    ours = {_our_name(name): array for name, array in tensors.items()}
    if in_model := {name for name in ours if name.startswith("image_codebook.")}:
        ours = {name.removeprefix("image_codebook."): ours[name] for name in in_model}
    expected = dict(tensor_shapes(ours))
    if wrong := sorted(
        name
        for name in ours.keys() | expected.keys()
        if name not in ours or ours[name].shape != expected.get(name)
    ):
        raise PmdError(
            f"{origin} does not hold DALL-E's image encoder: {wrong[0]} is missing, of another "
            "shape, or unknown"
        )
    checked = {name: np.ascontiguousarray(ours[name], dtype="<f4") for name in sorted(ours)}
    for name, array in checked.items():
        if not np.isfinite(array).all():
            raise PmdError(f"{origin}: {name} has values that are not finite")
    return DalleWeights(checked, hashlib.sha256(_file(checked)).hexdigest())


def tensor_shapes(tensors: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an encoder with the width, depth and vocabulary of `tensors`."""
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
    for group, multiple in enumerate(_GROUPS, 1):
        for block in range(1, blocks + 1):
            name, after = f"group_{group}.block_{block}", multiple * width
            hidden = after // 4
            if before != after:
                convolutions[f"{name}.id_path"] = (after, before, 1)
            convolutions[f"{name}.res_path.conv_1"] = (hidden, before, 3)
            convolutions[f"{name}.res_path.conv_2"] = (hidden, hidden, 3)
            convolutions[f"{name}.res_path.conv_3"] = (hidden, hidden, 3)
            convolutions[f"{name}.res_path.conv_4"] = (after, hidden, 1)
            before = after
    convolutions["output.conv"] = (min(vocabulary, MAX_VOCABULARY), before, 1)
    for name, (after, before, side) in convolutions.items():
        yield f"blocks.{name}.weight", (after, before, side, side)
        yield f"blocks.{name}.bias", (after,)


def _file(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    return tensor_bytes(tensors, {"tokenizer": "dalle"})


def _our_name(name: str) -> str:
    """The name that OpenAI's, Hugging Face's and our own spelling of a tensor share."""
    name = name.replace(".group.block_", ".block_").replace(".res_path.path.", ".res_path.")
    return re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name))
