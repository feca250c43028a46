"""A requirements file of the installed versions, with hashes if a report of pip has them."""

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
    """One distribution at a version; `hashes` are the sha256 of files that pip may install."""

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
    """The installed versions of `requires` and of their requirements, by name.

    An extra is included if all its own requirements are installed. The local part of a version
    (`+cpu`) is left out: it names the build for this machine.

    Raises:
        PmdError: a requirement is not installed.
    """
    pinned: dict[str, Pin] = {}
    queue = [(one, NAME) for one in _applicable(requires, _installed_extras(requires))]
    seen = set[tuple[str, frozenset[str]]]()
    while queue:
        requirement, required_by = queue.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            installed = distribution(name)
        except PackageNotFoundError as error:
            raise PmdError(
                f"{required_by} needs {name}, which is not installed: install it"
            ) from error
        if name != NAME:
            pinned[name] = Pin(name, installed.version.partition("+")[0])
        extras = set(requirement.extras)
        queue += [(one, name) for one in _applicable(installed.requires or (), extras)]
    return [pinned[name] for name in sorted(pinned)]


def with_hashes(pinned: list[Pin], report: str) -> list[Pin]:
    """The pins with their hashes in the report of pip at `report`.

    Raises:
        PmdError: it is not a report of pip, or lacks one of them.
    """
    try:
        installs = _PipReport.model_validate_json(read_bytes(report)).install
    except ValidationError as error:
        raise PmdError(
            f"{report} is not a report of pip: write it with `{REPORT_COMMAND}`"
        ) from error
    hashes: dict[tuple[str, str], list[str]] = {}
    for one in installs:
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
    """The requirements file; its first line names this platform, since others need other files."""
    host = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    start = f"# Written by `pmd bundle` from what was installed where it ran: {host}.\n"
    return start + "".join(f"{pin}\n" for pin in pinned)


def _installed_extras(requires: Sequence[str]) -> set[str]:
    """Those of `EXTRAS` whose requirements are all installed."""
    always = {str(one) for one in _applicable(requires, set())}
    return {
        extra
        for extra in EXTRAS
        if all(
            _is_installed(one.name)
            for one in _applicable(requires, {extra})
            if str(one) not in always
        )
    }


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _applicable(requires: Sequence[str], extras: set[str]) -> list[Requirement]:
    """The requirements that apply to this machine and these extras."""
    return [
        one
        for one in map(Requirement, requires)
        if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in ("", *extras))
    ]
