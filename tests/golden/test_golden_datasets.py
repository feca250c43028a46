"""The sample world gives the datasets that it gave before: counts, rows, digests, every file."""

import hashlib
import json
import re

import pyarrow.parquet as pq
import pytest
from golden_commands import run_well
from golden_files import byte_environment, differences

CONTENT = {
    # columns that no codec, and no version of a library, has a say in
    "kept": ("key", "id", "url", "file", "licence", "meta", "captions", "fields", "boxes", "rows"),
    "dropped": ("key", "id", "url", "field", "text", "reason", "row"),
    "ledger": ("key", "id", "url", "caption", "num_pairs", "status", "reason"),
    "text": ("text", "keys"),
}

STATED = (
    *("counts", "images", "unique_images", "words", "tokens", "licence", "citation"),
    *("rules_sha256", "limit", "optout"),
)
"""What a manifest says of a source, without digests of upstream files, which pyarrow writes."""

NOT_PINNED = re.compile(
    r"world/|cache/|exported/\..*|pmd\.toml|texts\.toml"  # what these tests put there themselves
    r"|manifests/.*\.json"  # pinned by their digest, which says the same
    r"|bundle/(wheel/|requirements\.txt|SHA256SUMS|configs/|kit/)"  # our code, or copies
)

PAGES = re.compile(r"report\.html|bundle/(README\.md|DATA_CARD\.md|croissant\.json)")
"""Files of words that people read, which may be put differently while the data stay the same."""


def test_the_sample_world_gives_the_recorded_rows_and_manifests(built, golden):
    here = byte_environment()
    content = {"environment": here, "digests": built.digests, "sources": sources(built.folder)}

    recorded = golden.values("datasets", content)

    assert content["sources"] == recorded["sources"]
    assert content["digests"].keys() == recorded["digests"].keys()
    if reason := differences(recorded["environment"], here):
        pytest.skip(reason)
    assert content["digests"] == recorded["digests"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["files", "pages"])
def test_every_file_is_the_recorded_one(coded, golden, name):
    here = byte_environment()
    found = {
        path: digest(coded.folder, path)
        for path in paths(coded.folder)
        if bool(PAGES.match(path)) == (name == "pages")
    }

    recorded = golden.values(name, {"environment": here, "files": found})

    assert found.keys() == recorded["files"].keys()
    if reason := differences(recorded["environment"], here):
        pytest.skip(reason)
    assert found == recorded["files"]


@pytest.mark.slow
def test_manifests_with_codes_have_the_recorded_digests(coded, golden):
    here = byte_environment()
    found = {
        name: json.loads((coded.folder / "manifests" / f"{name}.json").read_bytes())["digest"]
        for name in ("pmd", "imagenet1k")
    }

    recorded = golden.values("coded", {"environment": here, "digests": found})

    if reason := differences(recorded["environment"], here):
        pytest.skip(reason)
    assert found == recorded["digests"]


@pytest.mark.slow
def test_statistics_are_the_recorded_ones(coded, golden):
    words = ("stats", "manifests/pmd.json", "--format", "json")

    printed = run_well("pmd", *words, cwd=coded.folder)

    assert printed == golden.text("stats", printed)


def sources(folder):
    """What manifests and Parquet files say of each source, as far as no library shapes it."""
    found = {}
    for path in sorted((folder / "manifests").glob("*.json")):
        for source, entry in json.loads(path.read_bytes())["sources"].items():
            stated = {name: entry[name] for name in STATED}
            found[source] = stated | {"rows": rows(folder, source)}
    return found


def rows(folder, source):
    """Number and digest of the rows of every Parquet file of a source."""
    index, shards = folder / "data" / "index" / source, folder / "data" / "shards" / source
    found = {}
    for path in sorted([*index.glob("*.parquet"), *shards.glob("*.parquet")]):
        with pq.ParquetFile(path) as file:
            table = file.read()
        is_text = "tokens" in table.column_names
        kind = path.stem.split("-")[0] if path.parent == index else "text" if is_text else "ledger"
        content = table.select(CONTENT[kind]).to_pylist()
        text = json.dumps(content, ensure_ascii=False)
        name = f"{path.parent.parent.name}/{path.name}"
        found[name] = f"{len(content)} rows {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return found


def paths(folder):
    """Files below `folder` that are pinned, relative to it."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in found if not NOT_PINNED.match(path))


def digest(folder, path):
    """The sha256 of a file without the time and place of its making."""
    content = (folder / path).read_bytes()
    if path.endswith(".json"):
        value = json.loads(content)
        if timing := value.pop("timing", None):
            assert "started" in timing
            content = json.dumps(value).encode()
        if path.endswith("upstream.json"):  # sizes and times of files
            value["stamps"] = {name: one.split()[0] for name, one in value["stamps"].items()}
            content = json.dumps(value).encode()
        if path == "bundle/provenance.json":  # of the wheel, which has our code in it
            content = re.sub(rb'(\.whl",\s*"digest": \{\s*"sha256": ")[0-9a-f]+', rb"\1", content)
    return hashlib.sha256(content).hexdigest()
