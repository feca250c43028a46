"""ImageNet in its usual layouts: the same images give the same shards."""

import io
import json
import os
import random
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import built
from PIL import Image
from rich.console import Console
from source_helpers import SAMPLES, needs_samples
from toy import QUIET

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.dataset.build import BuildRequest, build_all
from pmd_pipeline.dataset.source_build import SourceBuild
from pmd_pipeline.inspect import stats as statistics
from pmd_pipeline.recipe import load_recipe

CLASSES = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus"}
BAD = {"empty": b"", "torn": b"\xff\xd8\xff", "text": b"GIF? no"}


def image_file(name):
    dice = random.Random(name)
    image = Image.new("RGB", (60, 48), tuple(dice.randrange(256) for _ in range(3)))
    out = io.BytesIO()
    image.save(
        out, "PNG" if dice.random() < 0.2 else "JPEG"
    )  # upstream has a PNG with the extension JPEG
    return out.getvalue()


def images(count=12):
    """Name without ending, class, content."""
    names = list(CLASSES)
    return [
        (f"{names[n % 2]}_{n * 7}", names[n % 2], image_file(f"{names[n % 2]}_{n * 7}"))
        for n in range(count)
    ]


def write_folder(root, entries, train="train"):
    for stem, wordnet, body in entries:
        path = root / train / wordnet / f"{stem}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    root.mkdir(exist_ok=True)
    lines = "".join(f"{wordnet} {name}\n" for wordnet, name in CLASSES.items())
    (root / "LOC_synset_mapping.txt").write_text(lines)
    return root


def write_parquet(root, entries, at="data"):
    """The hub's layout: image {bytes, path} and label; the path ends with the class."""
    labels = list(CLASSES)
    (root / at).mkdir(parents=True)
    for number, some in enumerate([entries[:5], entries[5:]]):
        rows = [
            {"image": {"bytes": body, "path": f"{stem}_{c}.JPEG"}, "label": labels.index(c)}
            for stem, c, body in some
        ]
        name = f"train-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(rows), root / at / name, row_group_size=3)
    held_out = root / at / "validation-00000-of-00001.parquet"
    shutil.copy(root / at / "train-00000-of-00002.parquet", held_out)
    lines = "".join(f"{wordnet} {name}\n" for wordnet, name in CLASSES.items())
    (root / "LOC_synset_mapping.txt").write_text(lines)
    return root


def source_build(folder, raw, **changes):
    return SourceBuild(
        recipe=load_recipe("imagenet1k", {"part_records": 5, **changes})[0],
        raw=str(raw),
        data=str(folder / "data"),
        manifest=str(folder / "manifests" / "imagenet1k.json"),
    )


def samples(build, manifest):
    """Members of every sample, by key and ending."""
    members = {}
    for shard in manifest.shards:
        with tarfile.open(Path(build.manifest).parent / shard.path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    return members


def test_each_image_is_one_row_without_captions(tmp_path):
    build = source_build(tmp_path, write_folder(tmp_path / "raw", images()))

    manifest = built(build)

    members = samples(build, manifest)
    described = [json.loads(body) for name, body in members.items() if name.endswith(".json")]
    ledgers = [
        row
        for shard in manifest.shards
        for row in pq.read_table(tmp_path / "manifests" / shard.ledger_path).to_pylist()
    ]
    assert manifest.kind == "images"
    assert manifest.sources["imagenet1k"].counts.kept == 12 == len(described)
    assert Counter(name.rpartition(".")[2] for name in members) == {"jpg": 12, "json": 12}
    assert {one["id"] for one in described} == {stem for stem, _, _ in images()}
    assert all(one["captions"] == one["fields"] == [] for one in described)
    assert [row["caption"] for row in ledgers] == [None] * 12
    assert {row["num_pairs"] for row in ledgers} == {1}
    assert sum(shard.pairs for shard in manifest.shards) == 12
    for one in described:
        wordnet = one["id"].partition("_")[0]
        label = list(CLASSES).index(wordnet)
        assert one["meta"] == {"class": wordnet, "class_name": CLASSES[wordnet], "label": label}


@pytest.mark.parametrize("train", ["ILSVRC/Data/CLS-LOC/train", "."])
def test_every_layout_gives_the_same_shards(tmp_path, train):
    builds = [
        source_build(tmp_path / "a", write_folder(tmp_path / "raw_a", images())),
        source_build(tmp_path / "b", write_folder(tmp_path / "raw_b", images(), train)),
        source_build(tmp_path / "c", write_parquet(tmp_path / "raw_c", images())),
        source_build(tmp_path / "d", write_parquet(tmp_path / "raw_d", images(), ".")),
    ]

    digests = [[shard.sha256 for shard in built(build).shards] for build in builds]

    assert digests == digests[:1] * 4


def test_bad_images_are_counted_and_the_build_continues(tmp_path):
    hostile = [(f"n01440764_{name}", "n01440764", body) for name, body in BAD.items()]
    raw = write_folder(tmp_path / "raw", [*images(), *hostile])
    folder = raw / "train" / "n01440764"
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "n01440764_9.JPEG.tmp").write_bytes(b"x")
    (folder / "n01440764_dir.JPEG").mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.JPEG")).write_bytes(b"x")

    counts = built(source_build(tmp_path, raw)).sources["imagenet1k"].counts

    assert counts.unaccounted() == 0
    assert counts.pairs_in == 12 + 3 + 4
    assert counts.kept == 12
    assert counts.dropped == {"bad_row": 4}
    assert sum(counts.failed.values()) == 3


