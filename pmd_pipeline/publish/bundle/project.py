"""This project as a distribution: the metadata of its wheel, and its requirements."""

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
    """Metadata from `pyproject.toml`, or from the installed wheel.

    Args:
        requires: requirements; those of an extra have a marker `extra == ...`.
        metadata: files of the wheel's `dist-info`, by name.
    """

    version: str
    requires: list[str]
    metadata: dict[str, str]


def this_project() -> Project:
    """The checkout that this code runs from, else the installation.

    The metadata of an editable installation may be older than the checkout.

    Raises:
        PmdError: there is neither.
    """
    pyproject = CHECKOUT / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == NAME:
            return _from_checkout(project)
    try:
        installed = distribution(NAME)
    except PackageNotFoundError as error:
        raise PmdError(f"{NAME} is not installed here: pip install it, or give --wheel") from error
    names = ("METADATA", "entry_points.txt", "licenses/LICENSE")
    metadata = {name: text for name in names if (text := installed.read_text(name))}
    return Project(installed.version, list(installed.requires or ()), metadata)


def _from_checkout(project: dict[str, Any]) -> Project:
    extras = project.get("optional-dependencies", {})
    requires = [*project["dependencies"]]
    requires += [_with_extra(one, extra) for extra, listed in extras.items() for one in listed]
    files = [CHECKOUT / name for name in project["license-files"]]
    return Project(
        version=project["version"],
        requires=requires,
        metadata={
            "METADATA": "\n".join(_metadata_lines(project, list(extras), requires)),
            "entry_points.txt": _entry_points(project["scripts"]),
            **{f"licenses/{path.name}": path.read_text(encoding="utf-8") for path in files},
        },
    )


def _with_extra(requirement: str, extra: str) -> str:
    parsed = Requirement(requirement)
    extra_marker = f'extra == "{extra}"'
    parsed.marker = Marker(
        f"({parsed.marker}) and {extra_marker}" if parsed.marker else extra_marker
    )
    return str(parsed)


def _metadata_lines(
    project: dict[str, Any], extras: list[str], requires: list[str]
) -> Iterator[str]:
    yield "Metadata-Version: 2.4"
    yield f"Name: {NAME}"
    yield f"Version: {project['version']}"
    yield f"Summary: {project['description']}"
    yield f"License-Expression: {project['license']}"
    yield from (f"License-File: {name}" for name in project["license-files"])
    yield f"Requires-Python: {project['requires-python']}"
    yield from (f"Requires-Dist: {Requirement(one)}" for one in requires)
    yield from (f"Provides-Extra: {extra}" for extra in extras)
    yield "Description-Content-Type: text/markdown"
    yield ""
    yield (CHECKOUT / project["readme"]).read_text(encoding="utf-8")


def _entry_points(scripts: dict[str, str]) -> str:
    return "[console_scripts]\n" + "".join(
        f"{name} = {target}\n" for name, target in scripts.items()
    )
