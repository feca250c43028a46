"""Lock and rebuild: the same dataset from a lock file, or exactly what is missing."""

import hashlib
import json
import random
import shutil
import sys
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from handmade_shards import HandmadeRecord, tiles, webp, write_manifest, write_shard
from toy import QUIET, toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

from pmd_pipeline import cli
from pmd_pipeline.base.parallel import WorkerDied, open_pool
from pmd_pipeline.base.record import key_of
from pmd_pipeline.codes.tensors import code_tensors
from pmd_pipeline.codes.tokenize import CodesRequest, code_manifest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.image_format import WEBP
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.contract.models import FileDigest
from pmd_pipeline.images.decode import stored_image
from pmd_pipeline.inspect.verify.dataset import verify
from pmd_pipeline.publish.lockfile import lock as locking
from pmd_pipeline.publish.lockfile import restore_part as restore
from pmd_pipeline.publish.lockfile.format import (
    LOCKED_SCHEMA,
    LOCKFILE_NAME,
    LockedRow,
    LockFile,
    caption_sha256,
    load_lockfile,
    locked_rows,
    rows_bytes,
)
from pmd_pipeline.publish.lockfile.lock import lock
from pmd_pipeline.publish.lockfile.rebuild import RebuildRequest, rebuild
from pmd_pipeline.shards import shard as shard_build


def key(number):
    return key_of("cc3m", f"http://a.test/{number}.jpg")


def locked(manifest, folder, *, workers=1, hashed=False):
    with open_pool("local", workers, None) as pool:
        return lock(str(manifest), str(folder), pool, QUIET, hashed=hashed)


def rebuilt(lock_folder, folder, pictures, *, workers=1, raw=None):
    request = RebuildRequest(
        lockfile=str(lock_folder),
        out=str(folder / "data"),
        manifests=str(folder / "manifests"),
        images=(str(pictures),),
        raw=raw and str(raw),
    )
    with open_pool("local", workers, None) as pool:
        return rebuild(request, pool, QUIET)


def findings(manifest):
    with open_pool("local", 1, None) as pool:
        return [str(one) for one in verify(str(manifest), pool, QUIET)]


def codes_by_key(manifest):
    """The codes of each image of a dataset, by key."""
    found = {}
    for shard in load_manifest(str(manifest)).shards:
        tar = Path(located(str(manifest), shard.path))
        rows = pq.read_table(tar.with_suffix(".parquet")).to_pylist()
        keys = [row["key"] for row in rows if row["status"] == "success"]
        tensors = code_tensors(tar.with_suffix(".codes.safetensors").read_bytes())
        for number, one in enumerate(keys):
            first, stop = tensors["first"][number : number + 2]
            found[one] = (
                tensors["codes"][first:stop].tolist(),
                tensors["boxes"][first:stop].tolist(),
            )
    return found


def make_dataset(folder, images):
    """The manifest of 40 records in five shards, of which 36 have an image, with image codes."""
    write_rows(folder / "raw", [*toy_rows(40), ("no address here", "nowhere")])
    write_pictures(folder / "pictures", [f"{number}.jpg" for number in range(36)])
    recipe = toy_recipe(part_records=8, images=images)
    source_build = toy_source_build(folder, recipe, pictures=folder / "pictures")
    toy_build(source_build)
    request = CodesRequest(
        source_build.manifest, vocabulary=8, grid=2, views=2, runner="local", workers=1
    )
    code_manifest(request, QUIET)
    return Path(source_build.manifest)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("original"), {"size": 32})


@pytest.fixture
def lock_folder(original, tmp_path):
    locked(original, tmp_path / "locked")
    return tmp_path / "locked"


@pytest.fixture
def pictures(original, tmp_path):
    """A copy of the pictures, which a test may change."""
    return Path(shutil.copytree(original.parents[1] / "pictures", tmp_path / "pictures"))


