"""Samples to look at: pictures that are kept, and what was dropped or failed, with reasons."""

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, ValidationError

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.files import open_read
from pmd_pipeline.contract.image_format import JPEG
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.images.decode.decoder import open_image
from pmd_pipeline.images.decode.jpeg import encode_jpeg
from pmd_pipeline.images.decode.stored_image import make_stored_image
from pmd_pipeline.inspect.report.ledgers import Sample
from pmd_pipeline.recipe import Images

KEPT = 8
"""Samples shown of a source: those with the smallest keys, which are hashes."""

PER_REASON = 3
MOST_CAPTIONS = 5
MOST_MEMBER = 32 << 20
"""Bytes of a member that are read; a ledger that says more of it is not believed."""

THUMBNAIL = Images(size=320, mode="longer", quality=72)
MOST_BYTES = 20_000
"""Bytes of a thumbnail; a small picture keeps its own, and some are heavy."""


@dataclass(frozen=True)
class Region:
    """A box in hundredths of the picture, with the numbers of its captions (`1`, or `1, 3`)."""

    numbers: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Shown:
    """A sample of the shards.

    Args:
        image: the thumbnail as a `data:` URI; None with the reason in `trouble`.
        captions: the first few of `num_captions`.
        regions: where these captions belong, if the record has boxes.
    """

    key: str
    url: str | None
    image: str | None
    width: int
    height: int
    captions: list[str]
    num_captions: int
    regions: list[Region] = field(default_factory=list)
    trouble: str = ""


@dataclass(frozen=True)
class Lost:
    """A pair that is not there, or an image with its pairs: what is known of it, and the reason."""

    key: str
    reason: str
    url: str | None
    text: str | None
    detail: str | None


def shown(sampled: Sample) -> list[Shown]:
    """The first samples that are kept, in order of key, their pictures read from the shards.

    Raises:
        PmdError: a shard is not there.
    """
    first = sampled.kept.filter(pl.col("image_offset").is_not_null()).head(KEPT)
    return [_shown(row) for row in first.iter_rows(named=True)]


def texts(sampled: Sample) -> list[str]:
    """The first texts of a source without images."""
    found = sampled.kept.filter(pl.col("image_offset").is_null())["caption"]
    return found.drop_nulls().head(KEPT).to_list()


def lost(sampled: Sample, dropped: Iterable[dict[str, Any]]) -> dict[str, list[Lost]]:
    """The first few of every reason, by reason: from the ledgers, and `dropped` by the index."""
    found: dict[str, list[Lost]] = {}
    for one in (*_from_index(dropped), *_from_ledgers(sampled)):
        examples = found.setdefault(one.reason, [])
        if len(examples) < PER_REASON:
            examples.append(one)
    return found


class _Described(BaseModel):
    """What is read of the JSON of a sample, which is a stranger's until checked."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    captions: list[str]
    boxes: list[tuple[float, float, float, float] | None] | None = None


def _shown(row: dict[str, Any]) -> Shown:
    described, image, size, trouble = _Described(captions=[row["caption"] or ""]), None, (4, 3), ""
    with open_read(row["shard"]) as file:
        file.seek(row["json_offset"])
        text = file.read(min(row["json_size"], MOST_MEMBER))
        file.seek(row["image_offset"])
        body = file.read(min(row["image_size"], MOST_MEMBER))
    try:
        described = _Described.model_validate_json(text)
        thumbnail = _thumbnail(body)
        image = f"data:{JPEG.mime};base64," + base64.b64encode(thumbnail).decode()
        size = open_image(thumbnail, THUMBNAIL).size
    except RecordError as error:
        trouble = f"the stored image cannot be read ({error.detail}); see pmd verify"
    except ValidationError:
        trouble = "the stored description cannot be read; see pmd verify"
    return Shown(
        key=row["key"],
        url=row["url"],
        image=image,
        width=size[0],
        height=size[1],
        captions=described.captions[:MOST_CAPTIONS],
        num_captions=len(described.captions),
        regions=_regions(described.boxes[:MOST_CAPTIONS]) if image and described.boxes else [],
        trouble=trouble,
    )


def _thumbnail(body: bytes) -> bytes:
    small = make_stored_image(body, open_image(body, THUMBNAIL), THUMBNAIL).content
    if len(small) <= MOST_BYTES:
        return small
    pixels = np.asarray(open_image(small, THUMBNAIL).convert("RGB"))
    return encode_jpeg(pixels, THUMBNAIL.quality)


def _regions(boxes: Iterable[tuple[float, ...] | None]) -> list[Region]:
    numbers: dict[tuple[float, ...], list[str]] = {}
    for number, box in enumerate(boxes, 1):
        if box:
            numbers.setdefault(tuple(round(100 * side, 2) for side in box), []).append(str(number))
    return [
        Region(", ".join(own), x0, y0, round(x1 - x0, 2), round(y1 - y0, 2))
        for (x0, y0, x1, y1), own in numbers.items()
    ]


def _from_index(dropped: Iterable[dict[str, Any]]) -> Iterator[Lost]:
    for pair in dropped:
        yield Lost(pair["key"], pair["reason"], pair["url"], pair["text"], pair["field"])


def _from_ledgers(sampled: Sample) -> Iterator[Lost]:
    missed = sampled.rows.filter(pl.col("status") != Status.SUCCESS)
    first = missed.filter(pl.int_range(pl.len()).over("reason") < PER_REASON)
    for row in first.iter_rows(named=True):
        yield Lost(row["key"], row["reason"], row["url"], row["caption"], row["error_message"])
