"""A full disk or a folder without write access: one error line, no partial files, and resuming."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from toy import toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows

from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.contract.models import Report

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for a part or two, which a test can enlarge."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def command(folder: Path, out: Path, runner: str) -> list[str]:
    recipe = folder / "toy.toml"
    recipe.write_text('source = "cc3m"\npart_records = 25\n')
    return [
        *(sys.executable, "-m", "pmd_pipeline.cli", "build", "--recipe", str(recipe)),
        *("--raw", str(folder / "raw"), "--images", str(folder / "pictures")),
        *("--out", str(out), "--manifests", str(folder / "manifests")),
        *("--runner", runner, "--workers", "2", "--quiet"),
    ]


def is_whole(path: Path) -> bool:
    report = Report.model_validate_json(path.read_bytes())
    tar = path.with_suffix(".tar").read_bytes()
    return hashlib.sha256(tar).hexdigest() == report.tar.sha256


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_a_full_disk_is_one_error_line_and_the_build_resumes_with_more_room(
    small_disk, tmp_path, runner
):
    write_rows(tmp_path / "raw", toy_rows(200))
    pictures = write_pictures(tmp_path / "pictures", [f"{n}.jpg" for n in range(200)], side=200)
    other = toy_source_build(tmp_path / "other", toy_recipe(part_records=25), pictures=pictures)
    write_rows(tmp_path / "other" / "raw", toy_rows(200))
    undisturbed = toy_build(other)

    full = subprocess.run(
        command(tmp_path, small_disk, runner), check=False, capture_output=True, text=True
    )
    reports = list(small_disk.rglob("0*.json"))
    are_whole = [is_whole(path) for path in reports]
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    resumed = subprocess.run(
        command(tmp_path, small_disk, runner), check=False, capture_output=True, text=True
    )

    assert full.returncode == 2
    assert full.stderr.count("\n") == 1
    assert "cannot write" in full.stderr
    assert "No space left on device" in full.stderr
    assert all(are_whole)
    assert resumed.returncode == 0, resumed.stderr
    manifest = load_manifest(str(tmp_path / "manifests" / "cc3m.json"))
    assert manifest.digest == undisturbed.digest


def test_a_folder_that_cannot_be_written_is_one_error_line(tmp_path):
    write_rows(tmp_path / "raw", toy_rows(60))
    write_pictures(tmp_path / "pictures", [f"{n}.jpg" for n in range(60)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index").write_text("a file where a folder is expected")

    refused = subprocess.run(
        command(tmp_path, tmp_path / "out", "local"), check=False, capture_output=True, text=True
    )

    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert str(tmp_path / "out" / "index") in refused.stderr