def test_webp_images_are_locked_by_their_stored_bytes(tmp_path):
    image = tiles([[[250, 20, 20], [20, 250, 20]]])
    shard = write_shard(tmp_path / "toy", "toy", 0, [HandmadeRecord("1" * 16, image)], WEBP)

    locked(write_manifest(tmp_path / "hand.json", [shard]), tmp_path / "locked")

    [row] = pq.read_table(tmp_path / "locked" / "toy" / "00000.parquet").to_pylist()
    assert row["stored_sha256"] == hashlib.sha256(webp(image)).hexdigest()


def test_a_dataset_of_webp_is_verified_locked_and_rebuilt(tmp_path):
    manifest = make_dataset(tmp_path / "a", {"size": 32, "format": "webp", "quality": 80})
    assert findings(manifest) == []
    locked(manifest, tmp_path / "locked")

    result = rebuilt(tmp_path / "locked", tmp_path / "again", tmp_path / "a" / "pictures")

    assert result.is_same
    assert not result.codes_lost
    assert findings(result.path) == []


def test_over_an_unchanged_web_the_digest_is_the_same(original, lock_folder, pictures, tmp_path):
    result = rebuilt(lock_folder, tmp_path / "again", pictures)

    assert result.is_same
    assert result.manifest.digest == load_manifest(str(original)).digest
    assert (result.missing, result.versions, result.codes_lost) == (None, [], False)
    assert [str(one) for one in result.coverage] == ["cc3m: 36 of 36 images (100.00 %)"]
    assert findings(result.path) == []
    before, after = (
        {path.name: path.read_bytes() for path in (folder / "data/shards/cc3m").iterdir()
         if path.suffix in {".tar", ".parquet", ".safetensors"}}
        for folder in (original.parents[1], tmp_path / "again")
    )  # fmt: skip
    assert before == after


@pytest.mark.parametrize("seed", range(3))
def test_what_has_changed_or_gone_is_named_exactly(original, lock_folder, pictures, tmp_path, seed):
    generator = random.Random(seed)
    victims = generator.sample(range(36), 4)
    changed, gone = set(victims[:2]), set(victims[2:])
    for number in changed:
        other = write_pictures(tmp_path / "other", [f"{number} new.jpg"]) / f"{number} new.jpg"
        other.rename(pictures / f"{number}.jpg")
    for number in gone:
        (pictures / f"{number}.jpg").unlink()

    result = rebuilt(lock_folder, tmp_path / "again", pictures)

    lines = [json.loads(line) for line in Path(result.missing).read_text().splitlines()]
    assert {(one["key"], one["reason"]) for one in lines} == {
        *((key(number), "changed") for number in changed),
        *((key(number), "not_in_archive") for number in gone),
    }
    assert not result.is_same
    assert str(result.coverage[0]) == (
        "cc3m: 32 of 36 images (88.89 %), 2 changed, 2 not_in_archive"
    )
    assert any("images missing: 4; " in one for one in result.reasons())
    assert findings(result.path) == []
    before, after = codes_by_key(original), codes_by_key(result.path)
    assert after == {one: before[one] for one in before if one not in {key(n) for n in victims}}
    entry = result.manifest.sources["cc3m"]
    assert entry.counts.unaccounted() == 0
    assert entry.images == 32


def test_records_without_an_image_are_not_fetched(original, lock_folder, pictures, tmp_path):
    write_pictures(pictures, [f"{number}.jpg" for number in range(36, 40)])

    assert rebuilt(lock_folder, tmp_path / "again", pictures).is_same


def test_images_of_the_optout_list_are_not_restored(lock_folder, pictures, tmp_path, monkeypatch):
    folder = tmp_path / "again"
    assert rebuilt(lock_folder, folder, pictures).is_same
    part_of_3 = next(
        part.part
        for part in load_lockfile(str(lock_folder)).parts
        if key(3) in {row.key for row in locked_rows(str(lock_folder), part)}
    )
    (folder / "data" / "optout.txt").write_text("http://a.test/3.jpg\n")
    built = building(monkeypatch)

    result = rebuilt(lock_folder, folder, pictures)

    assert [one.missing for one in result.coverage] == [{"optout_list": 1}]
    assert built == [part_of_3]
    assert findings(result.path) == []


