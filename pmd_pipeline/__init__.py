"""Rebuild, curate and inspect image-text datasets; see `docs/python.md`.

The names below are loaded when they are first used, so importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmd_pipeline.api import BuildResult, Dataset, PmdError, Sample, build, open_manifest

__all__ = ["BuildResult", "Dataset", "PmdError", "Sample", "build", "open_manifest"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any of the names above
    if name in __all__:
        return getattr(import_module("pmd_pipeline.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
