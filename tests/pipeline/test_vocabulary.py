"""Texts of a manifest, once and in order; a damaged shard is named."""

import shutil
from pathlib import Path

import pytest
from toy import toy_build, toy_recipe, toy_rows, toy_source_build, write_pictures, write_rows
from typer.testing import CliRunner

from pmd_pipeline.base.parallel import ignore_progress
from pmd_pipeline.cli import app
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.text.vocabulary import learn_vocabulary, texts
from pmd_pipeline.text.wordpiece import load_vocabulary


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_rows(folder / "raw", toy_rows(30))
    pictures = write_pictures(folder / "pictures", [f"{n}.jpg" for n in range(30) if n != 7])
    source_build = toy_source_build(folder, toy_recipe(part_records=10), pictures=pictures)
    toy_build(source_build)
    return source_build


def test_every_kept_caption_comes_once(built):
    manifest = load_manifest(built.manifest)

    captions = list(texts(built.manifest, manifest))

    assert sorted(captions) == sorted(
        text for text, url in toy_rows(30) if not url.endswith("/7.jpg")
    )
    assert captions == list(texts(built.manifest, manifest))
    assert len(manifest.shards) > 1


def test_the_command_prints_the_digest_of_what_it_wrote(built, tmp_path):
    out = tmp_path / "vocab.txt"

    result = CliRunner().invoke(
        app, ["tokenizer", built.manifest, "--size", "120", "--out", str(out)]
    )

    vocabulary = load_vocabulary(str(out))
    assert f"{out}  {vocabulary.sha256}" in result.output
    assert "picture" in vocabulary.tokens
    assert learn_vocabulary(built.manifest, 120, ignore_progress) == (vocabulary, 0)


def test_a_manifest_of_images_has_nothing_to_learn_from(built):
    manifest = load_manifest(built.manifest).model_copy(update={"kind": "images"})

    with pytest.raises(PmdError, match="images without texts"):
        list(texts(built.manifest, manifest))


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_a_damaged_shard_is_named(built, tmp_path, ending):
    root = Path(built.manifest).parents[1]
    shutil.copytree(root, tmp_path / "copy")
    manifest = str(tmp_path / "copy" / "manifests" / "cc3m.json")
    damaged = tmp_path / "copy" / "data" / "shards" / "cc3m" / f"00001.{ending}"
    damaged.write_bytes(b"x" * damaged.stat().st_size)

    with pytest.raises(PmdError, match=r"00001\.tar or its ledger is damaged"):
        list(texts(manifest, load_manifest(manifest)))
