"""The batches of a run, step by step, loaded ahead by worker processes."""

import itertools
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flava_train.data.batches import ImageBatch, PairBatch, TextBatch
from flava_train.data.training_data import BatchChunk, TrainingData
from pmd_pipeline.contract.errors import PmdError

_STEPS_AHEAD = 2
"""Steps that the workers together load before they are needed."""

_StepSlots: TypeAlias = tuple[int, range]


@dataclass(frozen=True)
class RankBatch:
    """One rank's share of the global batch of one step.

    Args:
        step: of the run.
        stream: of the whole global batch.
        rows: this rank's, in host memory.
        keys: of the records, row by row.
        wait_seconds: time that the step waited for the loader.
    """

    step: int
    stream: str
    rows: PairBatch | ImageBatch | TextBatch
    keys: list[str]
    wait_seconds: float


def load_batches(
    data: TrainingData,
    first: int,
    last: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    chunk: int = 256,
) -> Iterator[RankBatch]:
    """The batches of steps `first` to `last`, the latter not included.

    Workers load chunks of slots, two steps ahead. The content of a batch depends neither on the
    number of workers nor on the size of chunks. Close the iterator to end the workers early.

    Args:
        data: of the run.
        first: first step.
        last: step after the last one.
        rank: of this process; its slots begin at `rank / ranks` of the batch.
        ranks: processes that share each batch; a divisor of it.
        workers: loader processes; with none, this process loads.
        chunk: slots that a worker loads at a time.

    Raises:
        PmdError: a shard does not hold what the manifest states.
        ValueError: the ranks cannot have equal shares of the batch.
    """
    if data.batch % ranks:
        raise ValueError(f"a batch of {data.batch} cannot be shared equally by {ranks} ranks")
    own = range(data.batch)[rank * data.batch // ranks : (rank + 1) * data.batch // ranks]
    chunks = [own[start : start + chunk] for start in range(0, len(own), chunk)]
    with warnings.catch_warnings():
        # the configuration decides how many workers a machine has
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader: DataLoader[BatchChunk | PmdError] = DataLoader(
            _ChunkDataset(data),
            batch_size=None,
            sampler=_ChunkSampler(first, last, chunks),
            num_workers=workers,
            prefetch_factor=max(2, -(-_STEPS_AHEAD * len(chunks) // workers)) if workers else None,
            worker_init_fn=_init_worker if workers else None,
        )
        loaded = iter(loader)
    return _assemble(loaded, data, range(first, last), len(chunks))


class _ChunkDataset(Dataset[BatchChunk | PmdError]):
    """Chunks of batches, by step and slots."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def __getitem__(self, index: _StepSlots) -> BatchChunk | PmdError:
        """A chunk, or the error, which would get the worker's traceback if it were raised here."""
        try:
            return self.data.load(*index)
        except PmdError as error:
            return error


class _ChunkSampler(Sampler[_StepSlots]):
    def __init__(self, first: int, last: int, chunks: Sequence[range]) -> None:
        self._steps, self._chunks = range(first, last), chunks

    def __iter__(self) -> Iterator[_StepSlots]:
        return itertools.product(self._steps, self._chunks)

    def __len__(self) -> int:
        return len(self._steps) * len(self._chunks)


def _init_worker(_: int) -> None:
    """Ignore signals, which may reach all processes of a job: the main process ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    worker = torch.utils.data.get_worker_info()
    assert worker is not None
    dataset: Any = worker.dataset
    dataset.data.enable_prefetch()


def _assemble(
    loaded: Iterator[BatchChunk | PmdError], data: TrainingData, steps: range, num_chunks: int
) -> Iterator[RankBatch]:
    try:
        for step in steps:
            began = time.monotonic()
            chunks = []
            for chunk in itertools.islice(loaded, num_chunks):
                if isinstance(chunk, PmdError):
                    raise chunk
                chunks.append(chunk)
            rows = concatenate([chunk.rows for chunk in chunks])
            keys = [key for chunk in chunks for key in chunk.keys]
            yield RankBatch(step, data.stream(step), rows, keys, time.monotonic() - began)
    finally:
        del loaded  # ends the workers; else the traceback of an error would keep them


def concatenate(parts: Sequence[Any]) -> Any:  # noqa: ANN401  # returns the type of the parts
    """One batch of the rows of all parts, which are batches of one type."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Any] = {}
    for field in fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        columns[field.name] = (
            torch.cat(values) if isinstance(values[0], Tensor) else concatenate(values)
        )
    return replace(parts[0], **columns)
