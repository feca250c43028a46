"""The encoder of DALL-E's dVAE (Ramesh et al. 2021), for codes only: nothing here trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pmd_pipeline.codes.tokenizers.weights import Weights
from pmd_pipeline.contract.errors import PmdError

_BATCH = {"cpu": 8, "cuda": 64}
"""Images at a time; the widest output of a layer is 13 MB for each, in float32 at 112 pixels."""

_EPSILON = 0.1
"""How far OpenAI's `map_pixels` keeps values from 0 and 1."""


class Dalle:
    """The encoder on a device.

    Convolutions run in `dtype`, the last one in float32, as OpenAI's own code does. Its weights fix
    width, depth and vocabulary.
    """

    def __init__(self, weights: Weights, *, dtype: str, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise PmdError("there is no CUDA device here: give --device cpu")
        self.batch = _BATCH[device]
        self.versions = {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        }
        self._device = device
        self._tensors = {
            name: torch.from_numpy(array).to(
                device, torch.float32 if name.startswith("blocks.output") else getattr(torch, dtype)
            )
            for name, array in weights.tensors.items()
        }
        self._groups = [
            [f"blocks.group_{group}.block_{block}" for block in range(1, self._depth() + 1)]
            for group in range(1, 5)
        ]
        self._gain = 1 / sum(map(len, self._groups)) ** 2

    def codes(self, images: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """See `Tokenizer.codes`."""
        with _repeatable(), torch.inference_mode():
            pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)
            values = (1 - 2 * _EPSILON) * (pixels.float() / 255) + _EPSILON
            return self._logits(values).argmax(1).cpu().numpy().astype(np.uint16)

    def _depth(self) -> int:
        return sum(
            ".group_1." in name and name.endswith(".conv_1.weight") for name in self._tensors
        )

    def _logits(self, x: Tensor) -> Tensor:
        x = self._convolved("blocks.input", x)  # b w s s
        for number, group in enumerate(self._groups):
            if number:
                x = functional.max_pool2d(x, 2)
            for block in group:
                x = self._block(block, x)
        return self._convolved("blocks.output.conv", functional.relu(x))  # b v g g

    def _block(self, name: str, x: Tensor) -> Tensor:
        kept = self._convolved(f"{name}.id_path", x) if f"{name}.id_path.weight" in self else x
        for step in range(1, 5):
            x = self._convolved(f"{name}.res_path.conv_{step}", functional.relu(x))
        return kept + self._gain * x

    def _convolved(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        return functional.conv2d(x.to(weight.dtype), weight, bias, padding=weight.shape[-1] // 2)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors


def best_device() -> str:
    """`cuda` where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _repeatable() -> Iterator[None]:
    """Make sums run in one order: one thread, no TF32, no algorithm chosen by the clock."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)
