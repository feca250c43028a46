"""Map a function over tasks: in this process, over processes, or over a Ray cluster.

The only module that imports Ray. Tasks and results are small; large data goes through files.
A running task reports its counts through `progress_channel`.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol, TypeVar

from pmd_pipeline.base.progress_channel import ProgressChannel
from pmd_pipeline.contract.errors import PmdError

Task = TypeVar("Task")
Result = TypeVar("Result")

ReportProgress = Callable[[Mapping[str, int]], None]
"""Sends the counts of a task so far to the driver."""

OnProgress = Callable[[str, Mapping[str, int]], None]
"""Receives the name of a running task and its counts so far."""

_MAX_CRASHES = 3
"""Crashes of its worker after which a task fails; one crash may have another cause."""

_POLL_SECONDS = 0.25
"""Time between two looks for progress while no task ends."""

_log = logging.getLogger(__name__)


class WorkerDied(PmdError):
    """A worker process died each time that it ran this task; other tasks go on."""


class Pool(Protocol):
    """Runs tasks."""

    @property
    def workers(self) -> int:
        """Most tasks that run at a time."""
        ...

    def run(
        self,
        function: Callable[[Task, ReportProgress], Result],
        tasks: Iterable[Task],
        on_progress: OnProgress,
    ) -> Iterator[tuple[Task, Result | WorkerDied]]:
        """Results in order of completion, each with its task; a bounded number is in flight.

        A task may cache objects in its process, such as a model, for later tasks.
        An exception that `function` raises is raised here and ends the run.
        """
        ...


@contextmanager
def open_pool(
    runner: str, workers: int | None, ray_address: str | None, *, gpus: int = 0
) -> Iterator[Pool]:
    """A pool of `workers` (default: the machine's cores, or the cluster's).

    Args:
        runner: `local` or `ray`; one local worker is this process itself.
        ray_address: of a running cluster, or `auto` for this machine's; None starts Ray here.
        gpus: GPUs that each task has to itself, on Ray.
    """
    count = workers or os.cpu_count() or 1
    pool: _ThisProcess | _ProcessPool | _RayCluster
    if runner == "ray":
        pool = _RayCluster(workers, ray_address, gpus)
    else:
        pool = _ThisProcess() if count == 1 else _ProcessPool(count)
    try:
        yield pool
    finally:
        pool.close()


def ignore_progress(_name: str, _counts: Mapping[str, int]) -> None:
    """An `OnProgress` that does nothing."""


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


class _ThisProcess:
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


class _ProcessPool:
    """Processes of this machine, started when there is more than one task."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    @property
    def workers(self) -> int:
        return self._workers

    def close(self) -> None:
        if self._executor:
            _kill_executor(self._executor)
            self._executor = None

    def run(
        self,
        function: Callable[[Task, ReportProgress], Result],
        tasks: Iterable[Task],
        on_progress: OnProgress,
    ) -> Iterator[tuple[Task, Result | WorkerDied]]:
        head = list(islice(queue := iter(tasks), 2))
        if len(head) < 2:
            yield from _ThisProcess().run(function, head, on_progress)
            return
        queue = chain(head, queue)
        suspects: list[Task] = []
        with ProgressChannel("127.0.0.1", on_progress) as channel:
            while True:
                self._executor = self._executor or _start_executor(self.workers)
                yield from _run_until_crash(
                    self._executor, 2 * self.workers, function, queue, suspects, channel
                )
                if not suspects:
                    return
                self.close()
                for task in suspects:  # one at a time: a crash then concerns this task only
                    yield task, _run_isolated(function, task, channel)
                suspects.clear()


