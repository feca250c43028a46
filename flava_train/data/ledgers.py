"""What a ledger says of the samples in its shard, and the samples themselves."""

import json
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flava_train.shapes import Array, Int, UInt
from pmd_pipeline.contract.boxes import Box, is_box
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.models import ShardEntry
from pmd_pipeline.contract.reasons import Status

_NUMBERS = (
    "num_pairs",
    "width",
    "height",
    "image_offset",
    "image_size",
    "json_offset",
    "json_size",
)


@dataclass(frozen=True)
class Ledger:
    """The samples of one shard, in the order of its ledger.

    Args:
        keys: of the samples.
        images: a number that names each image: the first 64 bits of the sha256 of its bytes as
            fetched, so that copies of it in other sources have the same.
        ends: pairs up to and with each sample.
        columns: numbers of each sample, by the ledger's names.
    """

    keys: Array
    images: UInt[Array, " n"]
    ends: Int[Array, " n"]
    columns: dict[str, Int[Array, " n"]]

    def samples(self, pairs: Int[Array, " p"]) -> tuple[Int[Array, " p"], Int[Array, " p"]]:
        """The sample of each pair, and which of the sample's pairs it is."""
        samples = np.searchsorted(self.ends, pairs, side="right")
        before = self.ends - self.columns["num_pairs"]
        return samples, pairs - before[samples]

    def images_of(self, start: int, stop: int) -> UInt[Array, " p"]:
        """The image of each of the pairs `start` to `stop`."""
        samples, _ = self.samples(np.arange(start, stop))
        return self.images[samples]


@dataclass(frozen=True)
class Record:
    """The captions of one sample, and their boxes if they have any."""

    captions: list[str]
    boxes: list[Box] | None


def read_ledger(file: BinaryIO, shard: ShardEntry) -> Ledger:
    """The ledger of `shard`.

    Raises:
        PmdError: it is no ledger, or does not fit the shard.
    """
    columns = ["key", "status", "sha256", *_NUMBERS]
    try:
        # in this thread: one of Arrow's may ask for the file when the interpreter is ending
        with pq.ParquetFile(file, pre_buffer=False) as parquet:
            table = parquet.read(columns, use_threads=False)
        records = len(table)
        table = table.filter(pc.equal(table["status"], Status.SUCCESS))
        numbers = {name: _numbers(table, name) for name in _NUMBERS}
        keys = np.array(table["key"].to_pylist(), dtype="S16")
        hashes = "".join(one[:16] for one in table["sha256"].to_pylist())
        images = np.frombuffer(bytes.fromhex(hashes), ">u8").astype(np.uint64)
    except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
        raise _unfit(shard, f"it is no ledger ({str(error).partition(chr(10))[0]})") from error
    if records != shard.records or len(keys) != shard.images or len(images) != shard.images:
        raise _unfit(shard, f"it has {len(keys)} images in {records} records")
    ends = np.cumsum(numbers["num_pairs"])
    if (numbers["num_pairs"] < 1).any() or int(ends[-1] if len(ends) else 0) != shard.pairs:
        raise _unfit(shard, "its pairs are not as many as the manifest's")
    for name in ("image", "json"):
        offset, size = numbers[f"{name}_offset"], numbers[f"{name}_size"]
        if ((offset < 0) | (size < 1) | (offset > shard.num_bytes - size)).any():
            raise _unfit(shard, f"an offset of a {name} lies outside the shard")
    return Ledger(keys, images, ends, numbers)


def read_record(
    file: int, ledger: Ledger, sample: int, name: str, *, captioned: bool = True
) -> Record:
    """What the shard says of a sample.

    Args:
        file: descriptor of the tar.
        ledger: of the shard.
        sample: its number, in the order of the ledger.
        name: of the shard, for errors.
        captioned: it must have as many captions as the ledger says.

    Raises:
        PmdError: the shard does not hold what its ledger says.
    """
    content = _content(file, ledger, sample, "json", name)
    key = ledger.keys[sample].decode()
    try:
        record = _described(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise PmdError(f"{name} does not fit its ledger: the JSON of {key} {error}") from error
    if captioned and len(record.captions) != ledger.columns["num_pairs"][sample]:
        found = len(record.captions)
        raise PmdError(f"{name} does not fit its ledger: {key} has {found} captions")
    return record


def read_image(file: int, ledger: Ledger, sample: int, name: str) -> bytes:
    """The JPEG of a sample. As `read_record`."""
    return _content(file, ledger, sample, "image", name)


def _content(file: int, ledger: Ledger, sample: int, member: str, name: str) -> bytes:
    offset, size = (int(ledger.columns[f"{member}_{one}"][sample]) for one in ("offset", "size"))
    content = os.pread(file, size, offset)
    if len(content) < size:
        key = ledger.keys[sample].decode()
        raise PmdError(f"{name} ends early, within the sample {key}: build it again")
    return content


def _numbers(table: pa.Table, name: str) -> Int[Array, " n"]:
    column = table[name]
    if column.null_count:
        raise ValueError(f"{name} is empty where there is an image")
    numbers: Array = column.cast(pa.int64()).to_numpy()
    return numbers


def _described(stored: Any) -> Record:  # noqa: ANN401  # JSON may hold anything
    """Captions and boxes in the JSON of a sample; ValueError where it has another form."""
    match stored:
        case {"captions": list(captions)} if all(isinstance(one, str) for one in captions):
            pass
        case _:
            raise ValueError("has no captions")
    if stored.get("boxes") is None:
        return Record(captions, None)
    try:
        boxes = [(float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in stored["boxes"]]
    except (TypeError, ValueError) as error:
        raise ValueError("has boxes without four sides") from error
    if len(boxes) != len(captions):
        raise ValueError("has not one box for each caption")
    if not all(is_box(box) for box in boxes):
        raise ValueError("has a box that is not within the image")
    return Record(captions, boxes)


def _unfit(shard: ShardEntry, detail: str) -> PmdError:
    return PmdError(f"the ledger {shard.ledger_path} does not fit its shard: {detail}")
