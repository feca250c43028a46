"""Canonical JSON, and the digests that are made of it."""

import hashlib
import json


def canonical_json(value: object) -> str:
    """JSON with sorted keys, no blanks and no escapes beyond what JSON demands."""
    return _CANONICAL.encode(value)


def digest(value: object) -> str:
    """sha256 of the canonical JSON of `value`, as hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