def _run_until_crash(
    executor: ProcessPoolExecutor,
    in_flight: int,
    function: Callable[[Task, ReportProgress], Result],
    queue: Iterator[Task],
    suspects: list[Task],
    channel: ProgressChannel,
) -> Iterator[tuple[Task, Result]]:
    """Run tasks until the queue is empty or a worker dies; then all running tasks are suspects."""
    running: dict[Future[Result], Task] = {}
    submitting: list[Task] = []  # a broken pool refuses a task, which must not be lost
    try:
        while True:
            for task in islice(queue, in_flight - len(running)):
                submitting.append(task)
                running[executor.submit(function, task, channel.sender(task))] = task
                submitting.pop()
            if not running:
                return
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            channel.receive()
            for future in done:
                result = future.result()
                yield running.pop(future), result
    except BrokenProcessPool:
        suspects += [*running.values(), *submitting]


def _run_isolated(
    function: Callable[[Task, ReportProgress], Result], task: Task, channel: ProgressChannel
) -> Result | WorkerDied:
    for _ in range(_MAX_CRASHES - 1):
        executor = _start_executor(1)
        try:
            future = executor.submit(function, task, channel.sender(task))
            while not wait([future], timeout=_POLL_SECONDS).done:
                channel.receive()
            return future.result()
        except BrokenProcessPool:
            _log.warning("a worker died of %s", task)
        finally:
            _kill_executor(executor)
    return _died_of(task)


def _died_of(task: object) -> WorkerDied:
    return WorkerDied(f"a worker process died {_MAX_CRASHES} times of {task}")


def _start_executor(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(),),
    )


def _kill_executor(executor: ProcessPoolExecutor) -> None:
    """Kill the worker processes; finished work is on disk, and unfinished work is repeated."""
    processes = list((executor._processes or {}).values())  # noqa: SLF001 - public since 3.14
    for process in processes:
        process.kill()
    executor.shutdown(wait=True, cancel_futures=True)


def _start_worker(driver: int) -> None:
    """End with the driver, however it ends, and leave Ctrl-C to it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker for each core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != driver:
            os._exit(1)


class _RayCluster:
    """A Ray cluster, joined or started when there is more than one task."""

    def __init__(self, workers: int | None, address: str | None, gpus: int) -> None:
        self._workers = workers or (None if address else os.cpu_count() or 1)
        self._address = address
        self._gpus = gpus
        self._connected = False

    @property
    def workers(self) -> int:
        if self._workers is None:  # the number of the cluster's CPUs
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
        import ray  # noqa: PLC0415 - takes a second, which a run of one task saves

        cluster = (
            {"address": self._address}
            if self._address
            else {
                "address": "local",  # else Ray joins whatever cluster it finds on the machine
                "num_cpus": self._workers,
                "include_dashboard": False,
                "log_to_driver": False,
            }
        )
        # workers on other machines need the driver's settings
        settings = {name: value for name, value in os.environ.items() if name.startswith("PMD_")}
        try:
            if self._address and ":" in self._address.removeprefix("ray://"):
                host, _, port = self._address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), 10.0).close()  # Ray waits for minutes
            ray.init(
                logging_level=logging.ERROR,
                runtime_env={"env_vars": settings} if settings else None,
                **cluster,
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
            yield from _ThisProcess().run(function, head, on_progress)
            return
        self._connect()
        import ray  # noqa: PLC0415 - see _connect

        if self._gpus > ray.cluster_resources().get("GPU", 0):
            raise PmdError("Ray has no GPU here, and tasks would wait for one: give --device cpu")
        remote = ray.remote(
            num_cpus=1,
            num_gpus=self._gpus,
            max_calls=0,  # else a worker with a GPU ends after each task, and its model with it
            max_retries=_MAX_CRASHES - 1,
        )(function)
        queue = chain(head, queue)
        running: dict[Any, Task] = {}
        with ProgressChannel(ray.util.get_node_ip_address(), on_progress) as channel:
            while True:
                for task in islice(queue, self.workers * 2 - len(running)):
                    running[remote.remote(task, channel.sender(task))] = task
                if not running:
                    return
                done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
                channel.receive()
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
                        yield (
                            task,
                            _died_of(task),
                        )
                    else:
                        yield task, result
