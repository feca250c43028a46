"""The command `flava-train`: manifests, models, errors."""

import subprocess
import sys

import pytest

from flava_train.data.manifests import check_manifest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.contract.models import Manifest, ShardEntry


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "flava_train.cli", *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def manifest(tmp_path):
    """A manifest of one shard, and its files."""
    (tmp_path / "00000.tar").write_bytes(b"tar")
    (tmp_path / "00000.parquet").write_bytes(b"ledger")
    shard = ShardEntry(
        source="coco",
        part=0,
        path="00000.tar",
        sha256="0" * 64,
        num_bytes=3,
        ledger_sha256="0" * 64,
        records=5,
        images=4,
        pairs=20,
    )
    return write(
        tmp_path / "toy.json", Manifest(name="toy", sources={}, shards=[shard], versions={})
    )


def write(path, manifest):
    sealed = manifest.model_copy(update={"digest": manifest.computed_digest()})
    path.write_text(sealed.model_dump_json())
    return path


def test_a_complete_manifest_is_summed_by_source(manifest):
    loaded, sources = check_manifest(manifest)

    assert [(one.source, one.pairs, one.images, one.shards) for one in sources] == [
        ("coco", 20, 4, 1)
    ]
    printed = run("shards", "--shards", manifest)
    assert printed.returncode == 0
    assert loaded.digest in printed.stdout
    assert "20 pairs" in printed.stdout


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path.parent / "00000.tar").write_bytes(b"ta"), "00000.tar is not the shard"),
        (lambda path: (path.parent / "00000.parquet").unlink(), "has no ledger"),
        (lambda path: path.write_text(path.read_text().replace("20", "21")), "was changed"),
        (lambda path: path.write_text("{}"), "no manifest of this version"),
        (lambda path: path.unlink(), "cannot read"),
    ],
)
def test_a_missing_or_changed_file_is_one_sentence(manifest, damage, message):
    damage(manifest)

    with pytest.raises(PmdError, match=message):
        check_manifest(manifest)


def test_a_manifest_with_missing_parts_is_refused(manifest):
    loaded = load_manifest(manifest)

    write(manifest, loaded.model_copy(update={"missing": {"coco": [3, 4]}}))

    with pytest.raises(PmdError, match="lacks 2 parts of coco"):
        check_manifest(manifest)


def test_the_model_of_the_paper_has_302_million_parameters():
    printed = run("model")

    assert printed.returncode == 0
    assert printed.stdout.splitlines()[-1].split() == ["parameters", "302,087,287"]


def test_a_wrong_argument_is_one_line_and_exit_2(tmp_path):
    refused = run("model", tmp_path / "nothing")

    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1


def test_help_loads_no_torch():
    code = "import sys, flava_train.cli; print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout.strip() == "False"
    assert "Example: flava-train shards" in run("shards", "--help").stdout