def building(monkeypatch):
    """The numbers of the parts that are built from now on."""
    built = []

    def counted(build, *rest, **options):
        built.append(build.part)
        return shard_build.fetch_into_shard(build, *rest, **options)

    monkeypatch.setattr(restore, "fetch_into_shard", counted)
    return built


def test_a_rebuild_resumes_where_it_stopped(lock_folder, pictures, tmp_path, monkeypatch):
    rebuilt(lock_folder, tmp_path / "again", pictures)
    shards = tmp_path / "again" / "data" / "shards" / "cc3m"
    (shards / "00002.json").unlink()
    built = building(monkeypatch)

    assert rebuilt(lock_folder, tmp_path / "again", pictures).is_same
    assert built == [2]


@pytest.mark.parametrize("file", ["00001.parquet", "00001.json", "00001.codes.json"])
def test_a_rebuild_killed_at_any_file_is_completed_by_the_next(
    lock_folder, pictures, tmp_path, monkeypatch, file
):
    times = Counter()

    def write(address, content):
        times[address.rpartition("/")[2]] += 1
        if address.endswith(f"cc3m/{file}") and "shards" in address:
            raise KeyboardInterrupt
        original_write(address, content)

    original_write = restore.write_whole
    monkeypatch.setattr(restore, "write_whole", write)
    monkeypatch.setattr(shard_build, "write_whole", write)
    with pytest.raises(KeyboardInterrupt):
        rebuilt(lock_folder, tmp_path / "again", pictures)
    monkeypatch.undo()

    assert rebuilt(lock_folder, tmp_path / "again", pictures).is_same


def test_a_part_without_its_failed_rows_is_not_done(lock_folder, pictures, tmp_path, monkeypatch):
    def killed(rows, fetched):
        if len(rows) > len(fetched):
            raise KeyboardInterrupt
        return complete(rows, fetched)

    complete = restore._complete
    monkeypatch.setattr(restore, "_complete", killed)
    with pytest.raises(KeyboardInterrupt):
        rebuilt(lock_folder, tmp_path / "again", pictures)
    monkeypatch.undo()

    assert rebuilt(lock_folder, tmp_path / "again", pictures).is_same


def test_a_dataset_that_is_rebuilt_where_it_lies_keeps_images_that_are_gone(
    original, pictures, tmp_path
):
    folder = Path(shutil.copytree(original.parents[1], tmp_path / "own"))
    lockfile = locked(folder / "manifests" / "cc3m.json", tmp_path / "locked")
    before = {path: path.read_bytes() for path in (folder / "data/shards").rglob("*.*")}
    for number in range(15):
        (pictures / f"{number}.jpg").unlink()

    result = rebuilt(tmp_path / "locked", folder, pictures)

    assert result.is_same
    assert result.manifest.digest == lockfile.manifest.digest
    assert {path: path.read_bytes() for path in (folder / "data/shards").rglob("*.*")} == before
    assert findings(result.path) == []


