"""Exported shards can be read by other loaders."""

import gc
import hashlib
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
from handmade_shards import HandmadeRecord, tiles, write_manifest, write_shard
from toy import QUIET

from pmd_pipeline.base.overwrite import refuse_overwrite
from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.codes.tensors import code_tensors
from pmd_pipeline.codes.tokenize import CodesRequest, code_manifest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.image_format import JPEG, WEBP
from pmd_pipeline.contract.manifest import load_manifest, save_manifest
from pmd_pipeline.contract.models import ShardEntry
from pmd_pipeline.publish.codes_export import export


def records(part):
    random = np.random.default_rng(part)
    for number in range(12):
        boxes = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)] if number % 3 == 1 else None
        image = tiles(random.integers(0, 256, (4, 4, 3))) if number % 5 else None
        yield HandmadeRecord(f"{part * 100 + number:016x}", image, ("one", "two"), boxes)


@pytest.fixture(params=[JPEG, WEBP], ids=lambda stored: stored.name)
def manifest(tmp_path, request):
    """The path of a manifest of two shards with codes by k-means."""
    folder, stored = tmp_path / "data" / "toy", request.param
    shards = [write_shard(folder, "toy", part, list(records(part)), stored) for part in (0, 1)]
    path = write_manifest(tmp_path / "hand.json", shards)
    code_manifest(
        CodesRequest(path, vocabulary=16, grid=2, views=2, runner="local", workers=1), QUIET
    )
    return path


def exported(manifest, out):
    with open_pool("local", 1, None) as pool:
        return {task.out: sha256 for task, sha256 in export(manifest, str(out), pool, QUIET)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_codes_of_the_shards(manifest, tmp_path):
    written = exported(manifest, tmp_path / "out")

    assert list(written) == [str(tmp_path / "out" / "toy" / f"0000{part}.tar") for part in (0, 1)]
    for shard, path in zip(load_manifest(manifest).shards, written, strict=True):
        codes = code_tensors(Path(shard.path).with_suffix(".codes.safetensors").read_bytes())
        samples = list(webdataset.WebDataset(path, shardshuffle=False).decode())
        assert len(samples) == shard.images
        for number, sample in enumerate(samples):
            own = slice(codes["first"][number], codes["first"][number + 1])
            np.testing.assert_array_equal(sample["codes.npy"], codes["codes"][own])
            np.testing.assert_array_equal(sample["boxes.npy"], codes["boxes"][own])
            assert sample["codes.npy"].dtype == np.uint16
    gc.collect()  # webdataset leaves its files to the collector, whose warnings are not ours


def test_all_other_members_are_unchanged(manifest, tmp_path):
    for shard, path in zip(
        load_manifest(manifest).shards, exported(manifest, tmp_path / "out"), strict=True
    ):
        with tarfile.open(shard.path) as before, tarfile.open(path) as after:
            for member in before.getmembers():
                assert after.extractfile(member.name).read() == before.extractfile(member).read()
            names = after.getnames()
        assert names == sorted(names)
        assert len(names) == 5 * shard.images


def test_an_export_has_the_same_bytes_each_time(manifest, tmp_path):
    first, second = (exported(manifest, tmp_path / name) for name in ("a", "b"))

    assert list(first.values()) == list(second.values())


def refused(manifest, out, *words):
    with pytest.raises(PmdError) as caught:
        exported(manifest, out)
    for word in words:
        assert word in str(caught.value)
    assert not list(out.rglob("*"))


def test_a_manifest_without_codes_is_refused(tmp_path):
    shard = write_shard(tmp_path / "toy", "toy", 0, list(records(0)))
    path = write_manifest(tmp_path / "bare.json", [shard])

    refused(path, tmp_path / "out", f"run `pmd codes {path}` first")


def rewritten(path, change):
    """The manifest with its first shard changed, and its digest made to fit."""
    manifest = load_manifest(path)
    first = ShardEntry.model_validate(manifest.shards[0].model_dump() | change)
    manifest = manifest.model_copy(update={"shards": [first, *manifest.shards[1:]]})
    save_manifest(path, manifest.model_copy(update={"digest": manifest.computed_digest()}))


def test_changed_codes_are_refused(manifest, tmp_path):
    codes = tmp_path / "data" / "toy" / "00000.codes.safetensors"
    codes.write_bytes(codes.read_bytes()[:-1] + b"\xff")

    with pytest.raises(
        PmdError, match=r"00000\.codes\.safetensors is not the file of codes in the manifest"
    ):
        exported(manifest, tmp_path / "out")


def test_a_source_that_is_a_path_is_refused(manifest, tmp_path):
    content = Path(manifest).read_text(encoding="utf-8").replace('"toy"', '"../../evil"')
    Path(manifest).write_text(content, encoding="utf-8")

    refused(manifest, tmp_path / "out", "is no name of a file")


@pytest.mark.parametrize(
    "name", ["../../evil.jpg", "evil", "{key}.sh", "{key}.tar/../x.jpg", "00000000000000ff.jpg"]
)
def test_a_tar_with_strange_members_is_refused(manifest, tmp_path, name):
    key = f"{1:016x}"
    path = Path(load_manifest(manifest).shards[0].path)
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(name.format(key=key)))
    path.write_bytes(out.getvalue())
    rewritten(manifest, {"sha256": hashlib.sha256(out.getvalue()).hexdigest()})

    with pytest.raises(PmdError, match="is not a shard of `pmd build`"):
        exported(manifest, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))


@pytest.mark.parametrize("out", ["data", "data/../data/"])
def test_an_export_over_its_own_shards_is_refused(manifest, tmp_path, out):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    with pytest.raises(PmdError, match="is where the dataset itself lies: give another folder"):
        exported(manifest, f"{tmp_path}/{out}")

    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_an_export_over_what_a_link_in_the_dataset_stands_for_is_refused(manifest, tmp_path):
    (tmp_path / "links").mkdir()
    for file in (tmp_path / "data" / "toy").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    loaded = load_manifest(manifest)
    shards = [
        one.model_copy(update={"path": f"links/{Path(one.path).name}"}) for one in loaded.shards
    ]
    linked = loaded.model_copy(update={"shards": shards})
    save_manifest(manifest, linked.model_copy(update={"digest": linked.computed_digest()}))

    with pytest.raises(PmdError, match="is where the dataset itself lies: give another folder"):
        exported(manifest, tmp_path / "data")
    assert len(exported(manifest, tmp_path / "out")) == len(shards)


def test_addresses_elsewhere_are_compared_as_they_are():
    shards = ["memory://data/toy/00000.tar"]
    refuse_overwrite("memory://out", shards, ["memory://out/toy/00000.tar"])

    with pytest.raises(PmdError, match="--out memory://data is where"):
        refuse_overwrite("memory://data", shards, ["memory://data/toy/00000.tar"])
