"""This project as a distribution: what a wheel of it says, and what it needs."""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement

from pmd_pipeline.contract.errors import PmdError

NAME = "pmd-flava"

CHECKOUT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Project:
    """What stands in `pyproject.toml`, or in the papers of the installed wheel.

    Args:
        requires: requirements, with a marker `extra == ...` where they are an extra's.
        papers: files of the wheel's `dist-info`, by name.
    """

    version: str
    requires: list[str]
    papers: dict[str, str]


def this_project() -> Project:
    """The checkout that this code runs from, else the installation.

    A checkout speaks for itself: the papers of an editable installation are as old as that.

    Raises:
        PmdError: there is neither.
    """
    pyproject = CHECKOUT / "pyproject.toml"
    if pyproject.is_file():
        stated = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
        if stated.get("name") == NAME:
            return _from_checkout(stated)
    try:
        installed = distribution(NAME)
    except PackageNotFoundError as error:
        raise PmdError(f"{NAME} is not installed here: pip install it, or give --wheel") from error
    names = ("METADATA", "entry_points.txt", "licenses/LICENSE")
    papers = {name: text for name in names if (text := installed.read_text(name))}
    return Project(installed.version, list(installed.requires or ()), papers)


def _from_checkout(stated: dict[str, Any]) -> Project:
    extras = stated.get("optional-dependencies", {})
    requires = [*stated["dependencies"]]
    requires += [_of_extra(one, extra) for extra, listed in extras.items() for one in listed]
    files = [CHECKOUT / name for name in stated["license-files"]]
    return Project(
        version=stated["version"],
        requires=requires,
        papers={
            "METADATA": "\n".join(_metadata(stated, list(extras), requires)),
            "entry_points.txt": _entry_points(stated["scripts"]),
            **{f"licenses/{path.name}": path.read_text(encoding="utf-8") for path in files},
        },
    )


def _of_extra(requirement: str, extra: str) -> str:
    parsed = Requirement(requirement)
    of_extra = f'extra == "{extra}"'
    parsed.marker = Marker(f"({parsed.marker}) and {of_extra}" if parsed.marker else of_extra)
    return str(parsed)


def _metadata(stated: dict[str, Any], extras: list[str], requires: list[str]) -> Iterator[str]:
    yield "Metadata-Version: 2.4"
    yield f"Name: {NAME}"
    yield f"Version: {stated['version']}"
    yield f"Summary: {stated['description']}"
    yield f"License-Expression: {stated['license']}"
    yield from (f"License-File: {name}" for name in stated["license-files"])
    yield f"Requires-Python: {stated['requires-python']}"
    yield from (f"Requires-Dist: {Requirement(one)}" for one in requires)
    yield from (f"Provides-Extra: {extra}" for extra in extras)
    yield "Description-Content-Type: text/markdown"
    yield ""
    yield (CHECKOUT / stated["readme"]).read_text(encoding="utf-8")


def _entry_points(scripts: dict[str, str]) -> str:
    return "[console_scripts]\n" + "".join(f"{name} = {at}\n" for name, at in scripts.items())
