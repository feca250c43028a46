"""Bytes that wait in memory, together no more than was agreed."""

import threading
from collections.abc import Callable


class Memory:
    """Bytes that all who hold some may hold together. Safe to use from any thread.

    Taking is never refused: who can wait asks `has_room` first.

    Args:
        limit: bytes.
        room: called by whoever gives bytes back, if somebody has asked for room in vain.
    """

    def __init__(self, limit: int, room: Callable[[], None]) -> None:
        self.used = 0
        self._limit = limit
        self._room = room
        self._is_awaited = False
        self._lock = threading.Lock()

    def has_room(self, num_bytes: float) -> bool:
        """Say whether so many bytes more are within the limit."""
        with self._lock:
            fits = self.used + num_bytes <= self._limit
            self._is_awaited |= not fits
            return fits

    def take(self, num_bytes: int) -> None:
        """Hold so many bytes more."""
        with self._lock:
            self.used += num_bytes

    def give(self, num_bytes: int) -> None:
        """Hold so many bytes less."""
        with self._lock:
            self.used -= num_bytes
            was_awaited, self._is_awaited = self._is_awaited, False
        if was_awaited:
            self._room()
