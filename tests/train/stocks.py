"""Small datasets for the trainer, written with the pipeline's own writers."""

import hashlib
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

from pmd_pipeline.build.shard_writer import DigestingFile, ShardWriter
from pmd_pipeline.contract.digests import canonical_json
from pmd_pipeline.contract.models import CodeRules, Manifest, ShardEntry
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.contract.schemas import LedgerRow, ledger_bytes

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789.[]", "##a", "##b", "##c", "dog", "cat", "sep"]
RULES = CodeRules(
    tokenizer="kmeans", sha256="0" * 64, vocabulary=67, size=32, grid=4, views=1, seed=0
)


def write_vocabulary(path):
    """A vocabulary of single characters and few words."""
    path.write_text("\n".join([*SPECIALS, *WORDS]) + "\n")
    return str(path)


def jpeg(number, *, size=(48, 40), mode="RGB"):
    """A JPEG of noise that is this number's own."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).convert(mode)
    out = BytesIO()
    coarse.resize(size).save(out, "JPEG", quality=90)
    return out.getvalue()


def sample(number, captions, boxes=None, *, image=None):
    """What goes into a shard: a picture with its captions. Samples of one `image` are copies."""
    return {
        "key": hashlib.sha256(f"sample {number}".encode()).hexdigest()[:16],
        "image": number if image is None else image,
        "captions": captions,
        "boxes": boxes,
    }


def samples(count, *, captions=1, start=0):
    """Samples with so many captions each, all different."""
    return [
        sample(n, [f"dog {n} . {place}" for place in range(captions)])
        for n in range(start, start + count)
    ]


def write_pairs(path, shards, *, rules=RULES, kind="pairs", failed=0, codes_of=None):
    """A manifest at `path`, its shards beside it.

    `failed` rows without a sample are put into each ledger; `codes_of(key, view, grid)` gives the
    codes of a view.
    """
    folder = path.parent / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        _write_shard(folder, part, given, rules, failed, codes_of, kind)
        for part, given in enumerate(shards)
    ]
    return seal(
        path,
        Manifest(name=path.stem, kind=kind, sources={}, shards=entries, versions={}, codes=rules),
    )


def write_texts(path, shards, *, rows=4):
    """A manifest of texts at `path`, its shards beside it."""
    folder = path.parent / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for part, texts in enumerate(shards):
        file = folder / f"{part_name(part)}.parquet"
        pq.write_table(pa.table({"text": texts}), file, row_group_size=rows)
        content = file.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        entries.append(
            ShardEntry(
                source="ccnews",
                part=part,
                path=f"{path.stem}/{file.name}",
                sha256=sha256,
                num_bytes=len(content),
                ledger_sha256=sha256,
                records=len(texts),
                images=0,
                pairs=len(texts),
            )
        )
    return seal(
        path, Manifest(name=path.stem, kind="text", sources={}, shards=entries, versions={})
    )


def seal(path, manifest):
    """Write a manifest with its digest; its address."""
    sealed = manifest.model_copy(update={"digest": manifest.computed_digest()})
    path.write_text(sealed.model_dump_json())
    return str(path)


def reseal(path, change):
    """Change entries of a manifest's shards, and its digest with them: a hostile manifest."""
    manifest = Manifest.model_validate_json(path.read_bytes())
    return seal(path, manifest.model_copy(update={"shards": [change(s) for s in manifest.shards]}))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_shard(folder, part, given, rules, failed, codes_of, kind):
    name = part_name(part)
    tar = BytesIO()
    digesting = DigestingFile(tar)
    writer = ShardWriter(digesting)
    given = sorted(given, key=lambda one: one["key"])
    rows = [_row(one, writer, kind) for one in given]
    writer.close()
    rows += [_failed(part, number) for number in range(failed)]
    rows.sort(key=lambda row: row["key"])
    ledger = ledger_bytes([LedgerRow(id=row["key"], **row) for row in rows])
    (folder / f"{name}.tar").write_bytes(tar.getvalue())
    (folder / f"{name}.parquet").write_bytes(ledger)
    entry = ShardEntry(
        source="coco",
        part=part,
        path=f"{folder.name}/{name}.tar",
        sha256=digesting.hexdigest(),
        num_bytes=digesting.num_bytes,
        ledger_sha256=hashlib.sha256(ledger).hexdigest(),
        records=len(rows),
        images=len(given),
        pairs=sum(max(1, len(one["captions"])) for one in given),
    )
    if rules is None:
        return entry
    file = folder / f"{name}.codes.safetensors"
    views = _write_codes(file, given, rules, codes_of or own_codes)
    return entry.model_copy(update={"codes_sha256": sha256(file), "views": views})


def _row(one, writer, kind):
    image = jpeg(one["image"])
    described = {"captions": one["captions"]}
    if one["boxes"]:
        described["boxes"] = one["boxes"]
    members = {"jpg": image, "json": canonical_json(described).encode()}
    if kind == "pairs":
        members["txt"] = one["captions"][0].encode()
    places = writer.add(one["key"], members)
    return {
        "key": one["key"],
        "num_pairs": max(1, len(one["captions"])),
        "status": "success",
        "width": 48,
        "height": 40,
        "sha256": hashlib.sha256(image).hexdigest(),
        "image_offset": places["jpg"].offset,
        "image_size": places["jpg"].size,
        "json_offset": places["json"].offset,
        "json_size": places["json"].size,
    }


def _failed(part, number):
    key = hashlib.sha256(f"failed {part} {number}".encode()).hexdigest()[:16]
    return {"key": key, "num_pairs": 2, "status": "failed_to_download", "reason": "http_404"}


def own_codes(key, view, rules):
    """Codes that tell which view they belong to."""
    rng = np.random.default_rng([int(key[:8], 16), view])
    return rng.integers(0, rules.vocabulary, (rules.grid, rules.grid))


def own_box(key, view):
    """A drawn box that tells which view it belongs to."""
    x, y = np.random.default_rng([int(key[:8], 16), view]).uniform(0, 0.05, 2)
    return [x, y, x + 0.94, y + 0.94]


def _write_codes(file, given, rules, codes_of):
    boxes, codes, first = [], [], [0]
    for one in given:
        more = one["boxes"] or [own_box(one["key"], view) for view in range(1, rules.views)]
        boxes += [[0.0, 0.0, 1.0, 1.0], *more]
        codes += [codes_of(one["key"], view, rules) for view in range(1 + len(more))]
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
