"""Samples of a shard that a manifest names. A shard may be hostile, so every value is checked."""

import hashlib
import re
from io import BytesIO
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pmd_pipeline.base.tables import read_table
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import read_bytes, sha256_of
from pmd_pipeline.contract.image_format import decode_stored
from pmd_pipeline.contract.models import ShardEntry
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.sample_json import SampleCaptions, parse_captions
from pmd_pipeline.contract.schemas import LedgerColumn
from pmd_pipeline.shards.shard_writer import ByteRange

_NUMBERS: tuple[LedgerColumn, ...] = (
    "num_pairs", "width", "height", "image_offset", "image_size", "json_offset", "json_size",
)  # fmt: skip
_KEY = re.compile("[0-9a-f]{16}")

_MAX_PIXELS = 100_000_000
"""Of a stored image; more is a decompression bomb."""

_MAX_BYTES = 1 << 28
"""Of a member; no stored image or JSON comes near it."""

_MAX_BOXES = 4096
"""Of one image; Visual Genome has some hundred at most."""


class ShardSample(NamedTuple):
    """One sample of a tar, as its ledger row describes it.

    Args:
        shard: address of the tar.
        number: position in the ledger among the samples, from 0.
        size: width and height of the stored image in pixels.
        image: where the image lies in the tar.
        metadata: where the JSON lies in the tar.
    """

    shard: str
    number: int
    key: str
    num_pairs: int
    size: tuple[int, int]
    image: ByteRange
    metadata: ByteRange


def check_tar(shard: str, entry: ShardEntry) -> None:
    """Read the tar at `shard` once and compare its digest with the manifest's.

    Raises:
        PmdError: they differ.
    """
    if sha256_of(shard) != entry.sha256:
        raise PmdError(
            f"{shard} is not the shard that the manifest names, its sha256 differs: delete it and "
            "build it again, or copy it again"
        )


def read_samples(shard: str, entry: ShardEntry) -> list[ShardSample]:
    """The samples of the tar at `shard`, from its ledger.

    Raises:
        PmdError: the ledger has another digest than `entry` states, or impossible values.
    """
    address = ShardPaths.of(shard).ledger
    content = read_bytes(address)
    if hashlib.sha256(content).hexdigest() != entry.ledger_sha256:
        raise PmdError(
            f"{address} is not the ledger that the manifest names, its sha256 differs: delete it "
            "and build it again, or copy it again"
        )
    try:
        table = read_table(BytesIO(content), ("key", "status", *_NUMBERS))
        rows = table.filter(pc.equal(table["status"], Status.SUCCESS)).to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        raise PmdError(f"{address} is no ledger: {str(error).splitlines()[0]}") from error
    samples = []
    for number, row in enumerate(rows):
        numbers = [row[name] for name in _NUMBERS]
        if not all(isinstance(one, int) and one >= 0 for one in numbers) or not (
            isinstance(row["key"], str) and _KEY.fullmatch(row["key"])
        ):
            raise PmdError(f"{address}: the row of {row['key']} does not locate its image")
        num_pairs, width, height, *offsets = numbers
        image, metadata = ByteRange(*offsets[:2]), ByteRange(*offsets[2:])
        samples.append(
            ShardSample(shard, number, row["key"], num_pairs, (width, height), image, metadata)
        )
    if len(samples) != entry.images:
        raise PmdError(f"{address} has {len(samples)} images, the manifest {entry.images}")
    return samples


def read_member(file: BinaryIO, sample: ShardSample, extent: ByteRange) -> bytes:
    """The content of a member of the open tar.

    Raises:
        PmdError: it lies outside the tar.
    """
    content = b""
    if extent.size <= _MAX_BYTES:
        file.seek(extent.offset)
        content = file.read(extent.size)
    if len(content) != extent.size:
        raise _fault(sample, "lies outside the tar")
    return content


def decode_sample(sample: ShardSample, content: bytes) -> Image.Image:
    """The stored image as RGB.

    Raises:
        PmdError: it cannot be decoded, or has another size than the ledger states.
    """
    width, height = sample.size
    if not 0 < width * height <= _MAX_PIXELS:
        raise _fault(sample, f"has {width} x {height} pixels by the ledger")
    try:
        return decode_stored(content, sample.size)
    except ValueError as error:
        raise _fault(sample, str(error)) from error


def sample_captions(sample: ShardSample, metadata: bytes) -> SampleCaptions:
    """The captions in the JSON member of a sample, and their boxes.

    Args:
        metadata: the sample's JSON.

    Raises:
        PmdError: it has no valid captions and boxes, or other boxes than the ledger has captions.
    """
    try:
        text = parse_captions(metadata)
    except ValueError as error:
        raise _fault(sample, str(error)) from error
    if text.boxes and not len(text.boxes) == sample.num_pairs <= _MAX_BOXES:
        raise _fault(sample, f"has {len(text.boxes)} boxes for {sample.num_pairs} captions")
    return text


def _fault(sample: ShardSample, what: str) -> PmdError:
    return PmdError(
        f"{sample.shard}: the image of {sample.key} {what}, so this is no shard of `pmd build`: "
        "build it again"
    )