def folder_bytes(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_rebuild_does_not_replace_another_dataset(lock_folder, pictures, tmp_path):
    folder = tmp_path / "other"
    write_rows(folder / "raw", toy_rows(30))
    toy_build(toy_source_build(folder, toy_recipe(part_records=8), pictures=pictures))
    before = folder_bytes(folder)

    with pytest.raises(
        PmdError, match=r"cc3m/00000\.tar is of another dataset: give another --out"
    ):
        rebuilt(lock_folder, folder, pictures)

    assert folder_bytes(folder) == before


def test_a_rebuild_does_not_replace_other_codes_of_a_dataset(original, pictures, tmp_path):
    folder = Path(shutil.copytree(original.parents[1], tmp_path / "own"))
    manifest = str(folder / "manifests" / "cc3m.json")
    locked(manifest, tmp_path / "locked")
    code_manifest(CodesRequest(manifest, vocabulary=4, grid=1, runner="local", workers=1), QUIET)
    before = folder_bytes(folder)

    with pytest.raises(PmdError, match="is of another dataset"):
        rebuilt(tmp_path / "locked", folder, pictures)

    assert folder_bytes(folder) == before


@pytest.mark.parametrize("file", ["00002.tar", "00002.parquet"])
def test_a_damaged_shard_of_a_dataset_is_not_replaced(
    original, lock_folder, pictures, tmp_path, file
):
    folder = Path(shutil.copytree(original.parents[1], tmp_path / "own"))
    damaged = folder / "data" / "shards" / "cc3m" / file
    content = bytearray(damaged.read_bytes())
    content[600] ^= 1
    damaged.write_bytes(content)

    with pytest.raises(PmdError, match=r"00002\.tar was made by pmd build and is damaged"):
        rebuilt(lock_folder, folder, pictures)

    assert damaged.read_bytes() == content


def test_a_dataset_with_images_to_leave_out_needs_pmd_build(
    original, lock_folder, pictures, tmp_path
):
    folder = Path(shutil.copytree(original.parents[1], tmp_path / "own"))
    (folder / "data" / "optout.txt").write_text("http://a.test/3.jpg\n")
    before = folder_bytes(folder / "data" / "shards")

    with pytest.raises(PmdError, match="images that are to be left out: run pmd build"):
        rebuilt(lock_folder, folder, pictures)

    assert folder_bytes(folder / "data" / "shards") == before


def test_a_rebuild_continues_with_other_locations(lock_folder, pictures, tmp_path, monkeypatch):
    parts = {
        part.part: [row.id for row in locked_rows(str(lock_folder), part) if row.has_image]
        for part in load_lockfile(str(lock_folder)).parts
    }
    more = Path(shutil.copytree(pictures, tmp_path / "more"))
    for address in parts[2]:
        (pictures / address.rpartition("/")[2]).unlink()
    assert not rebuilt(lock_folder, tmp_path / "again", pictures).is_same
    built = building(monkeypatch)

    assert rebuilt(lock_folder, tmp_path / "again", more).is_same
    assert built == [2]


class DyingPool:
    """A pool whose worker dies of part 1."""

    workers = 1

    def run(self, function, tasks, watch):
        for task in tasks:
            if task.part.part == 1:
                yield task, WorkerDied(f"a worker process died 3 times of {task}")
            else:
                yield task, function(task, partial(watch, str(task)))


def test_a_part_whose_workers_die_is_missing(lock_folder, pictures, tmp_path):
    request = RebuildRequest(
        lockfile=str(lock_folder),
        out=str(tmp_path / "again" / "data"),
        manifests=str(tmp_path / "again" / "manifests"),
        images=(str(pictures),),
    )

    result = rebuild(request, DyingPool(), QUIET)

    assert not result.is_same
    assert result.manifest.missing == {"cc3m": [1]}
    assert "part 1 failed: run the same command again" in str(result.coverage[0])
    counts = result.manifest.sources["cc3m"].counts
    assert counts.unaccounted() == 0
    assert counts.failed["no_part"] == load_lockfile(str(lock_folder)).parts[1].counts.pairs_in
    assert findings(result.path) == []
    assert rebuilt(lock_folder, tmp_path / "again", pictures).is_same


def test_a_lock_file_is_the_same_for_any_number_of_workers_and_anywhere(original, tmp_path):
    shutil.copytree(original.parents[1], tmp_path / "moved")
    for path in (tmp_path / "moved" / "data").rglob("*.codes.json"):
        later = json.loads(path.read_text()) | {"timing": {"host": "another", "seconds": 9.0}}
        path.write_text(json.dumps(later))

    one = locked(original, tmp_path / "one")
    two = locked(tmp_path / "moved/manifests/cc3m.json", tmp_path / "two", workers=2)

    assert one == two
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 1 + 2 * len(one.parts)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_locking_again_reads_only_shards_without_current_rows(
    original, lock_folder, tmp_path, monkeypatch
):
    before = load_lockfile(str(lock_folder))
    read = []

    def samples(address, *rest):
        read.append(address[-9:])
        return lock_samples(address, *rest)

    lock_samples = locking._read_samples
    monkeypatch.setattr(locking, "_read_samples", samples)
    (lock_folder / LOCKFILE_NAME).unlink()
    (lock_folder / "cc3m" / "00001.parquet").unlink()
    (lock_folder / "cc3m" / "00002.parquet").write_bytes(b"PAR1 of somebody else")

    assert locked(original, lock_folder) == before
    assert read == ["00001.tar", "00002.tar"]
    assert locked(original, lock_folder, hashed=True).captions == "sha256"
    assert len(read) == 2 + len(before.parts)


def test_a_lock_file_may_lie_under_any_address(original, lock_folder, pictures, tmp_path):
    result = locked(original, "memory://locked/toy")

    assert load_lockfile("memory://locked/toy") == result
    assert rebuilt("memory://locked/toy", tmp_path / "again", pictures).is_same


def test_a_lock_file_has_no_image_and_with_hashes_no_caption(original, lock_folder, tmp_path):
    hashed = locked(original, tmp_path / "hashed", hashed=True)

    for folder in (lock_folder, tmp_path / "hashed"):
        assert not [path for path in folder.rglob("*.*") if b"\xff\xd8\xff" in path.read_bytes()]
    rows = locked_rows(str(tmp_path / "hashed"), hashed.parts[0])
    with_captions = locked_rows(str(lock_folder), load_lockfile(str(lock_folder)).parts[0])
    for row, other in zip(rows, with_captions, strict=True):
        assert "picture" not in str(replace(row, url="", id=""))
        assert row.caption == caption_sha256(other.caption)
        assert row.captions == (other.captions and [*map(caption_sha256, other.captions)])
    assert locked(original, tmp_path / "again", hashed=True).digest == hashed.digest


def test_a_lock_file_of_hashes_is_rebuilt_with_the_files_of_upstream(original, pictures, tmp_path):
    locked(original, tmp_path / "locked", hashed=True)
    raw = shutil.copytree(original.parents[1] / "raw", tmp_path / "raw")

    result = rebuilt(tmp_path / "locked", tmp_path / "again", pictures, raw=raw)

    assert result.is_same
    assert findings(result.path) == []
    with pytest.raises(PmdError, match=r"\(pmd lock --hash-captions\), or rebuild with --raw"):
        rebuilt(tmp_path / "locked", tmp_path / "none", pictures)
    with (raw / "GCC-training.tsv").open("a") as file:
        file.write("another caption\thttp://a.test/0.jpg\n")
    with pytest.raises(PmdError, match=r"the lock file was made with GCC-training\.tsv of sha256"):
        rebuilt(tmp_path / "locked", tmp_path / "other", pictures, raw=raw)


def test_locked_rows_have_the_columns_of_their_schema():
    assert LOCKED_SCHEMA.names == [field.name for field in fields(LockedRow)]


def test_the_manifest_of_shards_elsewhere_is_not_written_over(
    original, lock_folder, pictures, tmp_path
):
    folder = tmp_path / "again"
    (folder / "manifests").mkdir(parents=True)
    content = original.read_bytes().replace(
        b'"path": "..', f'"path": "{original.parents[1]}'.encode()
    )
    (folder / "manifests" / "cc3m.json").write_bytes(content)

    with pytest.raises(PmdError, match=r"cc3m\.json is the manifest of .*00000\.tar: give another"):
        rebuilt(lock_folder, folder, pictures)

    assert (folder / "manifests" / "cc3m.json").read_bytes() == content
    assert not (folder / "data").exists()
    (folder / "manifests" / "cc3m.json").unlink()
    rebuilt(lock_folder, folder, pictures)
    assert rebuilt(lock_folder, folder, pictures).is_same  # over its own


def test_an_index_with_other_captions_is_refused(original, pictures, tmp_path, monkeypatch):
    locked(original, tmp_path / "locked", hashed=True)
    monkeypatch.setattr(restore, "caption_sha256", lambda caption: caption_sha256(caption + "!"))

    with pytest.raises(PmdError, match="are not those that were locked"):
        rebuilt(tmp_path / "locked", tmp_path / "again", pictures, raw=original.parents[1] / "raw")


def test_another_version_of_a_library_is_reported(lock_folder, pictures, tmp_path, monkeypatch):
    versions = {**shard_build.versions(), "pillow": "0.1"}
    monkeypatch.setattr(shard_build, "versions", lambda _format: versions)

    result = rebuilt(lock_folder, tmp_path / "again", pictures)

    assert not result.is_same
    assert any(one.startswith("built with pillow 0.1 instead of ") for one in result.reasons())


def test_images_stored_with_other_bytes_are_counted_and_get_no_codes(
    lock_folder, pictures, tmp_path, monkeypatch
):
    encode = stored_image.encode_jpeg
    monkeypatch.setattr(
        stored_image, "encode_jpeg", lambda pixels, quality: encode(pixels, quality - 10)
    )

    result = rebuilt(lock_folder, tmp_path / "again", pictures)

    assert result.codes_lost
    assert "36 stored with other bytes" in str(result.coverage[0])
    assert any("pmd codes" in one for one in result.reasons())
    assert findings(result.path) == []


def test_a_damaged_shard_is_not_locked(original, tmp_path):
    shutil.copytree(original.parents[1], tmp_path / "copy")
    tar = tmp_path / "copy" / "data" / "shards" / "cc3m" / "00001.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)

    with pytest.raises(PmdError, match=r"00001\.tar is not the shard of the manifest"):
        locked(tmp_path / "copy" / "manifests" / "cc3m.json", tmp_path / "locked")
    assert not (tmp_path / "locked" / LOCKFILE_NAME).exists()


@pytest.mark.parametrize("name", ["cc3m/00003.parquet", "cc3m/00003.codes.safetensors"])
def test_a_damaged_lock_file_is_one_sentence(lock_folder, pictures, tmp_path, name):
    content = bytearray((lock_folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (lock_folder / name).write_bytes(content)

    with pytest.raises(PmdError, match=f"{name} has other bytes than it should"):
        rebuilt(lock_folder, tmp_path / "again", pictures)


def forge(lock_folder, change):
    """Change the content of `kit.json`, with a digest that fits."""
    content = json.loads((lock_folder / LOCKFILE_NAME).read_text())
    change(content)
    content["digest"] = LockFile.model_validate(content).computed_digest()
    (lock_folder / LOCKFILE_NAME).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["parts"].pop(), "has other parts than its manifest has shards"),
        (
            lambda content: content["parts"][0]["rows"].update(name="x"),
            "names files that no lock file has",
        ),
        (
            lambda content: content["manifest"].update(name="other"),
            "has a manifest whose digest is not",
        ),
        (
            lambda content: content["parts"][0]["counts"].update(kept=7),
            "order or counts is not what",
        ),
    ],
)
def test_a_forged_lock_file_is_one_sentence(lock_folder, pictures, tmp_path, change, words):
    forge(lock_folder, change)

    with pytest.raises(PmdError, match=words):
        rebuilt(lock_folder, tmp_path / "again", pictures)
    assert not (tmp_path / "again" / "data" / "shards").exists()


