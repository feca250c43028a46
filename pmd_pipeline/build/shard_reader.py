"""Samples of a shard that a manifest vouches for, read again: nothing in it is believed."""

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from io import BytesIO
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pmd_pipeline.base.tables import read_table
from pmd_pipeline.build.shard_writer import ByteRange
from pmd_pipeline.contract.boxes import is_box
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import read_bytes, sha256_of
from pmd_pipeline.contract.models import ShardEntry
from pmd_pipeline.contract.reasons import Status

_COLUMNS = (
    "key", "status", "num_pairs", "width", "height",
    "image_offset", "image_size", "json_offset", "json_size",
)  # fmt: skip
_KEY = re.compile("[0-9a-f]{16}")
_MOST_PIXELS = 100_000_000
"""Of a stored image; more is no decode_image but a trap."""

_MOST_BYTES = 1 << 28
"""Of a member; no stored image or description comes near it."""

_MOST_BOXES = 4096
"""Of one image; Visual Genome has some hundred at most."""

_BROKEN = (OSError, SyntaxError, ValueError, TypeError, MemoryError, OverflowError, struct.error)
"""What Pillow's JPEG decoder is known to raise on hostile bytes."""


class ShardSample(NamedTuple):
    """One sample of a tar, as its ledger row describes it; `number` counts from 0 in ledger order.

    Args:
        shard: address of the tar.
        image: where the JPEG lies in it.
        described: where the JSON lies.
    """

    shard: str
    number: int
    key: str
    num_pairs: int
    size: tuple[int, int]
    image: ByteRange
    described: ByteRange


def check_tar(shard: str, entry: ShardEntry) -> None:
    """Read the tar once, to see that it is the one `entry` speaks of.

    Raises:
        PmdError: it is not.
    """
    if sha256_of(shard) != entry.sha256:
        raise PmdError(
            f"{shard} is not the shard that the manifest names, its sha256 differs: delete it and "
            "build it again, or copy it again"
        )


def read_samples(shard: str, entry: ShardEntry) -> list[ShardSample]:
    """The samples of the tar at `shard`, from its ledger.

    Raises:
        PmdError: the ledger is not the one `entry` speaks of, or cannot be right.
    """
    address = shard.removesuffix(".tar") + ".parquet"
    content = read_bytes(address)
    if hashlib.sha256(content).hexdigest() != entry.ledger_sha256:
        raise PmdError(
            f"{address} is not the ledger that the manifest names, its sha256 differs: delete it "
            "and build it again, or copy it again"
        )
    try:
        table = read_table(BytesIO(content), _COLUMNS)
        rows = table.filter(pc.equal(table["status"], Status.SUCCESS)).to_pylist()
    except (pa.ArrowException, KeyError, OSError) as error:
        raise PmdError(f"{address} is no ledger: {str(error).splitlines()[0]}") from error
    samples = []
    for number, row in enumerate(rows):
        numbers = [row[name] for name in _COLUMNS[2:]]
        if not all(isinstance(one, int) and one >= 0 for one in numbers) or not (
            isinstance(row["key"], str) and _KEY.fullmatch(row["key"])
        ):
            raise PmdError(f"{address}: the row of {row['key']} says nothing of where its image is")
        pairs, width, height, *places = numbers
        image, described = ByteRange(*places[:2]), ByteRange(*places[2:])
        samples.append(
            ShardSample(shard, number, row["key"], pairs, (width, height), image, described)
        )
    if len(samples) != entry.images:
        raise PmdError(f"{address} has {len(samples)} images, the manifest {entry.images}")
    return samples


def read_member(file: BinaryIO, sample: ShardSample, place: ByteRange) -> bytes:
    """The content of a member of the open tar.

    Raises:
        PmdError: the tar ends before.
    """
    content = b""
    if place.size <= _MOST_BYTES:
        file.seek(place.offset)
        content = file.read(place.size)
    if len(content) != place.size:
        raise _wrong(sample, "lies outside the tar")
    return content


def decode_image(sample: ShardSample, jpeg: bytes) -> Image.Image:
    """The stored image as RGB.

    Raises:
        PmdError: it is no whole JPEG of the size that the ledger says.
    """
    width, height = sample.size
    try:
        image = Image.open(BytesIO(jpeg), formats=("JPEG",))
        if image.size != sample.size or not 0 < width * height <= _MOST_PIXELS:
            raise _wrong(sample, f"is {image.size[0]} x {image.size[1]} pixels")
        return image.convert("RGB")
    except _BROKEN as error:
        raise _wrong(sample, f"cannot be decoded ({error})") from error


def caption_boxes(sample: ShardSample, described: bytes) -> Sequence[Sequence[float]]:
    """The box of each caption, as fractions of the stored image; none where captions have none.

    Raises:
        PmdError: the sample's JSON holds no such boxes.
    """
    try:
        boxes = json.loads(described).get("boxes", [])
        found = [tuple(float(side) for side in box) for box in boxes]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _wrong(sample, f"has a description that cannot be read ({error})") from error
    if found and not len(found) == sample.num_pairs <= _MOST_BOXES:
        raise _wrong(sample, f"has {len(found)} boxes for {sample.num_pairs} captions")
    if not all(is_box(box) for box in found):
        raise _wrong(sample, "has a box that is not inside it")
    return found


def _wrong(sample: ShardSample, what: str) -> PmdError:
    return PmdError(
        f"{sample.shard}: the image of {sample.key} {what}, so this is no shard of `pmd build`: "
        "build it again"
    )
