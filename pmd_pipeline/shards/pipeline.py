"""Items fetched concurrently and processed in threads; their results come in the items' order."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.images.decode.processor import ImageResult
from pmd_pipeline.images.fetch.byte_budget import ByteBudget
from pmd_pipeline.images.fetch.client import FetchedImage
from pmd_pipeline.shards.reorder_buffer import ReorderBuffer

_MAX_BUFFERED_BYTES = 32 << 20
"""Bytes of images that wait in memory for the results before them."""

_SCHEDULE_SECONDS = 0.01
"""Time between two looks of the scheduler for free slots."""

_IDLE_SECONDS = 1.0
"""Time without any result after which `on_idle` is called."""

_Item = TypeVar("_Item")
_Finished = SimpleQueue[tuple[int, Future[ImageResult]]]


@dataclass(frozen=True)
class FetchPipeline(Generic[_Item]):
    """Fetches items on an event loop and processes them in threads.

    Args:
        loop: the event loop that fetches.
        byte_budget: of fetched bodies and of results; `fetch` acquires the bytes that it returns.
        fetch: the bytes of an item; may raise RecordError.
        process: the result of an item, from its bytes or from the error of fetching it.
        max_in_flight: items that are fetched and not yet finished.
        max_per_host: of these, items of one host, so that a slow host leaves slots to others.
        threads: how many items are processed at a time.
        folder: where results wait for which there is no memory; None takes the system's folder for
            temporary files.
        on_idle: called repeatedly while no result comes.
    """

    loop: asyncio.AbstractEventLoop
    byte_budget: ByteBudget
    fetch: Callable[[_Item], Coroutine[Any, Any, FetchedImage]]
    process: Callable[[_Item, FetchedImage | RecordError], ImageResult]
    max_in_flight: int
    max_per_host: int
    threads: int = 1
    folder: str | None = None
    on_idle: Callable[[], None] = lambda: None

    def results(
        self,
        items: Sequence[_Item],
        host_of: Callable[[_Item], str | None],
        key_of: Callable[[_Item], Hashable],
    ) -> Iterator[ImageResult]:
        """The results of `items`, in order; items of one key are fetched once."""
        first_numbers: dict[Hashable, int] = {}
        numbers = [
            first_numbers.setdefault(key_of(item), number) for number, item in enumerate(items)
        ]
        jobs = (_Job(n, host_of(items[n]), items[n]) for n in first_numbers.values())
        finished: _Finished = SimpleQueue()
        with (
            ReorderBuffer(Counter(numbers), self.folder, _MAX_BUFFERED_BYTES) as buffer,
            ThreadPoolExecutor(self.threads, "pixels") as pool,
        ):
            scheduler = _Scheduler(self, jobs, pool, finished)
            self.loop.call_soon_threadsafe(scheduler.schedule)
            try:
                for number in numbers:
                    while number not in buffer:
                        finished_number, future = self._next(finished)
                        scheduler.num_finished += 1
                        result = future.result()
                        buffer.put(finished_number, result)
                        self.byte_budget.release(_num_bytes(result))
                    yield buffer.take(number)
            finally:
                asyncio.run_coroutine_threadsafe(scheduler.stop(), self.loop).result()
                pool.shutdown(wait=True, cancel_futures=True)

    def _next(self, finished: _Finished) -> tuple[int, Future[ImageResult]]:
        while True:
            try:
                return finished.get(timeout=_IDLE_SECONDS)
            except Empty:
                self.on_idle()


@dataclass(frozen=True)
class _Job(Generic[_Item]):
    """An item by its number, and the host that its fetch sends a request to."""

    number: int
    host: str | None
    item: _Item


class _Scheduler(Generic[_Item]):
    """Starts fetches while there are free slots; its methods run on the event loop."""

    def __init__(
        self,
        pipeline: FetchPipeline[_Item],
        jobs: Iterator[_Job[_Item]],
        pool: ThreadPoolExecutor,
        finished: _Finished,
    ) -> None:
        self._pipeline = pipeline
        self._jobs = jobs
        self._pool = pool
        self._finished = finished
        self._tasks: set[asyncio.Task[FetchedImage]] = set()
        self.num_finished = 0
        self._num_started = 0
        self._num_fetching = Counter[str | None]()
        self._parked: dict[str | None, deque[_Job[_Item]]] = {}

    def schedule(self) -> None:
        """Start as many jobs as there are slots, and come back soon if more are left."""
        while self._num_started - self.num_finished < self._pipeline.max_in_flight:
            job = next(self._jobs, None)
            if job is None:
                return
            if job.host is not None and self._num_fetching[job.host] >= self._pipeline.max_per_host:
                self._parked.setdefault(job.host, deque()).append(job)
            else:
                self._start(job)
        self._pipeline.loop.call_later(_SCHEDULE_SECONDS, self.schedule)

    async def stop(self) -> None:
        """Cancel all fetches and start no more."""
        self._jobs = iter(())
        self._parked.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, job: _Job[_Item]) -> None:
        self._num_started += 1
        self._num_fetching[job.host] += 1
        task = self._pipeline.loop.create_task(self._pipeline.fetch(job.item))
        self._tasks.add(task)
        task.add_done_callback(partial(self._on_fetched, job))

    def _on_fetched(self, job: _Job[_Item], task: asyncio.Task[FetchedImage]) -> None:
        self._tasks.discard(task)
        self._num_fetching[job.host] -= 1
        if task.cancelled():
            return
        fetched = task.exception() or task.result()
        if isinstance(fetched, FetchedImage | RecordError):
            processing = self._pool.submit(self._pipeline.process, job.item, fetched)
            processing.add_done_callback(partial(self._on_processed, job.number, fetched))
        else:
            failed = Future[ImageResult]()
            failed.set_exception(fetched)
            self._finished.put((job.number, failed))
        parked = self._parked.get(job.host)
        if parked:
            self._start(parked.popleft())
            if not parked:
                del self._parked[job.host]

    def _on_processed(
        self, number: int, fetched: FetchedImage | RecordError, processing: Future[ImageResult]
    ) -> None:
        """Pass a result on; runs in the thread that made it."""
        if processing.cancelled():
            return
        byte_budget = self._pipeline.byte_budget
        if not processing.exception():
            byte_budget.acquire(_num_bytes(processing.result()))
        self._finished.put((number, processing))
        if isinstance(fetched, FetchedImage):
            byte_budget.release(len(fetched.body))


def _num_bytes(result: ImageResult) -> int:
    return len(result.image.content) if result.image else 0