def test_a_changed_file_or_another_is_not_a_lock_file(lock_folder, pictures, tmp_path):
    content = (lock_folder / LOCKFILE_NAME).read_text()
    for other, words in (
        (content.replace('"part": 1', '"part": 9'), "was changed"),
        ("{}", "not a lock file"),
    ):
        (lock_folder / LOCKFILE_NAME).write_text(other)

        with pytest.raises(PmdError, match=words):
            rebuilt(lock_folder, tmp_path / "again", pictures)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key", "../../etc/passwd"),
        ("id", "another"),
        ("num_pairs", 0),
        ("captions", None),
        ("captions", ["one", "two", "three"]),
        ("captions", [None]),
        ("boxes", [[0.0, 0.0, 2.0, 1.0]]),
        ("sha256", "no"),
        ("stored_sha256", None),
        ("meta", "[1]"),
        ("meta", "[" * 100_000),
        ("reason", None),
    ],
)
def test_a_forged_row_is_one_sentence(lock_folder, pictures, tmp_path, name, value):
    part = load_lockfile(str(lock_folder)).parts[0]
    rows = locked_rows(str(lock_folder), part)
    has_image = name != "reason"
    number = next(number for number, row in enumerate(rows) if row.has_image == has_image)
    rows[number] = replace(rows[number], **{name: value})
    forged = FileDigest.of(part.rows.name, rows_bytes(rows, ""))
    (lock_folder / "cc3m" / part.rows.name).write_bytes(rows_bytes(rows, ""))
    forge(lock_folder, lambda content: content["parts"][0].update(rows=forged.model_dump()))

    with pytest.raises(PmdError, match="is not what pmd lock writes"):
        rebuilt(lock_folder, tmp_path / "again", pictures)


