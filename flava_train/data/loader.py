"""Batches of a run, step by step, loaded ahead by workers."""

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
"""Steps that the workers together load before they are asked for."""

_Item: TypeAlias = tuple[int, range]


@dataclass(frozen=True)
class RankBatch:
    """What one rank takes in one step.

    Args:
        step: of the run.
        stream: that the whole global batch comes from.
        rows: this rank's, in host memory.
        keys: of the records, row by row.
        wait_seconds: seconds that the step had to wait for it.
    """

    step: int
    stream: str
    rows: PairBatch | ImageBatch | TextBatch
    keys: list[str]
    wait_seconds: float


def load_batches(
    streams: TrainingData,
    first: int,
    last: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    chunk: int = 256,
) -> Iterator[RankBatch]:
    """The batches of the steps from `first` up to, without, `last`.

    Workers load chunks of slots, two steps ahead; neither their number nor the size of chunks
    changes what a batch holds. Close the iterator to end the workers early.

    Args:
        streams: all data.
        first: step to begin with.
        last: step to end before.
        rank: of this process; it takes slots from `rank / ranks` of the batch on.
        ranks: processes that share each batch; a divisor of it.
        workers: processes to load in; none: load here.
        chunk: slots that a worker loads at a time.

    Raises:
        PmdError: the data is not what the manifest says.
        ValueError: the batch cannot be shared equally.
    """
    if streams.batch % ranks:
        raise ValueError(f"a batch of {streams.batch} cannot be shared equally by {ranks} ranks")
    own = range(streams.batch)[rank * streams.batch // ranks : (rank + 1) * streams.batch // ranks]
    chunks = [own[start : start + chunk] for start in range(0, len(own), chunk)]
    with warnings.catch_warnings():
        # how many workers a machine bears is for its user to say
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader: DataLoader[BatchChunk | PmdError] = DataLoader(
            _Parts(streams),
            batch_size=None,
            sampler=_Items(first, last, chunks),
            num_workers=workers,
            prefetch_factor=max(2, -(-_STEPS_AHEAD * len(chunks) // workers)) if workers else None,
            worker_init_fn=_set_up_worker if workers else None,
        )
        parts = iter(loader)
    return _assembled(parts, streams, range(first, last), len(chunks))


class _Parts(Dataset[BatchChunk | PmdError]):
    """Parts of batches, by step and slots."""

    def __init__(self, streams: TrainingData) -> None:
        self.streams = streams

    def __getitem__(self, item: _Item) -> BatchChunk | PmdError:
        """The part; or a user's mistake, which would come out of a worker as a long story."""
        try:
            return self.streams.part(*item)
        except PmdError as error:
            return error


class _Items(Sampler[_Item]):
    def __init__(self, first: int, last: int, chunks: Sequence[range]) -> None:
        self._steps, self._chunks = range(first, last), chunks

    def __iter__(self) -> Iterator[_Item]:
        return itertools.product(self._steps, self._chunks)

    def __len__(self) -> int:
        return len(self._steps) * len(self._chunks)


def _set_up_worker(_: int) -> None:
    """Leave it to the main process when to end: signals may reach all of a job's processes."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    worker = torch.utils.data.get_worker_info()
    assert worker is not None
    dataset: Any = worker.dataset
    dataset.streams.look_ahead()


def _assembled(
    parts: Iterator[BatchChunk | PmdError], streams: TrainingData, steps: range, num_parts: int
) -> Iterator[RankBatch]:
    try:
        for step in steps:
            began = time.monotonic()
            found = []
            for part in itertools.islice(parts, num_parts):
                if isinstance(part, PmdError):
                    raise part
                found.append(part)
            rows = concatenate([part.rows for part in found])
            keys = [key for part in found for key in part.keys]
            yield RankBatch(step, streams.stream(step), rows, keys, time.monotonic() - began)
    finally:
        del parts  # ends the workers; else the traceback of an error would keep them


def concatenate(pieces: Sequence[Any]) -> Any:  # noqa: ANN401  # the kind that went in
    """Pieces of one kind of batch as one."""
    if len(pieces) == 1:
        return pieces[0]
    columns: dict[str, Any] = {}
    for field in fields(pieces[0]):
        values = [getattr(piece, field.name) for piece in pieces]
        columns[field.name] = (
            torch.cat(values) if isinstance(values[0], Tensor) else concatenate(values)
        )
    return replace(pieces[0], **columns)
