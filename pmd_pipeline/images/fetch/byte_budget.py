"""A budget of bytes in memory that several holders share."""

import threading


class ByteBudget:
    """Counts bytes in memory against a limit. Safe to use from any thread.

    `acquire` never blocks or fails. A caller that can wait polls `has_room`: a notification for
    each image would cost more time than polling.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.used = 0
        self._limit = limit
        self._lock = threading.Lock()

    def has_room(self, num_bytes: float) -> bool:
        """True if `num_bytes` more are within the limit."""
        return self.used + num_bytes <= self._limit

    def acquire(self, num_bytes: int) -> None:
        """Add to the bytes in use."""
        with self._lock:
            self.used += num_bytes

    def release(self, num_bytes: int) -> None:
        """Subtract from the bytes in use."""
        self.acquire(-num_bytes)
