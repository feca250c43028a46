"""Ledgers as arrays, and the members of the tar that their offsets point to."""

import os
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flava_train.shapes import Array, Int, UInt
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.models import ShardEntry
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.sample_json import SampleCaptions, parse_captions
from pmd_pipeline.contract.schemas import LedgerColumn, column

_COLUMNS: list[LedgerColumn] = [
    "key",
    "status",
    "sha256",
    "num_pairs",
    "width",
    "height",
    "image_offset",
    "image_size",
    "json_offset",
    "json_size",
]


@dataclass(frozen=True)
class ByteRanges:
    """Where one member of each sample lies in the tar: first byte and number of bytes."""

    offsets: Int[Array, " n"]
    sizes: Int[Array, " n"]


@dataclass(frozen=True)
class ShardLedger:
    """The samples of one shard, in the order of its ledger; failed records are left out.

    Args:
        keys: of the samples, as bytes.
        image_ids: the first 64 bits of the SHA-256 of the fetched bytes, so that copies of an image
            in other sources have the same identifier.
        num_pairs: pairs of each sample.
        ends: pairs of all samples up to and including each one.
        widths: of the stored images, in pixels.
        heights: of the stored images, in pixels.
        image: byte ranges of the images.
        json: byte ranges of the JSON members.
    """

    keys: Array
    image_ids: UInt[Array, " n"]
    num_pairs: Int[Array, " n"]
    ends: Int[Array, " n"]
    widths: Int[Array, " n"]
    heights: Int[Array, " n"]
    image: ByteRanges
    json: ByteRanges

    def samples(self, pairs: Int[Array, " p"]) -> tuple[Int[Array, " p"], Int[Array, " p"]]:
        """The sample of each pair, and the pair's number within that sample."""
        samples = np.searchsorted(self.ends, pairs, side="right")
        before = self.ends - self.num_pairs
        return samples, pairs - before[samples]

    def image_ids_of_pairs(self, start: int, stop: int) -> UInt[Array, " p"]:
        """The image of each of the pairs `start` to `stop`."""
        samples, _ = self.samples(np.arange(start, stop))
        return self.image_ids[samples]


def read_ledger(file: BinaryIO, shard: ShardEntry) -> ShardLedger:
    """The ledger of `shard`.

    Raises:
        PmdError: it is no ledger, or does not fit the shard.
    """
    try:
        # in this thread: one of Arrow's may ask for the file when the interpreter is ending
        with pq.ParquetFile(file, pre_buffer=False) as parquet:
            table = parquet.read(_COLUMNS, use_threads=False)
        num_records = len(table)
        table = table.filter(pc.equal(column(table, "status"), Status.SUCCESS))
        digits = "".join(sha256[:16] for sha256 in column(table, "sha256").to_pylist())
        num_pairs = _integers(table, "num_pairs")
        ledger = ShardLedger(
            keys=np.array(column(table, "key").to_pylist(), dtype="S16"),
            image_ids=np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64),
            num_pairs=num_pairs,
            ends=np.cumsum(num_pairs),
            widths=_integers(table, "width"),
            heights=_integers(table, "height"),
            image=ByteRanges(_integers(table, "image_offset"), _integers(table, "image_size")),
            json=ByteRanges(_integers(table, "json_offset"), _integers(table, "json_size")),
        )
    except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise _mismatch(shard, f"it cannot be read as a ledger ({reason})") from error
    _check_ledger(ledger, num_records, shard)
    return ledger


def read_captions(
    descriptor: int, ledger: ShardLedger, sample: int, shard: str, *, captioned: bool = True
) -> SampleCaptions:
    """The captions of a sample.

    Args:
        descriptor: of the open tar.
        ledger: of the shard.
        sample: its number in the ledger.
        shard: address of the tar, for errors.
        captioned: the sample must have as many captions as the ledger states.

    Raises:
        PmdError: the tar does not hold what the ledger states.
    """
    content = _read_range(descriptor, ledger, ledger.json, sample, shard)
    key = ledger.keys[sample].decode()
    try:
        parsed = parse_captions(content)
    except ValueError as error:
        raise PmdError(f"{shard} does not fit its ledger: the JSON of {key} {error}") from error
    if captioned and len(parsed.captions) != ledger.num_pairs[sample]:
        count = len(parsed.captions)
        raise PmdError(f"{shard} does not fit its ledger: {key} has {count} captions")
    return parsed


def read_image(descriptor: int, ledger: ShardLedger, sample: int, shard: str) -> bytes:
    """The stored image of a sample, JPEG or WebP. Arguments and errors as for `read_captions`."""
    return _read_range(descriptor, ledger, ledger.image, sample, shard)


def _check_ledger(ledger: ShardLedger, num_records: int, shard: ShardEntry) -> None:
    num_images = len(ledger.keys)
    if num_records != shard.records or {num_images, len(ledger.image_ids)} != {shard.images}:
        raise _mismatch(shard, f"it has {num_images} images in {num_records} records")
    num_pairs = int(ledger.ends[-1]) if num_images else 0
    if (ledger.num_pairs < 1).any() or num_pairs != shard.pairs:
        raise _mismatch(shard, "its number of pairs is not the manifest's")
    for name, ranges in (("image", ledger.image), ("JSON", ledger.json)):
        offsets, sizes = ranges.offsets, ranges.sizes
        if ((offsets < 0) | (sizes < 1) | (offsets > shard.num_bytes - sizes)).any():
            raise _mismatch(shard, f"the byte range of a sample's {name} lies outside the tar")


def _read_range(
    descriptor: int, ledger: ShardLedger, ranges: ByteRanges, sample: int, shard: str
) -> bytes:
    offset, size = int(ranges.offsets[sample]), int(ranges.sizes[sample])
    content = os.pread(descriptor, size, offset)
    if len(content) < size:
        key = ledger.keys[sample].decode()
        raise PmdError(f"{shard} ends early, within the sample {key}: build it again")
    return content


def _integers(table: pa.Table, name: LedgerColumn) -> Int[Array, " n"]:
    values = column(table, name)
    if values.null_count:
        raise ValueError(f"{name} is empty where there is an image")
    integers: Array = values.cast(pa.int64()).to_numpy()
    return integers


def _mismatch(shard: ShardEntry, detail: str) -> PmdError:
    return PmdError(f"the ledger {shard.ledger_path} does not fit its shard: {detail}")
