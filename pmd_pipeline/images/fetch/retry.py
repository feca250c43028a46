"""The retry policy: which failures are retried, and the wait before the next attempt.

The number of retries is `retries` of the recipe. `FetchClient.fetch` has the loop.
"""

import random

RETRYABLE = frozenset({"connect", "timeout", "http_429", "http_5xx"})
"""Failure reasons that may be temporary; every other response is final."""


def backoff_seconds(attempt: int) -> float:
    """Exponential backoff with jitter after the attempt of this number, which counts from 1."""
    return 2.0 ** (attempt - 1) * random.uniform(0.5, 1.0)
