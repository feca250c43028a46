"""Map a function over tasks: in this process, over processes, or over a Ray cluster.

The only file that knows Ray. Tasks and results are small; what is large travels through files.
While a task runs it may tick: its counts so far reach the driver as datagrams, which need no lock,
survive any kill, and may get lost, since only reports are the record of truth.
"""

import ctypes
import json
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol, Self, TypeVar

from pmd_pipeline.contract.errors import PmdError

Task = TypeVar("Task")
Result = TypeVar("Result")

ReportProgress = Callable[[Mapping[str, int]], None]
"""Tells the driver a task's counts so far."""

OnProgress = Callable[[str, Mapping[str, int]], None]
"""Hears the ticks: `str` of the running task, and its counts so far."""

_TRIES = 3
"""How often a task is started before the worker's death is laid to it."""

_POLL_SECONDS = 0.25
_TICK_SECONDS = 0.5

_log = logging.getLogger(__name__)


class WorkerDied(PmdError):
    """A worker process died of this task each time; other tasks are not touched by it."""


class Pool(Protocol):
    """Somewhere to run tasks."""

    @property
    def workers(self) -> int:
        """How many run at a time, if there are as many."""
        ...

    def run(
        self,
        function: Callable[[Task, ReportProgress], Result],
        tasks: Iterable[Task],
        on_progress: OnProgress,
    ) -> Iterator[tuple[Task, Result | WorkerDied]]:
        """Results as they come, each with its task; a bounded number of tasks is in flight.

        What a task leaves in its process, such as a model, a later one may find there.
        An exception that `function` raises is raised here and ends the run.
        """
        ...


@contextmanager
def open_pool(
    runner: str, workers: int | None, ray_address: str | None, *, gpus: int = 0
) -> Iterator[Pool]:
    """A pool of `workers` (default: the machine's cores, or the cluster's).

    `runner` is `local` or `ray`; one local worker is this very process. With `ray_address` the pool
    is a running cluster (`auto` for the one of this machine), else Ray is started here. On Ray each
    task has `gpus` GPUs to itself.
    """
    count = workers or os.cpu_count() or 1
    pool: _Here | _Processes | _Ray
    if runner == "ray":
        pool = _Ray(workers, ray_address, gpus)
    else:
        pool = _Here() if count == 1 else _Processes(count)
    try:
        yield pool
    finally:
        pool.close()


def ignore_progress(_name: str, _counts: Mapping[str, int]) -> None:
    """OnProgress nothing."""


def in_order(
    pool: Pool,
    function: Callable[[Task, ReportProgress], Result],
    tasks: Sequence[Task],
    on_progress: OnProgress,
) -> list[Result]:
    """The results of all tasks, in the order of the tasks.

    Raises:
        WorkerDied: a worker died of a task.
    """
    results: dict[int, Result] = {}
    for task, result in pool.run(function, tasks, on_progress):
        if isinstance(result, WorkerDied):
            raise result
        results[id(task)] = result
    return [results[id(task)] for task in tasks]


class _Here:
    @property
    def workers(self) -> int:
        return 1

    def close(self) -> None:
        """Nothing is open."""

    def run(
        self,
        function: Callable[[Task, ReportProgress], Result],
        tasks: Iterable[Task],
        on_progress: OnProgress,
    ) -> Iterator[tuple[Task, Result | WorkerDied]]:
        for task in tasks:
            yield task, function(task, partial(on_progress, str(task)))


class _Processes:
    """Processes of this machine, started when there is more than one task for them."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    @property
    def workers(self) -> int:
        return self._workers

    def close(self) -> None:
        if self._executor:
            _end(self._executor)
            self._executor = None

    def run(
        self,
        function: Callable[[Task, ReportProgress], Result],
        tasks: Iterable[Task],
        on_progress: OnProgress,
    ) -> Iterator[tuple[Task, Result | WorkerDied]]:
        head = list(islice(queue := iter(tasks), 2))
        if len(head) < 2:
            yield from _Here().run(function, head, on_progress)
            return
        queue = chain(head, queue)
        suspects: list[Task] = []
        with _ProgressChannel("127.0.0.1", on_progress) as ticks:
            while True:
                self._executor = self._executor or _start(self.workers)
                yield from _until_broken(
                    self._executor, 2 * self.workers, function, queue, suspects, ticks
                )
                if not suspects:
                    return
                self.close()
                for task in suspects:  # alone, so that the culprit takes nobody with it
                    yield task, _alone(function, task, ticks)
                suspects.clear()


def _until_broken(
    executor: ProcessPoolExecutor,
    in_flight: int,
    function: Callable[[Task, ReportProgress], Result],
    queue: Iterator[Task],
    suspects: list[Task],
    ticks: "_ProgressChannel",
) -> Iterator[tuple[Task, Result]]:
    """Run tasks until the queue is empty, or a worker dies: then its neighbours are suspects."""
    running: dict[Future[Result], Task] = {}
    waiting: list[Task] = []  # the task that a broken pool refuses must not be lost
    try:
        while True:
            for task in islice(queue, in_flight - len(running)):
                waiting.append(task)
                running[executor.submit(function, task, ticks.ticker(task))] = task
                waiting.pop()
            if not running:
                return
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            ticks.hear()
            for future in done:
                result = future.result()
                yield running.pop(future), result
    except BrokenProcessPool:
        suspects += [*running.values(), *waiting]


def _alone(
    function: Callable[[Task, ReportProgress], Result], task: Task, ticks: "_ProgressChannel"
) -> Result | WorkerDied:
    for _ in range(_TRIES - 1):
        executor = _start(1)
        try:
            future = executor.submit(function, task, ticks.ticker(task))
            while not wait([future], timeout=_POLL_SECONDS).done:
                ticks.hear()
            return future.result()
        except BrokenProcessPool:
            _log.warning("a worker died of %s", task)
        finally:
            _end(executor)
    return WorkerDied(f"a worker process died {_TRIES} times of {task}")


def _start(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(),),
    )


def _end(executor: ProcessPoolExecutor) -> None:
    """End the worker processes at once: what is done is on disk, what is not is nobody's."""
    processes = list((executor._processes or {}).values())  # noqa: SLF001 - public since 3.14
    for process in processes:
        process.kill()
    executor.shutdown(wait=True, cancel_futures=True)


