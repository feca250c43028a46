"""Small datasets for tests of the trainer, written with the pipeline's own writers."""

import hashlib
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

from pmd_pipeline.contract.digests import canonical_json
from pmd_pipeline.contract.image_format import JPEG, WEBP
from pmd_pipeline.contract.manifest import sealed
from pmd_pipeline.contract.models import CodeRules, Manifest, ShardEntry
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LedgerRow, ledger_bytes
from pmd_pipeline.contract.tokens import SPECIAL_TOKENS
from pmd_pipeline.shards.shard_writer import DigestingFile, ShardWriter

WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789.[]", "##a", "##b", "##c", "dog", "cat", "sep"]
RULES = CodeRules(
    tokenizer="kmeans", sha256="0" * 64, vocabulary=67, size=32, grid=4, views=1, seed=0
)


def write_vocabulary(path):
    """Write a vocabulary of single characters and a few words."""
    path.write_text("\n".join([*SPECIAL_TOKENS, *WORDS]) + "\n")
    return str(path)


def jpeg(number, *, size=(48, 40), mode="RGB"):
    """A JPEG whose pixels depend on the number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).convert(mode)
    out = BytesIO()
    coarse.resize(size).save(out, "JPEG", quality=90)
    return out.getvalue()


def webp(number):
    """A lossless WebP of the same pixels."""
    out = BytesIO()
    Image.open(BytesIO(jpeg(number))).convert("RGB").save(out, "WEBP", lossless=True)
    return out.getvalue()


def sample(number, captions, boxes=None, *, image=None):
    """An image with its captions, to be stored; samples with the same `image` have equal pixels."""
    return {
        "key": hashlib.sha256(f"sample {number}".encode()).hexdigest()[:16],
        "image": number if image is None else image,
        "captions": captions,
        "boxes": boxes,
    }


def samples(count, *, captions=1, start=0):
    """Samples with the same number of captions, all of them different."""
    return [
        sample(n, [f"dog {n} . {place}" for place in range(captions)])
        for n in range(start, start + count)
    ]


def write_pairs(
    path, shards, *, rules=RULES, kind="pairs", failed=0, codes_of=None, image_format=JPEG
):
    """Write a manifest at `path` and its shards beside it, and return its address.

    Each ledger gets `failed` rows without a sample; `codes_of(key, crop, rules)` gives the codes of
    a crop.
    """
    folder = path.parent / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        _write_shard(folder, part, stored, rules, failed, codes_of, kind, image_format)
        for part, stored in enumerate(shards)
    ]
    return seal(
        path,
        Manifest(name=path.stem, kind=kind, sources={}, shards=entries, versions={}, codes=rules),
    )


def write_texts(path, shards, *, rows=4):
    """Write a manifest of texts at `path` and its shards beside it, and return its address."""
    folder = path.parent / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for part, texts in enumerate(shards):
        paths = ShardPaths.in_folder(path.stem, part)
        file = path.parent / paths.ledger
        pq.write_table(pa.table({"text": texts}), file, row_group_size=rows)
        entries.append(
            ShardEntry(
                source="ccnews",
                part=part,
                path=paths.ledger,
                sha256=sha256(file),
                num_bytes=file.stat().st_size,
                ledger_sha256=sha256(file),
                records=len(texts),
                images=0,
                pairs=len(texts),
            )
        )
    return seal(
        path, Manifest(name=path.stem, kind="text", sources={}, shards=entries, versions={})
    )


def seal(path, manifest):
    """Write a manifest with its digest, and return its address."""
    path.write_text(sealed(manifest).model_dump_json())
    return str(path)


def reseal(path, change):
    """Change the entries of a manifest's shards, with a valid digest: a hostile manifest."""
    manifest = Manifest.model_validate_json(path.read_bytes())
    return seal(path, manifest.model_copy(update={"shards": [change(s) for s in manifest.shards]}))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_shard(folder, part, stored, rules, failed, codes_of, kind, image_format):
    paths = ShardPaths.in_folder(str(folder), part)
    tar = BytesIO()
    digesting = DigestingFile(tar)
    writer = ShardWriter(digesting)
    stored = sorted(stored, key=lambda one: one["key"])
    rows = [_store(one, writer, kind, image_format) for one in stored]
    writer.close()
    rows += [_failed_row(part, number) for number in range(failed)]
    rows.sort(key=lambda row: row.key)
    (folder / f"{paths.name}.tar").write_bytes(tar.getvalue())
    ledger = folder / f"{paths.name}.parquet"
    ledger.write_bytes(ledger_bytes(rows))
    entry = ShardEntry(
        source="coco",
        part=part,
        path=ShardPaths.in_folder(folder.name, part).tar,
        sha256=digesting.hexdigest(),
        num_bytes=digesting.num_bytes,
        ledger_sha256=sha256(ledger),
        records=len(rows),
        images=len(stored),
        pairs=sum(max(1, len(one["captions"])) for one in stored),
    )
    if rules is None:
        return entry
    codes = folder / f"{paths.name}.codes.safetensors"
    num_crops = _write_codes(codes, stored, rules, codes_of or own_codes)
    return entry.model_copy(update={"codes_sha256": sha256(codes), "views": num_crops})


def _store(one, writer, kind, image_format):
    image = webp(one["image"]) if image_format is WEBP else jpeg(one["image"])
    fields = {"captions": one["captions"]}
    if one["boxes"]:
        fields["boxes"] = one["boxes"]
    members = {image_format.extension: image, "json": canonical_json(fields).encode()}
    if kind == "pairs":
        members["txt"] = one["captions"][0].encode()
    ranges = writer.add(one["key"], members)
    return LedgerRow(
        id=one["key"],
        key=one["key"],
        num_pairs=max(1, len(one["captions"])),
        status=Status.SUCCESS,
        width=48,
        height=40,
        sha256=hashlib.sha256(jpeg(one["image"])).hexdigest(),  # of the fetched bytes
        image_offset=ranges[image_format.extension].offset,
        image_size=ranges[image_format.extension].size,
        json_offset=ranges["json"].offset,
        json_size=ranges["json"].size,
    )


def _failed_row(part, number):
    key = hashlib.sha256(f"failed {part} {number}".encode()).hexdigest()[:16]
    return LedgerRow(
        id=key, key=key, num_pairs=2, status=Status.FAILED_TO_DOWNLOAD, reason="http_404"
    )


def own_codes(key, crop, rules):
    """Codes that depend on the record and the crop."""
    rng = np.random.default_rng([int(key[:8], 16), crop])
    return rng.integers(0, rules.vocabulary, (rules.grid, rules.grid))


def own_box(key, crop):
    """A drawn box that depends on the record and the crop."""
    x, y = np.random.default_rng([int(key[:8], 16), crop]).uniform(0, 0.05, 2)
    return [x, y, x + 0.94, y + 0.94]


def _write_codes(file, stored, rules, codes_of):
    boxes, codes, first = [], [], [0]
    for one in stored:
        more = one["boxes"] or [own_box(one["key"], crop) for crop in range(1, rules.views)]
        boxes += [[0.0, 0.0, 1.0, 1.0], *more]
        codes += [codes_of(one["key"], crop, rules) for crop in range(1 + len(more))]
        first.append(len(boxes))
    save_file(
        {
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "codes": np.array(codes, np.uint16).reshape(-1, rules.grid, rules.grid),
            "first": np.array(first, np.int64),
        },
        file,
    )
    return len(boxes)
