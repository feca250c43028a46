"""A dataset read through `datasets`, from a folder: whole, once, and gone on with."""

import json
import sys

import pytest
from corpora import article, write_vocabulary
from toy import QUIET

from pmd_pipeline.base.parallel import ignore_progress
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.dataset.build import BuildRequest, build_all
from pmd_pipeline.recipe import load_recipe
from pmd_pipeline.text import hub


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    rows = [{"title": "t", "text": article(n) if n != 3 else None} for n in range(25)]
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return load_recipe("ccnews", {"texts": {"dataset": str(folder)}})[0]


def changed(recipe, **texts):
    return recipe.model_copy(update={"texts": recipe.texts.model_copy(update=texts)})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_dataset_is_built_like_files(tmp_path, recipe):
    vocabulary = write_vocabulary(tmp_path / "vocab.txt")
    requests = [
        BuildRequest(
            recipes=("ccnews",),
            out=str(tmp_path / name),
            manifests=str(tmp_path / name / "manifests"),
            raw=raw,
            changes={"texts": {"tokenizer": vocabulary, "dataset": dataset}},
            runner="local",
            workers=1,
        )
        for name, raw, dataset in (
            ("a", None, recipe.texts.dataset),
            ("b", recipe.texts.dataset, ""),
        )
    ]

    through, local = (build_all(request, QUIET).manifests[0][1] for request in requests)

    counts = through.sources["ccnews"].counts
    assert (counts.kept, counts.dropped) == (24, {"bad_row": 1})
    assert [one.sha256 for one in through.shards] == [one.sha256 for one in local.shards]
    with pytest.raises(PmdError, match="exclude each other"):
        build_all(requests[0].__class__(**{**vars(requests[0]), "raw": str(tmp_path)}), QUIET)


@pytest.mark.parametrize("cut", range(7))
def test_an_interrupted_reading_goes_on_and_all_files_appear_together(
    tmp_path, recipe, monkeypatch, cut
):
    monkeypatch.setattr(hub, "FILE_ROWS", 10)
    monkeypatch.setattr(hub, "_GROUP_ROWS", 4)
    whole, folder = tmp_path / "whole", tmp_path / "again"
    hub.save_dataset(recipe, str(whole), ignore_progress)
    steps = []

    def stop_at_cut(*_):
        steps.append(1)
        if len(steps) == cut:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        replace = type(folder).replace
        patch.setattr(type(folder), "replace", lambda *a: (stop_at_cut(), replace(*a))[1])
        with pytest.raises(KeyboardInterrupt) if 0 < cut < 7 else pytest.MonkeyPatch.context():
            hub.save_dataset(recipe, str(folder), ignore_progress)
    assert cut == 0 or not (folder / "00000.parquet").exists()

    hub.save_dataset(recipe, str(folder), ignore_progress)

    assert files(folder) == files(whole)
    assert sorted(files(whole)) == ["00000.parquet", "00001.parquet", "00002.parquet"]


def test_a_dataset_of_the_hub_needs_its_commit(recipe):
    named = changed(recipe, dataset="nobody/news", revision="main")
    pinned = changed(named, revision="0" * 40)

    with pytest.raises(PmdError, match=r"texts\.revision"):
        hub.dataset_folder(named, "raw")
    assert hub.dataset_folder(pinned, "raw").startswith("raw/dataset-")
    assert hub.dataset_folder(pinned, "raw") != hub.dataset_folder(recipe, "raw")
    assert hub.dataset_folder(changed(recipe, dataset=""), "raw") == "raw"


def test_mistakes_are_one_sentence(tmp_path, recipe, monkeypatch):
    other = recipe.model_copy(update={"options": {**recipe.options, "column": "body"}})

    with pytest.raises(PmdError, match="no column 'body', only title, text"):
        hub.save_dataset(other, str(tmp_path / "a"), ignore_progress)
    with pytest.raises(PmdError, match=r"cannot read the dataset .*Bad split: test"):
        hub.save_dataset(changed(recipe, split="test"), str(tmp_path / "b"), ignore_progress)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PmdError, match="pip install datasets"):
        hub.save_dataset(recipe, str(tmp_path / "c"), ignore_progress)
