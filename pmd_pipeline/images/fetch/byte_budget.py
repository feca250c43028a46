"""Bytes that wait in memory, together no more than was agreed."""

import threading


class ByteBudget:
    """Bytes that all who hold some may hold together. Safe to use from any thread.

    Taking is never refused, and nobody is told when there is room again: who can wait asks
    `has_room` now and then. A message for each image would cost more than the images' bytes.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.used = 0
        self._limit = limit
        self._lock = threading.Lock()

    def has_room(self, num_bytes: float) -> bool:
        """Say whether so many bytes more are within the limit."""
        return self.used + num_bytes <= self._limit

    def take(self, num_bytes: int) -> None:
        """Hold so many bytes more."""
        with self._lock:
            self.used += num_bytes

    def give(self, num_bytes: int) -> None:
        """Hold so many bytes less."""
        self.take(-num_bytes)
