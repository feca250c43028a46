"""Faults of one shard, and the checks that apply to every file."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import open_read, read_bytes
from pmd_pipeline.contract.models import Report

Model = TypeVar("Model", bound=BaseModel)

_MAX_FAULTS = 20
"""Faults that are listed of one shard."""


class Fault(NamedTuple):
    """What is wrong with a file: a sentence that continues its path."""

    path: str
    description: str


@dataclass
class ShardFindings:
    """Results of the checks of one shard.

    Args:
        report: None if it cannot be read.
        keys: first and last key of the ledger, if it was read.
        image_hashes: the first 64 bits of the SHA-256 of each fetched image, as uint64.
    """

    faults: list[Fault] = field(default_factory=list)
    report: Report | None = None
    keys: tuple[str, str] | None = None
    image_hashes: bytes = b""

    def add(self, path: str, description: str) -> None:
        """Add a fault, unless the list is full."""
        if len(self.faults) == _MAX_FAULTS:
            self.faults.append(Fault(path, "has further faults, which are not listed"))
        elif len(self.faults) < _MAX_FAULTS:
            self.faults.append(Fault(path, description))

    @contextmanager
    def catch_errors(self, path: str) -> Iterator[None]:
        """Add a fault of `path` for a PmdError in the block, and go on."""
        try:
            yield
        except PmdError as error:
            self.add(path, str(error).removeprefix(f"cannot read {path}: "))


class Content(NamedTuple):
    """SHA-256 and size of a file's content."""

    sha256: str
    num_bytes: int

    @classmethod
    def of(cls, content: bytes) -> "Content":
        """The SHA-256 and size of bytes in memory."""
        return cls(hashlib.sha256(content).hexdigest(), len(content))


def load_json(model: type[Model], path: str, findings: ShardFindings) -> Model | None:
    """The model in a JSON file; None, with a fault, if it cannot be read."""
    with findings.catch_errors(path):
        try:
            return model.model_validate_json(read_bytes(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"])
            findings.add(path, f"is no report of this version ({where}: {first['msg'].lower()})")
    return None


def check_size(path: str, num_bytes: int, findings: ShardFindings) -> None:
    """Check the size of a file without reading it."""
    with findings.catch_errors(path), open_read(path) as file:
        actual = file.seek(0, 2)
        if actual != num_bytes:
            findings.add(path, f"has {actual:,} bytes instead of {num_bytes:,}")


def check_content(path: str, actual: Content, expected: Content, findings: ShardFindings) -> None:
    """Check size and SHA-256 of a file that has been read."""
    if actual.num_bytes != expected.num_bytes:
        findings.add(path, f"has {actual.num_bytes:,} bytes instead of {expected.num_bytes:,}")
    elif actual.sha256 != expected.sha256:
        findings.add(path, f"has changed: its SHA-256 is {actual.sha256}, not {expected.sha256}")
