"""The encoder of DALL-E's dVAE (Ramesh et al. 2021), for codes only: it cannot be trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pmd_pipeline.contract.errors import PmdError

BATCH = {"cpu": 8, "cuda": 64}
"""Images per batch; the widest output of a layer is 13 MB for each, in float32 at 112 pixels."""

_EPSILON = 0.1
"""Distance that OpenAI's `map_pixels` keeps from 0 and 1."""


class DvaeEncoder:
    """The encoder on a device.

    Convolutions run in `dtype`, the last one in float32, as in OpenAI's code. The weights determine
    width, depth and vocabulary.
    """

    def __init__(self, weights: Mapping[str, NDArray[Any]], *, dtype: str, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise PmdError("there is no CUDA device here: give --device cpu")
        self.versions = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        }
        self._device = device
        self._tensors = {
            name: torch.from_numpy(array).to(
                device, torch.float32 if name.startswith("blocks.output") else getattr(torch, dtype)
            )
            for name, array in weights.items()
        }
        self._groups = [
            [f"blocks.group_{group}.block_{block}" for block in range(1, self._depth() + 1)]
            for group in range(1, 5)
        ]
        self._gain = 1 / sum(map(len, self._groups)) ** 2

    def codes(self, images: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """See `Tokenizer.codes`."""
        with _deterministic(), torch.inference_mode():
            pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)
            values = (1 - 2 * _EPSILON) * (pixels.float() / 255) + _EPSILON
            return self._logits(values).argmax(1).cpu().numpy().astype(np.uint16)

    def _depth(self) -> int:
        return sum(
            ".group_1." in name and name.endswith(".conv_1.weight") for name in self._tensors
        )

    def _logits(self, x: Tensor) -> Tensor:
        x = self._convolution("blocks.input", x)  # b w s s
        for number, group in enumerate(self._groups):
            if number:
                x = functional.max_pool2d(x, 2)
            for block in group:
                x = self._block(block, x)
        return self._convolution("blocks.output.conv", functional.relu(x))  # b v g g

    def _block(self, name: str, x: Tensor) -> Tensor:
        has_projection = f"{name}.id_path.weight" in self._tensors
        identity = self._convolution(f"{name}.id_path", x) if has_projection else x
        for step in range(1, 5):
            x = self._convolution(f"{name}.res_path.conv_{step}", functional.relu(x))
        return identity + self._gain * x

    def _convolution(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return functional.conv2d(x.to(weight.dtype), weight, bias, padding=weight.shape[-1] // 2)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Sum in one order: one thread, no TF32, no algorithm chosen by measured time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)
