"""Values out of JSON that anyone may have written: of the type asked for, or None."""

from typing import Any

_LARGEST = 1 << 53
"""Every reader of JSON holds whole numbers up to here exactly."""


def text_at(item: object, key: str) -> str | None:
    """The string under `key`; None where `item` is no object or has none there."""
    value = item.get(key) if isinstance(item, dict) else None
    return value if isinstance(value, str) else None


def int_at(item: object, key: str) -> int | None:
    """The whole number from 0 up under `key`; None where `item` is no object or has none there."""
    value = item.get(key) if isinstance(item, dict) else None
    sound = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST
    return value if sound else None


def number_at(item: object, key: str) -> float | None:
    """The number under `key`; None where `item` is no object or has none there."""
    value = item.get(key) if isinstance(item, dict) else None
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    return value if sound else None


def list_at(item: object, key: str) -> list[Any] | None:
    """The list under `key`; None where `item` is no object or has none there."""
    value = item.get(key) if isinstance(item, dict) else None
    return value if isinstance(value, list) else None