def _start_worker(driver: int) -> None:
    """Die with the driver, however it dies, and leave Ctrl-C to it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker for each core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != driver:
            os._exit(1)


class _Ray:
    """A cluster, joined or started when there is more than one task for it."""

    def __init__(self, workers: int | None, address: str | None, gpus: int) -> None:
        self._workers = workers or (None if address else os.cpu_count() or 1)
        self._address = address
        self._gpus = gpus
        self._connected = False

    @property
    def workers(self) -> int:
        if self._workers is None:  # the cluster knows
            self._connect()
        return self._workers or 1

    def close(self) -> None:
        if self._connected:
            import ray  # noqa: PLC0415 - see _connect

            ray.shutdown()

    def _connect(self) -> None:
        if self._connected:
            return
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray  # noqa: PLC0415 - takes a second, and a run of one task does without

        place = (
            {"address": self._address}
            if self._address
            else {
                "address": "local",  # else Ray joins whatever cluster it finds on the machine
                "num_cpus": self._workers,
                "include_dashboard": False,
                "log_to_driver": False,
            }
        )
        # what the driver was told by its environment, workers on other machines must hear too
        told = {name: value for name, value in os.environ.items() if name.startswith("PMD_")}
        try:
            if self._address and ":" in self._address.removeprefix("ray://"):
                host, _, port = self._address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), 10.0).close()  # Ray waits for minutes
            ray.init(
                logging_level=logging.ERROR,
                runtime_env={"env_vars": told} if told else None,
                **place,
            )
        except (OSError, ValueError, RuntimeError) as error:
            where = self._address or "on this machine"
            raise PmdError(f"cannot start or join Ray {where}: {error}") from error
        self._connected = True
        self._workers = self._workers or int(ray.cluster_resources().get("CPU", 1))

    def run(
        self,
        function: Callable[[Task, ReportProgress], Result],
        tasks: Iterable[Task],
        on_progress: OnProgress,
    ) -> Iterator[tuple[Task, Result | WorkerDied]]:
        head = list(islice(queue := iter(tasks), 2))
        if len(head) < 2 and not self._address:
            yield from _Here().run(function, head, on_progress)
            return
        self._connect()
        import ray  # noqa: PLC0415 - see _connect

        if self._gpus > ray.cluster_resources().get("GPU", 0):
            raise PmdError("Ray has no GPU here, and tasks would wait for one: give --device cpu")
        remote = ray.remote(
            num_cpus=1,
            num_gpus=self._gpus,
            max_calls=0,  # else a worker with a GPU ends after each task, and its model with it
            max_retries=_TRIES - 1,
        )(function)
        queue = chain(head, queue)
        running: dict[Any, Task] = {}
        with _ProgressChannel(ray.util.get_node_ip_address(), on_progress) as ticks:
            while True:
                for task in islice(queue, self.workers * 2 - len(running)):
                    running[remote.remote(task, ticks.ticker(task))] = task
                if not running:
                    return
                done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
                ticks.hear()
                for reference in done:
                    task = running.pop(reference)
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause from error
                    except (
                        ray.exceptions.WorkerCrashedError,
                        ray.exceptions.OutOfMemoryError,
                        ray.exceptions.NodeDiedError,
                        ray.exceptions.ObjectLostError,
                    ):
                        yield task, WorkerDied(f"a worker process died {_TRIES} times of {task}")
                    else:
                        yield task, result


class _ProgressChannel:
    """The driver's ear: a datagram socket, and a token so that nobody else is heard."""

    def __init__(self, host: str, on_progress: OnProgress) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self._socket.setblocking(False)
        self._token = secrets.token_hex(8)
        self._on_progress = on_progress

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ticker(self, task: object) -> "_Ticker":
        return _Ticker(self._socket.getsockname(), self._token, str(task))

    def hear(self) -> None:
        while True:
            try:
                said = json.loads(self._socket.recv(4096))
            except BlockingIOError:
                return
            except (ValueError, RecursionError):  # somebody else's datagram
                continue
            if isinstance(said, list) and said[:1] == [self._token]:
                _, name, counts = said
                self._on_progress(name, counts)


@dataclass
class _Ticker:
    address: tuple[str, int]
    token: str
    name: str
    last: float = 0.0

    def __call__(self, counts: Mapping[str, int]) -> None:
        now = time.monotonic()
        if now - self.last < _TICK_SECONDS:
            return
        self.last = now
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            out.sendto(json.dumps([self.token, self.name, dict(counts)]).encode(), self.address)
