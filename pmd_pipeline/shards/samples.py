"""A record and the result of its image become a sample of the tar and a row of the ledger."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pmd_pipeline.contract.digests import canonical_json
from pmd_pipeline.contract.schemas import LedgerRow
from pmd_pipeline.images.decode.processor import ImageResult
from pmd_pipeline.index.records import IndexRecord
from pmd_pipeline.shards.shard_writer import ByteRange, ShardWriter


def build_shard(
    source: str,
    records: Iterable[IndexRecord],
    results: Iterable[ImageResult],
    writer: ShardWriter,
) -> Iterator[LedgerRow]:
    """Write a sample for every record that has an image; yields the ledger row of every record.

    Args:
        records: in order of their keys.
        results: of these records, in the same order.
    """
    for record, result in zip(records, results, strict=True):
        ranges: dict[str, ByteRange] = {}
        if result.image:
            ranges = writer.add(record.key, _sample_members(source, record, result))
        yield _ledger_row(record, result, ranges)


def _ledger_row(
    record: IndexRecord, result: ImageResult, ranges: dict[str, ByteRange]
) -> LedgerRow:
    image = ranges.get(result.image.format.extension) if result.image else None
    metadata = ranges.get("json")
    return LedgerRow(
        key=record.key,
        id=record.id,
        url=record.url,
        caption=record.captions[0] or None,
        num_pairs=len(record.captions),
        status=result.status,
        reason=result.reason,
        error_message=result.detail,
        width=result.image.width if result.image else None,
        height=result.image.height if result.image else None,
        original_width=result.original_size[0],
        original_height=result.original_size[1],
        sha256=result.sha256,
        final_url=result.final_url,
        image_offset=image.offset if image else None,
        image_size=image.size if image else None,
        json_offset=metadata.offset if metadata else None,
        json_size=metadata.size if metadata else None,
    )


def _sample_members(source: str, record: IndexRecord, result: ImageResult) -> dict[str, bytes]:
    """The files of a sample by their extensions."""
    assert result.image
    captions = [caption for caption in record.captions if caption]  # an image alone has none
    metadata: dict[str, Any] = {
        "source": source,
        "id": record.id,
        "url": record.url,
        "captions": captions,
        "fields": record.fields if captions else [],
        "width": result.image.width,
        "height": result.image.height,
        "original_width": result.original_size[0],
        "original_height": result.original_size[1],
        "sha256": result.sha256,
        "licence": record.licence,
        "meta": json.loads(record.meta) if record.meta else {},
    }
    if record.boxes:
        metadata["boxes"] = record.boxes
    members = {
        result.image.format.extension: result.image.content,
        "json": canonical_json(metadata).encode(),
    }
    return members | {"txt": captions[0].encode()} if captions else members
