"""Recipes again, from the rules that a manifest holds."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.models import SourceEntry
from pmd_pipeline.recipe import Recipe

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def recipe_toml(source: str, entry: SourceEntry) -> str:
    """A recipe file that resolves to the rules of `entry`.

    Raises:
        PmdError: they are not rules of this version of the project.
    """
    text = f"# {source} as it was built: every rule that shapes the data, defaults included.\n"
    text += "\n".join(_table((), entry.rules)) + "\n"
    try:
        again = Recipe.model_validate(tomllib.loads(text)).rules()
    except ValidationError as error:
        again = {"refused": str(error)}
    if digest(again) != entry.rules_sha256:
        raise PmdError(
            f"the rules of {source} are not those of this version: bundle with the version that "
            "built it"
        )
    return text


def _table(path: tuple[str, ...], values: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a table: its own values, then the tables in it. None has no place in TOML."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Mapping):
            yield f"{_key(name)} = {_value(value)}"
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield ""
            yield f"[{'.'.join(map(_key, (*path, name)))}]"
            yield from _table((*path, name), value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _text(name)


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        pairs = (f"{_key(name)} = {_value(inner)}" for name, inner in value.items())
        return f"{{{', '.join(pairs)}}}"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
