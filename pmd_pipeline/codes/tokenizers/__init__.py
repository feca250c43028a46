"""Image tokenizers: a tokenizer turns a square image into a grid of codes, one for each patch.

A tokenizer is a module of this package with a function `open_tokenizer`, or the user's own
`module:function` with the same parameters. `dalle` is DALL-E's dVAE, which FLAVA predicts;
`kmeans` (patch k-means) replaces it where its weights are not available.
"""

import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import sha256_of
from pmd_pipeline.contract.plugins import is_reference, load_reference
from pmd_pipeline.contract.suggestions import suggestion

Pixels: TypeAlias = NDArray[np.uint8]
Codes: TypeAlias = NDArray[np.uint16]

MAX_VOCABULARY = 1 << 16
"""Codes are stored as uint16."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer, opened on the device where it computes.

    Args:
        patch_size: side of a patch, in pixels.
        vocabulary: codes are 0 to `vocabulary - 1`.
        codes: codes [b, g, g] of RGB images [b, g * patch_size, g * patch_size, 3]. The same batch
            must give the same codes on every call.
        batch: images per call of `codes`; the last call of a shard has fewer.
        devices: `cpu`, `cuda` or both, the preferred one first.
        versions: libraries and hardware that affect codes.
        weights_sha256: identity of the weights, where several files hold the same weights. None:
            SHA-256 of the file of weights.
    """

    patch_size: int
    vocabulary: int
    codes: Callable[[Pixels], Codes]
    batch: int = 64
    devices: tuple[str, ...] = ("cpu",)
    versions: Mapping[str, str] = field(default_factory=dict)
    weights_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.batch < 1:
            raise ValueError("patch_size and batch are at least 1")
        if not 1 <= self.vocabulary <= MAX_VOCABULARY:
            raise ValueError(f"a vocabulary has 1 to {MAX_VOCABULARY:,} codes")


def tokenizer_names() -> list[str]:
    """Names of the tokenizers of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def open_tokenizer(
    name: str, weights: str | None, *, dtype: str = "float32", device: str = "cpu"
) -> Tokenizer:
    """The tokenizer `name` with the weights at the address `weights`.

    `weights_sha256` of the result is never None; without weights it is the SHA-256 of no bytes.

    Args:
        name: a module of this package, or the user's `module:function`.
        weights: None for a tokenizer without weights.
        dtype: of the arithmetic, as torch names it.
        device: `cpu` or `cuda`.

    Raises:
        PmdError: there is no such tokenizer, or it does not accept the weights, dtype or device.
    """
    if is_reference(name):
        opener = load_reference(name)
    elif name in tokenizer_names():
        opener = importlib.import_module(f"{__name__}.{name}").open_tokenizer
    else:
        near = suggestion(name, tokenizer_names())
        raise PmdError(
            f"--tokenizer {name}: there is no such tokenizer; {near}; your own is module:function"
        )
    tokenizer = opener(weights, dtype=dtype, device=device)
    if not isinstance(tokenizer, Tokenizer):
        raise PmdError(
            f"--tokenizer {name}: it returns {type(tokenizer).__name__}, and must return a "
            f"{__name__}.Tokenizer"
        )
    if tokenizer.weights_sha256 is not None:
        return tokenizer
    sha256 = hashlib.sha256().hexdigest() if weights is None else sha256_of(weights)
    return replace(tokenizer, weights_sha256=sha256)


def best_device(tokenizer: Tokenizer) -> str:
    """The first of the tokenizer's devices that this machine has."""
    return next((one for one in tokenizer.devices if one != "cuda" or _has_cuda()), "cpu")


def _has_cuda() -> bool:
    try:
        import torch  # noqa: PLC0415 - only a tokenizer for GPUs needs it
    except ModuleNotFoundError:
        return False
    return torch.cuda.is_available()