def test_rows_of_the_hub_without_bytes_or_path_are_counted_or_named(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    body = image_file("a")
    rows = [
        {"image": {"bytes": body, "path": None}, "label": 1},
        {"image": {"bytes": image_file("b"), "path": "../../etc/passwd"}, "label": 7},
        {"image": {"bytes": image_file("c"), "path": "/etc/x.JPEG"}, "label": None},
        {"image": {"bytes": None, "path": "a.JPEG"}, "label": 1},
        {"image": None, "label": 1},
    ]
    kind = pa.schema([
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.int64()),
    ])  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=kind), raw / "train-00000-of-00001.parquet")
    build = source_build(tmp_path, raw)

    manifest = built(build)

    assert manifest.sources["imagenet1k"].counts.dropped == {"bad_row": 2}
    described = [json.loads(b) for name, b in samples(build, manifest).items() if "json" in name]
    stem = "train-00000-of-00001"
    assert {one["id"] for one in described} == {f"{stem}-0", f"{stem}-1", "x"}
    unpacked = tmp_path / "data" / "index" / "imagenet1k" / "images" / "train"
    assert {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*.*")} == {
        f"unknown/{name}.JPEG" for name in (f"{stem}-0", f"{stem}-1", "x")
    }


def test_a_repeated_image_is_kept_once(tmp_path):
    raw = write_parquet(tmp_path / "raw", [*images(), images()[0]])

    counts = built(source_build(tmp_path, raw)).sources["imagenet1k"].counts

    assert (counts.kept, counts.dropped) == (12, {"repeat": 1})


def test_a_parquet_file_is_unpacked_again_only_after_a_change(tmp_path):
    raw = write_parquet(tmp_path / "raw", images())
    build = source_build(tmp_path, raw)
    first = built(build)
    unpacked = tmp_path / "data" / "index" / "imagenet1k" / "images"
    before = {path: path.stat().st_mtime_ns for path in unpacked.rglob("*") if path.is_file()}

    assert built(build) == first
    assert before == {p: p.stat().st_mtime_ns for p in unpacked.rglob("*") if p.is_file()}

    shutil.rmtree(raw)
    write_parquet(raw, images(11))
    assert built(build).sources["imagenet1k"].counts.kept == 11


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, b"", "has neither train/n01440764"),
        ("train-00000-of-00001.parquet", b"PAR1", "cannot unpack"),
        ("val/n01440764/a.JPEG", b"x", "has neither train/n01440764"),
    ],
)
def test_a_folder_without_imagenet_is_refused(tmp_path, name, content, words):
    (tmp_path / "raw" / "imagenet1k").mkdir(parents=True)
    if name:
        path = tmp_path / "raw" / "imagenet1k" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    request = BuildRequest(
        recipes=("imagenet1k",),
        out=str(tmp_path / "data"),
        manifests=str(tmp_path / "manifests"),
        raw=str(tmp_path / "raw"),
        runner="local",
        workers=1,
    )

    with pytest.raises(PmdError, match=words):
        build_all(request, QUIET)


def test_a_parquet_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "raw" / "train-0.parquet")

    with pytest.raises(PmdError, match="no column image with bytes"):
        built(source_build(tmp_path, tmp_path / "raw"))


@needs_samples
def test_photographs_are_stored_at_the_recipes_size(tmp_path):
    photos = sorted((SAMPLES / "coco" / "mini" / "train2017").glob("*.jpg"))[:3]
    entries = [(f"n01440764_{n}", "n01440764", p.read_bytes()) for n, p in enumerate(photos)]
    build = source_build(tmp_path, write_folder(tmp_path / "raw", entries))

    members = samples(build, built(build))

    sizes = [Image.open(io.BytesIO(b)).size for name, b in members.items() if "jpg" in name]
    assert [min(size) for size in sizes] == [256] * 3


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_folder, write_parquet])
@pytest.mark.parametrize("runner", ["local", "ray"])
def test_any_number_of_workers_gives_the_same_manifest(tmp_path, runner, write):
    raw = write(tmp_path / "raw", images(40))
    alone = built(source_build(tmp_path / "a", raw))

    with open_pool(runner, 2, None) as pool:
        together = built(source_build(tmp_path / "b", raw), pool)

    assert together.digest == alone.digest


def test_statistics_of_images_have_no_words(tmp_path):
    manifest = built(source_build(tmp_path, write_folder(tmp_path / "raw", images())))
    console = Console(width=120, file=io.StringIO())

    [row] = statistics.lengths(manifest)
    console.print(*statistics.as_table([row], manifest))

    assert (row.pairs, row.images, row.words_mean, row.sequences) == (12, 12, None, None)
    assert "images by outcome" in console.file.getvalue()
    assert "words in" not in console.file.getvalue()
    with pytest.raises(PmdError, match="no captions to plot"):
        statistics.plot([row], manifest, str(tmp_path / "a.png"))


def test_another_layout_in_the_same_folder_replaces_the_first(tmp_path):
    built(source_build(tmp_path, write_parquet(tmp_path / "tables", images())))

    manifest = built(source_build(tmp_path, write_folder(tmp_path / "folder", images()[:3])))

    assert manifest.sources["imagenet1k"].counts.pairs_in == 3
