"""Image tokenizers: a square picture becomes a grid of codes, one for each 8 x 8 pixels.

DALL-E's dVAE is what FLAVA learned from. Patch k-means stands in for it where its weights are not
at hand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pmd_pipeline.codes.tokenizers.kmeans import KMeans
from pmd_pipeline.codes.tokenizers.weights import Weights
from pmd_pipeline.contract.errors import PmdError

DTYPES = ("float32", "bfloat16", "float16")
"""What the dVAE computes in; k-means is exact in any."""


class Tokenizer(Protocol):
    """Weights that are loaded where they compute.

    Args:
        batch: images that are best given at a time.
        versions: libraries and the device that shape codes.
    """

    batch: int
    versions: dict[str, str]

    def codes(self, images: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """The codes [b, g, g] of RGB images [b, 8 g, 8 g, 3].

        The same images in the same batch give the same codes, whatever else the machine does.
        """
        ...


def open_tokenizer(weights: Weights, *, dtype: str = "float32", device: str = "cpu") -> Tokenizer:
    """The tokenizer with these weights, on `device` (`cpu` or `cuda`).

    Raises:
        PmdError: torch is needed and not installed, or there is no such device.
    """
    if weights.tokenizer == "kmeans":
        return KMeans(weights.tensors["centroids"])
    with _torch_needed():
        from pmd_pipeline.codes.tokenizers.dalle import Dalle  # noqa: PLC0415 - k-means needs no torch
    return Dalle(weights, dtype=dtype, device=device)


def best_device(weights: Weights) -> str:
    """`cuda` where this machine has a GPU that is of use to the tokenizer, else `cpu`.

    Raises:
        PmdError: torch is needed and not installed.
    """
    if weights.tokenizer == "kmeans":
        return "cpu"
    with _torch_needed():
        from pmd_pipeline.codes.tokenizers import dalle  # noqa: PLC0415 - k-means needs no torch
    return dalle.best_device()


@contextmanager
def _torch_needed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise PmdError(
            "DALL-E's image tokenizer needs torch: pip install 'pmd-flava[train]', or leave "
            "--weights out for k-means"
        ) from error
