"""Shards and manifests written without a build, for tests of their readers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pmd_pipeline.contract.digests import canonical_json
from pmd_pipeline.contract.image_format import JPEG, WEBP, ImageFormat
from pmd_pipeline.contract.manifest import save_manifest
from pmd_pipeline.contract.models import Counts, Manifest, ShardEntry, SourceEntry
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LedgerRow, ledger_bytes
from pmd_pipeline.shards.shard_writer import DigestingFile, ShardWriter


@dataclass
class HandmadeRecord:
    """One record of a handmade shard.

    Args:
        key: sixteen hex digits.
        image: RGB [h, w, 3], or the stored bytes.
        boxes: of the captions.
        json_changes: values of the JSON that replace those of the record.
        row: values of the ledger row that replace those of the record.
    """

    key: str
    image: Any
    captions: Sequence[str] = ("a caption",)
    boxes: Sequence[Sequence[float]] | None = None
    json_changes: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)


def jpeg(image: np.ndarray) -> bytes:
    """The image with as little loss as JPEG can."""
    out = BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=100, subsampling=0)
    return out.getvalue()


def webp(image: np.ndarray) -> bytes:
    """The image as WebP without loss."""
    out = BytesIO()
    Image.fromarray(image).save(out, "WEBP", lossless=True)
    return out.getvalue()


def png(image: np.ndarray) -> bytes:
    """The image as PNG."""
    out = BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def tiles(colours: np.ndarray, side: int = 8) -> np.ndarray:
    """An image of squares, one for each of `colours` [r, c, 3]."""
    return np.asarray(colours, dtype=np.uint8).repeat(side, 0).repeat(side, 1)


def write_shard(
    folder: Path,
    source: str,
    part: int,
    records: Sequence[HandmadeRecord],
    stored: ImageFormat = JPEG,
) -> ShardEntry:
    """A tar with its ledger; failed records are those without an image."""
    encode = {JPEG: jpeg, WEBP: webp}[stored]
    folder.mkdir(parents=True, exist_ok=True)
    out = BytesIO()
    tar = DigestingFile(out)
    writer = ShardWriter(tar)
    rows = []
    for record in records:
        row = dict.fromkeys(("width", "height", "image_offset", "image_size"))
        if record.image is not None:
            is_array = isinstance(record.image, np.ndarray)
            content = encode(record.image) if is_array else record.image
            sample = {"captions": list(record.captions), **record.json_changes}
            if record.boxes is not None:
                sample["boxes"] = [list(box) for box in record.boxes]
            places = writer.add(
                record.key,
                {
                    stored.extension: content,
                    "json": canonical_json(sample).encode(),
                    "txt": b"a caption",
                },
            )
            height, width = record.image.shape[:2] if is_array else (8, 8)
            row |= {
                "width": width,
                "height": height,
                "image_offset": places[stored.extension].offset,
                "image_size": places[stored.extension].size,
                "json_offset": places["json"].offset,
                "json_size": places["json"].size,
            }
        row |= {
            "key": record.key,
            "id": record.key,
            "status": Status.SUCCESS if record.image is not None else "failed_to_download",
            "num_pairs": len(record.captions),
        }
        rows.append(row | record.row)
    writer.close()
    ledger = ledger_bytes([LedgerRow(**row) for row in rows])
    (folder / f"{part:05d}.tar").write_bytes(out.getvalue())
    (folder / f"{part:05d}.parquet").write_bytes(ledger)
    kept = [record for record in records if record.image is not None]
    return ShardEntry(
        source=source,
        part=part,
        path=str(folder / f"{part:05d}.tar"),
        sha256=tar.hexdigest(),
        num_bytes=tar.num_bytes,
        ledger_sha256=hashlib.sha256(ledger).hexdigest(),
        records=len(records),
        images=len(kept),
        pairs=sum(len(record.captions) for record in kept),
    )


def write_manifest(
    path: Path, shards: Sequence[ShardEntry], kind: Literal["pairs", "images", "text"] = "pairs"
) -> str:
    """The manifest of these shards; its path."""
    sources = {
        name: SourceEntry(
            licence="",
            citation="",
            counts=Counts(),
            images=0,
            unique_images=0,
            words={},
            rules={},
            rules_sha256="0" * 64,
            upstream=[],
            leakage="none",
        )
        for name in {shard.source for shard in shards}
    }
    manifest = Manifest(name="hand", kind=kind, sources=sources, shards=list(shards), versions={})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_manifest(str(path), manifest.model_copy(update={"digest": manifest.computed_digest()}))
    return str(path)
