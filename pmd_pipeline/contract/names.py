"""Strings of stored files that become paths: validated where the file is read, once for all.

A manifest, a lock file or a report may come from a stranger. A name that could leave its folder
makes the whole file invalid.
"""

import re
from typing import Annotated

from pydantic import AfterValidator

from pmd_pipeline.contract.plugins import is_reference

_MODULE = re.compile("[a-z][a-z0-9_]{0,63}")
_HEX = re.compile(r"[0-9a-f]{64}")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")
SCHEMES = frozenset({"abfs", "az", "file", "gcs", "gs", "hf", "http", "https", "memory", "s3"})
"""Protocols of addresses that a manifest may name."""


def _check_segment(name: str) -> str:
    is_safe = 0 < len(name) < 256 and name.isprintable() and not name.startswith(".")
    if not is_safe or "/" in name or "\\" in name:
        raise ValueError(f"{name[:80]!r} is no name of a file: no slashes, no dot at its beginning")
    return name


def _check_relative(path: str) -> str:
    for segment in path.split("/"):
        _check_segment(segment)
    return path


def _check_sha256(digest: str) -> str:
    if not _HEX.fullmatch(digest):
        raise ValueError(f"{digest[:80]!r} is no SHA-256 of 64 hex digits")
    return digest


def _check_address(address: str) -> str:
    scheme = _SCHEME.match(address)
    if scheme and scheme[1] not in SCHEMES:
        raise ValueError(f"{address[:80]!r} has a protocol other than {', '.join(sorted(SCHEMES))}")
    if not address.isprintable() or "::" in address or "\\" in address:
        raise ValueError(f"{address[:80]!r} is no path or address of a file")
    return address


def _tokenizer(name: str) -> str:
    if len(name) > 255 or not (_MODULE.fullmatch(name) or is_reference(name)):
        raise ValueError(f"{name[:80]!r} is no name of an image tokenizer, and no module:function")
    return name


FileName = Annotated[str, AfterValidator(_check_segment)]
"""One segment of a path, which never leads out of its folder; not a hidden file's."""

RelativePath = Annotated[str, AfterValidator(_check_relative)]
"""File names with `/` between them: a file in a folder or below it, never outside."""

Sha256 = Annotated[str, AfterValidator(_check_sha256)]
"""A SHA-256 as 64 hex digits in lower case."""

Address = Annotated[str, AfterValidator(_check_address)]
"""A relative or absolute path, or an address of one of `SCHEMES`."""

TokenizerName = Annotated[str, AfterValidator(_tokenizer)]
"""An image tokenizer of the package, or `module:function` of its author. Nothing imports what a
stored file names: only `--tokenizer` does."""
