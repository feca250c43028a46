"""A source and filters of the user's own, in a folder of theirs, through the real commands."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from pmd_pipeline.cli import app
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.dataset.estimate import _population
from pmd_pipeline.recipe import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "sources" / "your_own.md"

SOURCE, FILTERS, RECIPE = re.findall(
    r"^```(?:python|toml)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
"""The files of the page, so that what it shows is what runs."""

COLOURS = ("red", "blue", "grey")
COUNT = 60

BUILD = ("build", "--recipe", "mine.toml", "--images", "pictures", "--raw", "raw")


def pmd(folder, *words):
    """Run `pmd` as a user does, in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "pmd_pipeline.cli", *words],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def build(folder, *words):
    """The manifest of a build that must succeed."""
    done = pmd(folder, *BUILD, "--runner", "local", *words)
    assert done.returncode == 0, done.stderr
    return load_manifest(str(folder / "manifests" / "garden.json"))


def write_folder(folder):
    """A folder with the user's modules, recipe, CSV and pictures; bird 7 has lost its picture."""
    (folder / "my_birds.py").write_text(SOURCE, encoding="utf-8")
    (folder / "my_filters.py").write_text(FILTERS, encoding="utf-8")
    (folder / "mine.toml").write_text(RECIPE, encoding="utf-8")
    (folder / "raw").mkdir()
    (folder / "pictures").mkdir()
    rows = ["id,file,caption", "x,,nothing"]
    for number in range(COUNT):
        colour = COLOURS[number % 3]
        rows.append(f"{number},{number}.png,{colour} one on a branch")
        size = (20, 50) if number % 10 == 1 else (60, 40)
        if number != 7:
            Image.new("RGB", size, (number, 40, 40)).save(folder / "pictures" / f"{number}.png")
    (folder / "raw" / "birds.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("garden"))
    return folder, build(folder, "--workers", "1")


def test_every_pair_is_kept_or_counted_under_the_filter_that_dropped_it(built):
    _, manifest = built
    counts = manifest.sources["garden"].counts

    tall = [n for n in range(COUNT) if n % 10 == 1 and n % 3 != 2]
    pale = [n for n in range(30) if n % 3 != 2 and n not in {7, *tall}]
    assert counts.pairs_in == COUNT + 1
    assert counts.dropped == {
        "bad_row": 1,
        "my_filters:names_colour": COUNT // 3,
        "my_filters:is_wide": len(tall),
        "my_filters:is_reddish": len(pale),
    }
    assert counts.failed == {"not_in_archive": 1}
    assert counts.unaccounted() == 0
    assert len(manifest.shards) > 2


def test_the_rules_state_the_digest_of_each_file_of_the_users(built):
    rules = built[1].sources["garden"].rules
    filters = hashlib.sha256(FILTERS.encode()).hexdigest()

    assert rules["module_sha256"] == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert rules["captions"]["filters_sha256"] == {"my_filters:names_colour": filters}
    assert rules["images"]["filters_sha256"] == {
        "my_filters:is_wide": filters,
        "my_filters:is_reddish": filters,
    }


def test_workers_in_other_processes_find_the_users_modules(built, tmp_path):
    manifest = build(write_folder(tmp_path), "--workers", "2")

    assert manifest.digest == built[1].digest


@pytest.mark.slow
def test_workers_of_ray_find_the_users_modules(built, tmp_path):
    write_folder(tmp_path)

    done = pmd(tmp_path, *BUILD, "--runner", "ray", "--workers", "2")

    assert done.returncode == 0, done.stderr
    made = load_manifest(str(tmp_path / "manifests" / "garden.json"))
    assert made.digest == built[1].digest


def test_the_other_commands_work_on_it(built):
    folder, manifest = built
    name = "manifests/garden.json"

    verify = pmd(folder, "verify", name)
    stats = pmd(folder, "stats", name, "--format", "json")
    sources = pmd(folder, "sources", "mine.toml")

    assert verify.returncode == 0, verify.stderr
    [row] = json.loads(stats.stdout)["datasets"]
    assert row["pairs"] == manifest.sources["garden"].counts.kept
    assert row["dropped_by"]["my_filters:names_colour"] == COUNT // 3
    assert row["paper_pairs"] is None
    assert sources.stdout.startswith("garden, Birds of our garden")
    assert "not in PMD" in sources.stdout
    assert pmd(folder, "report", name, "--out", "page.html").returncode == 0
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert "my_filters:is_wide" in page


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ("30", ["kept: 1 pair", "my_filters:names_colour passes"]),
        ("2", ["dropped by the index: my_filters:names_colour", "names_colour refuses"]),
        ("1", ["fetched, but dropped by the recipe: my_filters:is_wide"]),
        ("0", ["fetched, but dropped by the recipe: my_filters:is_reddish"]),
    ],
    ids=[
        "kept",
        "dropped by a filter of captions",
        "dropped by a filter of sizes",
        "dropped by a filter of pixels",
    ],
)
def test_why_explains_a_record(built, record, parts):
    done = pmd(built[0], "why", record)

    assert done.returncode == 0, done.stderr
    for part in parts:
        assert part in done.stdout


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the user's files as the working directory of this process."""
    monkeypatch.chdir(write_folder(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_birds", "my_filters"):
        sys.modules.pop(name, None)


def build_here():
    """The manifest of a build in this process and its working directory."""
    done = CliRunner().invoke(app, [*BUILD, "--runner", "local", "--workers", "1", "--quiet"])
    assert done.exit_code == 0, done.exception
    return load_manifest("manifests/garden.json")


def times(folder, pattern):
    """When each file that fits `pattern` was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def test_a_changed_filter_makes_its_parts_stale(folder):
    before, written = build_here(), times(folder, "data/**/[0-9i]*.json")
    assert build_here().digest == before.digest
    assert times(folder, "data/**/[0-9i]*.json") == written

    changed = FILTERS.replace("colour in caption", "'on' in caption")
    (folder / "my_filters.py").write_text(changed, encoding="utf-8")
    after = build_here()

    assert "my_filters:names_colour" not in after.sources["garden"].counts.dropped
    assert after.sources["garden"].rules_sha256 != before.sources["garden"].rules_sha256
    assert not times(folder, "data/**/[0-9i]*.json").items() & written.items()


def test_a_changed_filter_of_sizes_leaves_the_index_alone(folder):
    text = RECIPE.replace(
        '"my_filters:names_colour"]\ncolours = ["red", "blue"]', "has_words]\nmost = 9"
    )
    text = text.replace("[captions.filters.has_words]\nleast = 3\n", "")
    (folder / "mine.toml").write_text(text, encoding="utf-8")
    build_here()
    index, shards = times(folder, "data/index/*/index.json"), times(folder, "data/shards/**/*.json")

    (folder / "my_filters.py").write_text(FILTERS + "# another\n", encoding="utf-8")
    build_here()

    assert times(folder, "data/index/*/index.json") == index
    assert not times(folder, "data/shards/**/*.json").items() & shards.items()


def test_a_lock_file_of_it_rebuilds_the_same_dataset(folder):
    digest = build_here().digest
    places = ["--images", "pictures", "--runner", "local", "--workers", "1", "--quiet"]

    for words in (
        ["lock", "manifests/garden.json", "--out", "locked"],
        ["rebuild", "locked", "--out", "again", "--manifests", "again", *places],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.exception

    assert load_manifest("again/garden.json").digest == digest


def test_an_estimate_without_a_number_of_records_says_what_to_do(folder):
    [recipe] = load_recipe("mine.toml")

    with pytest.raises(PmdError, match="garden: its number of records is unknown"):
        _population(recipe, str(folder / "data"))


def test_why_goes_on_where_the_users_module_is_gone(folder):
    build_here()
    (folder / "my_birds.py").unlink()
    del sys.modules["my_birds"]

    done = CliRunner().invoke(app, ["why", "30"])

    assert "kept: 1 pair" in done.stdout
    assert "there is no module 'my_birds'" in done.stdout


def test_a_digest_that_a_recipe_states_is_held(folder):
    stated = RECIPE.replace("part_records", f'module_sha256 = "{"0" * 64}"\npart_records')
    (folder / "mine.toml").write_text(stated, encoding="utf-8")

    done = CliRunner().invoke(app, [*BUILD, "--runner", "local"])

    assert "mine.toml: my_birds: its file has another SHA-256 than 0000000000000000" in str(
        done.exception
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("my_birds.py", "import csv", "import csvv", "importing my_birds fails: No module"),
        ("my_birds.py", "INFO = Info(", "ABOUT = Info(", "my_birds: it defines no INFO"),
        ("my_birds.py", "def read(", "def rows(", "my_birds: it defines no function read"),
        ("my_birds.py", '(id=fields["id"]', '(id=int(fields["id"])', "my_birds:read: Row(id=0"),
        (
            "my_birds.py",
            '["caption"]',
            '["text"]',
            "my_birds:read on raw/birds.csv fails: KeyError",
        ),
        ("my_filters.py", "is_wide", "is_wde", "did you mean 'is_wde'?"),
        ("my_filters.py", ": float = 1.0", "=1.0", "its argument 'least' needs a type"),
        ("my_filters.py", "split()", "spilt()", "names_colour fails: AttributeError: 'str' object"),
        (
            "my_filters.py",
            "size[0]",
            "size[2]",
            "is_wide fails: IndexError: tuple index out of range",
        ),
        ("my_filters.py", "[..., 0]", "[..., 5]", "is_reddish fails: IndexError"),
        ("mine.toml", '"my_birds"', '"my_brids"', "my_brids: there is no module 'my_brids' in"),
        ("mine.toml", '"garden"', '"coco"', "the package has its own coco; name yours otherwise"),
        ("mine.toml", "= 0.5", '= "0.5"', 'least = "0.5": input should be a valid number'),
    ],
)
def test_a_mistake_in_the_users_code_is_one_sentence(folder, file, old, new, sentence):
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")

    done = CliRunner().invoke(app, [*BUILD, "--runner", "local", "--workers", "1", "--quiet"])

    assert isinstance(done.exception, PmdError)  # `main` prints it and exits with 2
    assert sentence in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_failing_filter_is_named_with_its_line_by_workers_in_other_processes(tmp_path):
    write_folder(tmp_path)
    broken = FILTERS.replace("size[0]", "size[2]")
    (tmp_path / "my_filters.py").write_text(broken, encoding="utf-8")

    done = pmd(tmp_path, *BUILD, "--runner", "local", "--workers", "2", "--quiet")

    assert done.returncode == 2
    line = broken[: broken.index("size[2]")].count("\n") + 1
    assert done.stderr == (
        "pmd: my_filters:is_wide fails: IndexError: tuple index out of range "
        f"(my_filters.py, line {line})\n"
    )
