"""Recipe files, written from the rules in a manifest."""

import tomllib
from collections.abc import Mapping
from typing import Any

import tomli_w
from pydantic import ValidationError

from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.models import SourceEntry
from pmd_pipeline.recipe import Recipe


def recipe_toml(source: str, entry: SourceEntry) -> str:
    """A recipe file that resolves to the rules of `entry`.

    Raises:
        PmdError: they are not rules of this version of the project.
    """
    text = f"# {source} as it was built: every rule that affects the data, defaults included.\n"
    text += tomli_w.dumps(_without_none(entry.rules))
    try:
        resolved = Recipe.model_validate(tomllib.loads(text)).rules()
    except ValidationError as error:
        resolved = {"refused": str(error)}
    if digest(resolved) != entry.rules_sha256:
        raise PmdError(
            f"the rules of {source} are not those of this version: bundle with the version that "
            "built it"
        )
    return text


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table without values that are None, which TOML cannot represent."""
    return {
        name: _without_none(value) if isinstance(value, Mapping) else value
        for name, value in table.items()
        if value is not None
    }
