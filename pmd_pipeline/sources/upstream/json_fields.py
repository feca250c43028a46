"""Values of untrusted JSON: of the expected type, or None."""

from typing import Any

_LARGEST = 1 << 53
"""Largest integer that every JSON reader represents exactly."""


def text_at(item: object, key: str) -> str | None:
    """The string under `key`; None if there is no such value."""
    value = item.get(key) if isinstance(item, dict) else None
    return value if isinstance(value, str) else None


def int_at(item: object, key: str) -> int | None:
    """The integer of at least 0 under `key`; None if there is no such value."""
    value = item.get(key) if isinstance(item, dict) else None
    is_valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST
    return value if is_valid else None


def number_at(item: object, key: str) -> float | None:
    """The number under `key`; None if there is no such value."""
    value = item.get(key) if isinstance(item, dict) else None
    is_valid = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_valid else None


def list_at(item: object, key: str) -> list[Any] | None:
    """The list under `key`; None if there is no such value."""
    value = item.get(key) if isinstance(item, dict) else None
    return value if isinstance(value, list) else None