@pytest.mark.parametrize("folder", ["data/shards", "link", "raw/../data/shards/"])
def test_a_lock_file_is_not_written_over_its_dataset(original, tmp_path, folder):
    copy = Path(shutil.copytree(original.parents[1], tmp_path / "copy"))
    (copy / "link").symlink_to(copy / "data" / "shards")
    before = folder_bytes(copy / "data")

    with pytest.raises(PmdError, match=r"--out .* is where the dataset itself lies: give"):
        locked(copy / "manifests" / "cc3m.json", f"{copy}/{folder}")

    assert folder_bytes(copy / "data") == before


def test_texts_have_no_lock_file(original, tmp_path):
    shutil.copytree(original.parents[1] / "manifests", tmp_path / "manifests")
    path = tmp_path / "manifests" / "cc3m.json"
    texts = load_manifest(str(path)).model_copy(update={"kind": "text"})
    path.write_text(texts.model_copy(update={"digest": texts.computed_digest()}).model_dump_json())

    with pytest.raises(PmdError, match="holds texts"):
        locked(path, tmp_path / "locked")


def test_the_commands_lock_and_rebuild(original, pictures, tmp_path, monkeypatch, capsys):
    def pmd(*arguments):
        monkeypatch.setattr(sys, "argv", ["pmd", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    where = ["--images", pictures, "--runner", "local", "--workers", 1, "--quiet"]
    code, printed = pmd("lock", original, "--out", "kit", "--workers", 1)
    same, rebuilt_output = pmd("rebuild", "kit", *where)
    (pictures / "7.jpg").unlink()
    other, lacks = pmd("rebuild", "kit", "--out", "b", "--manifests", "b", *where, "--json")
    none, refused = pmd("rebuild", "nowhere", *where)

    digest = load_manifest(str(original)).digest
    assert (code, printed.out.split()[0]) == (0, "kit")
    assert (same, rebuilt_output.out.splitlines()[-1]) == (0, f"manifests/cc3m.json  {digest}")
    assert rebuilt_output.err == "the same dataset: the digest is that of the lock file\n"
    facts = json.loads(lacks.out)
    assert (other, facts["expected"], facts["same"]) == (1, digest, False)
    assert facts["coverage"][0]["missing"] == {"not_in_archive": 1}
    assert "images missing: 1; b/cc3m.missing.jsonl lists them" in lacks.err
    assert (none, refused.err.count("\n")) == (2, 1)
