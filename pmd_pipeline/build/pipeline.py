"""Records in order through what takes long: asked for all at once, made in threads beside that."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from pmd_pipeline.build.reorder_buffer import ReorderBuffer
from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.images.decode.processor import ImageResult
from pmd_pipeline.images.fetch.byte_budget import ByteBudget
from pmd_pipeline.images.fetch.client import FetchedImage

_PILED = 32 << 20
"""Bytes of pictures that wait in memory for those before them."""

_GLANCE = 0.01
"""Seconds after which to look whether more may be asked for."""

_IDLE = 1.0
"""Seconds without any outcome after which somebody may want to know why."""

_Item = TypeVar("_Item")
_Ended = SimpleQueue[tuple[int, Future[ImageResult]]]


@dataclass(frozen=True)
class FetchPipeline(Generic[_Item]):
    """The way of items from being asked for to their outcomes.

    Args:
        loop: the event loop on which to ask.
        memory: that of bodies; `ask` takes from it what it returns.
        ask: the bytes of an item; it may raise RecordError.
        make: the outcome of an item, given what came of asking.
        ahead: most items that are asked for and not yet made.
        per_host: of these, most that are asked of one host, so that a slow one leaves room.
        threads: how many make outcomes at a time.
        folder: where outcomes wait for which there is no memory; None leaves it to the system.
        idle: called now and then while no outcome comes.
    """

    loop: asyncio.AbstractEventLoop
    memory: ByteBudget
    ask: Callable[[_Item], Coroutine[Any, Any, FetchedImage]]
    make: Callable[[_Item, FetchedImage | RecordError], ImageResult]
    ahead: int
    per_host: int
    threads: int = 1
    folder: str | None = None
    idle: Callable[[], None] = lambda: None

    def outcomes(
        self,
        items: Sequence[_Item],
        host_of: Callable[[_Item], str | None],
        key_of: Callable[[_Item], Hashable],
    ) -> Iterator[ImageResult]:
        """The results of items, in order; items of one key are asked for once."""
        firsts: dict[Hashable, int] = {}
        sources = [firsts.setdefault(key_of(item), number) for number, item in enumerate(items)]
        ended: _Ended = SimpleQueue()
        asked = (_Work(n, host_of(items[n]), items[n]) for n in firsts.values())
        with (
            ReorderBuffer(Counter(sources), self.folder, _PILED) as pile,
            ThreadPoolExecutor(self.threads, "pixels") as pool,
        ):
            asking = _Asking(self, asked, pool, ended)
            self.loop.call_soon_threadsafe(asking.go_on)
            try:
                for source in sources:
                    while source not in pile:
                        number, future = self._next(ended)
                        asking.num_ended += 1
                        outcome = future.result()
                        pile.put(number, outcome)
                        self.memory.release(_num_bytes(outcome))
                    yield pile.take(source)
            finally:
                asyncio.run_coroutine_threadsafe(asking.stop(), self.loop).result()
                pool.shutdown(wait=True, cancel_futures=True)

    def _next(self, ended: _Ended) -> tuple[int, Future[ImageResult]]:
        while True:
            try:
                return ended.get(timeout=_IDLE)
            except Empty:
                self.idle()


@dataclass(frozen=True)
class _Work(Generic[_Item]):
    """An item by its number, and the host that must be asked for it."""

    number: int
    host: str | None
    item: _Item


class _Asking(Generic[_Item]):
    """What happens on the event loop: as much is begun as there is room for."""

    def __init__(
        self,
        flow: FetchPipeline[_Item],
        left: Iterator[_Work[_Item]],
        pool: ThreadPoolExecutor,
        ended: _Ended,
    ) -> None:
        self._flow = flow
        self._left = left
        self._pool = pool
        self._ended = ended
        self._tasks: set[asyncio.Task[FetchedImage]] = set()
        self.num_ended = 0
        self._num_begun = 0
        self._num_asked = Counter[str | None]()
        self._parked: dict[str | None, deque[_Work[_Item]]] = {}

    def go_on(self) -> None:
        """Ask for as many items as may be, and look again soon if more are left."""
        while self._num_begun - self.num_ended < self._flow.ahead:
            work = next(self._left, None)
            if work is None:
                return
            if work.host is not None and self._num_asked[work.host] >= self._flow.per_host:
                self._parked.setdefault(work.host, deque()).append(work)
            else:
                self._begin(work)
        self._flow.loop.call_later(_GLANCE, self.go_on)

    async def stop(self) -> None:
        """Ask for nothing any more."""
        self._left = iter(())
        self._parked.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: _Work[_Item]) -> None:
        self._num_begun += 1
        self._num_asked[work.host] += 1
        task = self._flow.loop.create_task(self._flow.ask(work.item))
        self._tasks.add(task)
        task.add_done_callback(partial(self._end, work))

    def _end(self, work: _Work[_Item], task: asyncio.Task[FetchedImage]) -> None:
        self._tasks.discard(task)
        self._num_asked[work.host] -= 1
        if task.cancelled():
            return
        error = task.exception()
        found = error or task.result()
        if isinstance(found, FetchedImage | RecordError):
            making = self._pool.submit(self._flow.make, work.item, found)
            making.add_done_callback(partial(self._made, work.number, found))
        else:
            failed = Future[ImageResult]()
            failed.set_exception(found)
            self._ended.put((work.number, failed))
        parked = self._parked.get(work.host)
        if parked:
            self._begin(parked.popleft())
            if not parked:
                del self._parked[work.host]

    def _made(
        self, number: int, found: FetchedImage | RecordError, making: Future[ImageResult]
    ) -> None:
        """Pass an outcome on, from the thread that made it."""
        if making.cancelled():
            return
        memory = self._flow.memory
        if not making.exception():
            memory.acquire(_num_bytes(making.result()))
        self._ended.put((number, making))
        if isinstance(found, FetchedImage):
            memory.release(len(found.body))


def _num_bytes(outcome: ImageResult) -> int:
    return len(outcome.image.content) if outcome.image else 0
