"""Imports point downward only; this table is the architecture, and the test holds it."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    {"errors"},
    {"record", "storage", "tables", "format", "filters", "upstream", "progress", "parallel"},
    {"sources", "shards"},
    {"recipe", "sample", "tokenizers"},
    {"index", "fetch"},
    {"annotations", "images", "shelves", "manifest"},
    {"parts", "verify", "look"},
    {"codes", "texts", "kit", "plan"},
    {"dataset", "report", "bundle"},
    {"quickstart"},
    {"cli"},
]
"""Rooms of `pmd_pipeline`, lowest first: a file, or a folder of files. A room may import from lower
ones, and from its own row only itself; no files of a folder import each other in a circle."""

MAY_KNOW = {
    "ray": {"parallel"},
    "torch": {"tokenizers"},
    "safetensors": {"tokenizers"},
    "urllib3": {"annotations"},
    "pycurl": {"fetch.engine"},
    "certifi": {"fetch.engine"},
    "typer": {"cli"},
    "PIL": {
        "images.pictures",
        "parts.build",
        "shards.stored",
        "codes.shard",
        "plan.trial",
        "quickstart.poster",
        "sample",
    },
    "cv2": {"images.pixels", "parts.build"},
    "simplejpeg": {"images.pixels"},
    "fsspec": {"storage"},
    "ijson": {"upstream"},
    "jinja2": {"report", "bundle"},
    "packaging": {"bundle"},
    "tokenizers": {"texts.wordpiece", "texts.build"},
}
"""Libraries that only these rooms, or these files of a room, may import."""


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def room(path, package):
    relative = path.relative_to(ROOT / package)
    return relative.parts[0].removesuffix(".py")


def module(path):
    """`fetch.web` for the file of that name; `fetch` for what makes `fetch` a package."""
    relative = path.relative_to(ROOT / "pmd_pipeline").with_suffix("")
    return ".".join(relative.parts).removesuffix(".__init__")


def folders():
    return sorted(face.parent for face in (ROOT / "pmd_pipeline").glob("*/__init__.py"))


def within(name):
    return name.removeprefix("pmd_pipeline.")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{name.name}" for name in node.names)


def level(name):
    return next((number for number, rooms in enumerate(LAYERS) if name in rooms), None)


@pytest.mark.parametrize("path", modules("pmd_pipeline"), ids=lambda p: p.stem)
def test_imports_of_the_pipeline_point_downward(path):
    here = room(path, "pmd_pipeline")
    if here == "__init__":
        return
    assert level(here) is not None, f"{here} has no place in the table above"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "pmd_pipeline" and len(parts) > 1 and level(parts[1]) is not None:
            assert parts[1] == here or level(parts[1]) < level(here), f"{path.name}: {name}"
        known_to = MAY_KNOW.get(parts[0], {here})
        assert {here, module(path)} & known_to, f"{path.name} may not know {parts[0]}"
        assert parts[0] != "flava_train"


@pytest.mark.parametrize("folder", folders(), ids=lambda p: p.name)
def test_no_files_of_a_room_import_each_other_in_a_circle(folder):
    files = {module(path): path for path in sorted(folder.glob("*.py"))}
    found = {name: set(map(within, imported(path))) for name, path in files.items()}
    below = {name: found[name] & (files.keys() - {name}) for name in files}

    try:
        TopologicalSorter(below).prepare()
    except CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


@pytest.mark.parametrize("path", modules("flava_train"), ids=lambda p: p.stem)
def test_the_trainer_knows_only_the_format_of_the_pipeline(path):
    for name in imported(path):
        if name.split(".")[0] == "pmd_pipeline":
            assert name.startswith("pmd_pipeline.format")


def test_every_room_of_the_table_is_there():
    rooms = {room(path, "pmd_pipeline") for path in modules("pmd_pipeline")} - {
        "__init__",
        "__pycache__",
    }

    assert rooms == set().union(*LAYERS)


def on_the_map(head):
    """What the first column of the table with this head names in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(head)[2]
    cells = [line.split("|")[1] for line in text.partition("\n\n")[0].splitlines()[2:]]
    return [Path(name).stem for cell in cells for name in re.findall("`(.+?)`", cell)]


def test_every_file_of_the_trainer_is_on_the_map():
    there = {path.stem for path in modules("flava_train")} - {"__init__", "shapes", "errors"}

    assert sorted(on_the_map("| files of `flava_train` |")) == sorted(there - {"cli"})


def test_every_room_is_on_the_map():
    shown = on_the_map("| room |")

    assert sorted(shown, key=level) == shown
    assert set(shown) == set().union(*LAYERS)


@pytest.mark.parametrize("module", ["pmd_pipeline.cli", "pmd_pipeline.format"])
def test_the_command_and_the_format_load_neither_torch_nor_ray(module):
    code = f"import sys, {module}; print({{'torch', 'ray', 'polars'}} & set(sys.modules))"

    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert found.stdout.strip() == "set()"
