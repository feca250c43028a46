"""Progress of tasks, sent from workers to the driver as datagrams.

A datagram needs no lock and survives any kill of a worker. A lost one does no harm, since only
reports count.
"""

import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

_SEND_SECONDS = 0.5
"""Least time between two datagrams of one task."""


class ProgressChannel:
    """A datagram socket of the driver, with a token that authenticates its workers.

    Args:
        host: address of the driver that workers can reach.
        on_progress: receives the name of a running task and its counts so far.
    """

    def __init__(self, host: str, on_progress: Callable[[str, Mapping[str, int]], None]) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self._socket.setblocking(False)
        self._token = secrets.token_hex(8)
        self._on_progress = on_progress

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def sender(self, task: object) -> "ProgressSender":
        """A function for the worker of `task`, which sends its counts."""
        return ProgressSender(self._socket.getsockname(), self._token, str(task))

    def receive(self) -> None:
        """Pass on all messages that have arrived."""
        while True:
            try:
                message = json.loads(self._socket.recv(4096))
            except BlockingIOError:
                return
            except (ValueError, RecursionError):  # from another program
                continue
            if isinstance(message, list) and message[:1] == [self._token]:
                _, name, counts = message
                self._on_progress(name, counts)


@dataclass
class ProgressSender:
    """Sends the counts of one task to the driver; see `ProgressChannel.sender`."""

    address: tuple[str, int]
    token: str
    name: str
    last_time: float = 0.0

    def __call__(self, counts: Mapping[str, int]) -> None:
        """Send the counts, unless the last message is too recent."""
        now = time.monotonic()
        if now - self.last_time < _SEND_SECONDS:
            return
        self.last_time = now
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            out.sendto(json.dumps([self.token, self.name, dict(counts)]).encode(), self.address)
