"""The versions installed here as a requirements file, with hashes where they are known."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ValidationError

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import read_bytes
from pmd_pipeline.publish.bundle.project import NAME

EXTRAS = ("s3", "train", "hf")
"""Extras that are pinned where they are installed."""

REPORT_COMMAND = (
    "pip install --dry-run --no-deps --ignore-installed --report FILE -r requirements.txt"
)


@dataclass(frozen=True)
class Pin:
    """One distribution at its version; `hashes` are sha256 of files that pip may take for it."""

    name: str
    version: str
    hashes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        hashes = "".join(f" \\\n    --hash=sha256:{one}" for one in self.hashes)
        return f"{self.name}=={self.version}{hashes}"


class _Metadata(BaseModel):
    name: str
    version: str


class _Archive(BaseModel):
    hashes: dict[str, str]


class _Download(BaseModel):
    archive_info: _Archive | None = None


class _Installed(BaseModel):
    metadata: _Metadata
    download_info: _Download


class _PipReport(BaseModel):
    install: list[_Installed]


def pins(requires: Sequence[str]) -> list[Pin]:
    """What `requires` asks for, and what that needs in turn, as installed here, by name.

    An extra counts if all it names itself is installed. The local part of a version (`+cpu`) is
    left out: it says which build of it this machine took.

    Raises:
        PmdError: something of it is not installed.
    """
    found: dict[str, Pin] = {}
    waiting = [(one, NAME) for one in _needed(requires, _extras(requires))]
    seen = set[tuple[str, frozenset[str]]]()
    while waiting:
        requirement, asked_by = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            there = distribution(name)
        except PackageNotFoundError as error:
            raise PmdError(
                f"{asked_by} needs {name}, which is not installed: install it"
            ) from error
        if name != NAME:
            found[name] = Pin(name, there.version.partition("+")[0])
        waiting += [(one, name) for one in _needed(there.requires or (), set(requirement.extras))]
    return [found[name] for name in sorted(found)]


def with_hashes(pinned: list[Pin], report: str) -> list[Pin]:
    """The pins with the hashes that the pip report at `report` has of them.

    Raises:
        PmdError: it is no such report, or lacks one of them.
    """
    try:
        known = _PipReport.model_validate_json(read_bytes(report)).install
    except ValidationError as error:
        raise PmdError(f"{report} is no report of pip: write it with `{REPORT_COMMAND}`") from error
    hashes: dict[tuple[str, str], list[str]] = {}
    for one in known:
        key = canonicalize_name(one.metadata.name), one.metadata.version.partition("+")[0]
        archive = one.download_info.archive_info
        if archive and "sha256" in archive.hashes:
            hashes.setdefault(key, []).append(archive.hashes["sha256"])
    missing = [pin for pin in pinned if (pin.name, pin.version) not in hashes]
    if missing:
        raise PmdError(
            f"{report} has no sha256 of {missing[0]} and {len(missing) - 1} more: write it for the "
            f"same versions with `{REPORT_COMMAND}`"
        )
    return [Pin(pin.name, pin.version, sorted(hashes[pin.name, pin.version])) for pin in pinned]


def requirements_text(pinned: list[Pin]) -> str:
    """The requirements file, which says where it holds: other machines need other packages."""
    here = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    start = f"# Written by `pmd bundle` from what was installed where it ran: {here}.\n"
    return start + "".join(f"{pin}\n" for pin in pinned)


def _extras(requires: Sequence[str]) -> set[str]:
    """Those of `EXTRAS` of which all is installed."""
    always = {str(one) for one in _needed(requires, set())}
    return {
        extra
        for extra in EXTRAS
        if all(_is_there(one.name) for one in _needed(requires, {extra}) if str(one) not in always)
    }


def _is_there(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _needed(requires: Sequence[str], extras: set[str]) -> list[Requirement]:
    """What is asked for on this machine, with these extras."""
    return [
        one
        for one in map(Requirement, requires)
        if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in ("", *extras))
    ]
