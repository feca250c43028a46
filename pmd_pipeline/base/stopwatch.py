"""When a task began, how long it took, and on which machine."""

import socket
import time
from collections.abc import Mapping

from pmd_pipeline.contract.models import Timing


class Stopwatch:
    """Measures one task from the moment that it is made."""

    def __init__(self) -> None:
        self._started = time.time()
        self._clock = time.monotonic()

    def timing(self, attempts: Mapping[str, int] | None = None) -> Timing:
        """The time until now; `attempts` as in `Timing`."""
        return Timing(
            started=self._started,
            seconds=time.monotonic() - self._clock,
            host=socket.gethostname(),
            attempts=dict(attempts or {}),
        )
