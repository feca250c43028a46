"""Samples for the page: kept images as thumbnails, and examples of dropped and failed pairs."""

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, ValidationError

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.image_format import JPEG
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.images.decode.decoder import open_image
from pmd_pipeline.images.decode.jpeg import encode_jpeg
from pmd_pipeline.images.decode.stored_image import make_stored_image
from pmd_pipeline.index.records import DroppedPair
from pmd_pipeline.inspect.report.ledgers import LedgerSample
from pmd_pipeline.inspect.shard_contents import read_bytes_at
from pmd_pipeline.recipe import Images

NUM_KEPT = 8
"""Samples of a source on the page: those with the smallest keys, which are hashes."""

NUM_PER_REASON = 3
MAX_CAPTIONS = 5
MAX_MEMBER_BYTES = 32 << 20
"""Bytes of a tar member that are read, whatever the ledger states."""

THUMBNAIL = Images(size=320, mode="longer", quality=72)
MAX_THUMBNAIL_BYTES = 20_000
"""A small image keeps its own bytes up to this size; larger ones are encoded again."""


@dataclass(frozen=True)
class Region:
    """A box in per cent of the image, with the numbers of its captions (`1`, or `1, 3`)."""

    numbers: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class GalleryImage:
    """A kept sample.

    Args:
        image: the thumbnail as a `data:` URI; None if `problem` has the reason.
        captions: the first of `num_captions`.
        regions: the boxes of these captions, if the record has boxes.
    """

    key: str
    url: str | None
    image: str | None
    width: int
    height: int
    captions: list[str]
    num_captions: int
    regions: list[Region] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class LostExample:
    """A dropped pair, or a record that was dropped or failed, with the reason."""

    key: str
    reason: str
    url: str | None
    text: str | None
    detail: str | None


def gallery_images(sample: LedgerSample) -> list[GalleryImage]:
    """The first kept samples in order of key, with their images from the shards.

    Raises:
        PmdError: a shard is missing.
    """
    first = sample.kept.filter(pl.col("image_offset").is_not_null()).head(NUM_KEPT)
    columns = [column.name for column in fields(_LedgerPlace)]
    return [_gallery_image(_LedgerPlace(*row)) for row in first.select(columns).iter_rows()]


def sample_texts(sample: LedgerSample) -> list[str]:
    """The first texts of a source without images."""
    texts = sample.kept.filter(pl.col("image_offset").is_null())["caption"]
    return texts.drop_nulls().head(NUM_KEPT).to_list()


def lost_examples(
    sample: LedgerSample, dropped: Iterable[DroppedPair]
) -> dict[str, list[LostExample]]:
    """The first examples of each reason: `dropped` by the index, then from the ledgers."""
    by_reason: dict[str, list[LostExample]] = {}
    for one in (*_from_index(dropped), *_from_ledgers(sample)):
        examples = by_reason.setdefault(one.reason, [])
        if len(examples) < NUM_PER_REASON:
            examples.append(one)
    return by_reason


class _Description(BaseModel):
    """The fields of a sample's JSON that the page needs, validated, since the file is untrusted."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    captions: list[str]
    boxes: list[tuple[float, float, float, float] | None] | None = None


@dataclass(frozen=True)
class _LedgerPlace:
    """The columns of a ledger row that locate a sample, and `shard`, the address of its tar."""

    key: str
    url: str | None
    caption: str | None
    json_offset: int
    json_size: int
    image_offset: int
    image_size: int
    shard: str


def _gallery_image(row: _LedgerPlace) -> GalleryImage:
    description, image, size = _Description(captions=[row.caption or ""]), None, (4, 3)
    problem = ""
    text = read_bytes_at(row.shard, row.json_offset, min(row.json_size, MAX_MEMBER_BYTES))
    body = read_bytes_at(row.shard, row.image_offset, min(row.image_size, MAX_MEMBER_BYTES))
    try:
        description = _Description.model_validate_json(text)
        thumbnail = _thumbnail(body)
        image = f"data:{JPEG.mime};base64," + base64.b64encode(thumbnail).decode()
        size = open_image(thumbnail, THUMBNAIL).size
    except RecordError as error:
        problem = f"the stored image cannot be read ({error.detail}); run pmd verify"
    except ValidationError:
        problem = "the stored JSON cannot be read; run pmd verify"
    return GalleryImage(
        key=row.key,
        url=row.url,
        image=image,
        width=size[0],
        height=size[1],
        captions=description.captions[:MAX_CAPTIONS],
        num_captions=len(description.captions),
        regions=_caption_regions(description.boxes[:MAX_CAPTIONS])
        if image and description.boxes
        else [],
        problem=problem,
    )


def _thumbnail(body: bytes) -> bytes:
    small = make_stored_image(body, open_image(body, THUMBNAIL), THUMBNAIL).content
    if len(small) <= MAX_THUMBNAIL_BYTES:
        return small
    pixels = np.asarray(open_image(small, THUMBNAIL).convert("RGB"))
    return encode_jpeg(pixels, THUMBNAIL.quality)


def _caption_regions(boxes: Iterable[tuple[float, ...] | None]) -> list[Region]:
    numbers: dict[tuple[float, ...], list[str]] = {}
    for number, box in enumerate(boxes, 1):
        if box:
            numbers.setdefault(tuple(round(100 * side, 2) for side in box), []).append(str(number))
    return [
        Region(", ".join(own), x0, y0, round(x1 - x0, 2), round(y1 - y0, 2))
        for (x0, y0, x1, y1), own in numbers.items()
    ]


def _from_index(dropped: Iterable[DroppedPair]) -> Iterator[LostExample]:
    for pair in dropped:
        yield LostExample(pair.key, pair.reason, pair.url, pair.text, pair.field)


def _from_ledgers(sample: LedgerSample) -> Iterator[LostExample]:
    lost = sample.rows.filter(pl.col("status") != Status.SUCCESS)
    first = lost.filter(pl.int_range(pl.len()).over("reason") < NUM_PER_REASON)
    columns = ("key", "reason", "url", "caption", "error_message")
    yield from (LostExample(*row) for row in first.select(columns).iter_rows())
