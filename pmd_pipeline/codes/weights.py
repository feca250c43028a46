"""Files of tokenizer weights: located, downloaded, read and written. Only safetensors are read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from pmd_pipeline.contract.digests import canonical_json
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, local_path, read_bytes

WEIGHTS_NAME = "model.safetensors"
"""File name of weights on the Hugging Face hub and in a folder saved by transformers."""

_REVISION = re.compile("[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, eq=False)
class TensorFile:
    """Content of a safetensors file.

    Args:
        facts: what `tensor_bytes` was given beside the tensors; empty for files of other programs.
    """

    tensors: dict[str, NDArray[Any]]
    facts: dict[str, Any]


def find_weights(name: str, revision: str | None) -> str:
    """The address of the weights that a user calls `name`: a file, a folder, or a hub id.

    Raises:
        PmdError: it is none of them, or cannot be downloaded from the hub.
    """
    path = local_path(name)
    if path is None or path.is_file():
        return name
    if path.is_dir():
        return join(name, WEIGHTS_NAME)
    if not _HUB_ID.fullmatch(name):
        raise PmdError(f"--weights {name}: there is no such file or folder")
    if revision is None or not _REVISION.fullmatch(revision):
        raise PmdError(
            f"--weights {name}: there is no such file or folder; for weights of the hub also give "
            "--revision, the commit's 40 hex digits"
        )
    return _download(name, revision)


def read_tensors(address: str) -> TensorFile:
    """The content of the safetensors file at `address`.

    Raises:
        PmdError: it is no such file.
    """
    if address.endswith((".pkl", ".bin", ".pt", ".pth")):
        raise PmdError(
            f"{address} is a pickle, which can run any code: convert it once with "
            f"`pmd codes convert {address} dvae.safetensors`, and give that file"
        )
    content = read_bytes(address)
    try:
        tensors = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PmdError(f"{address} cannot be read as safetensors: {error}") from error
    return TensorFile(tensors, _facts(content))


def tensor_bytes(tensors: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> bytes:
    """A safetensors file, the same bytes for the same tensors and facts."""
    # one name for all facts, since the library writes several names of metadata in random order
    return safetensors.numpy.save(dict(tensors), metadata={"pmd": canonical_json(dict(facts))})


def _facts(content: bytes) -> dict[str, Any]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    try:
        facts = json.loads(header.get("__metadata__", {}).get("pmd", "{}"))
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _download(name: str, revision: str) -> str:
    try:
        from huggingface_hub import hf_hub_download  # noqa: PLC0415 - only the hub needs it
    except ModuleNotFoundError as error:
        raise PmdError(
            f"--weights {name}: the hub needs huggingface_hub: pip install 'pmd-flava[train]', or "
            "download the file and give its path"
        ) from error
    try:
        return str(hf_hub_download(name, WEIGHTS_NAME, revision=revision))
    except (OSError, ValueError) as error:
        raise PmdError(
            f"--weights {name}: {WEIGHTS_NAME} of {revision[:12]} cannot be had from the hub "
            f"({str(error).splitlines()[0]}); if the hub has a pickle, download it and convert it "
            "with `pmd codes convert`"
        ) from error
