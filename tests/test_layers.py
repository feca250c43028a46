"""Imports point downward only; this table is the architecture, and the test holds it."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = {
    "pmd_pipeline": [
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
    ],
    "flava_train": [
        {"errors", "shapes"},
        {"model", "masking", "text"},
        {"batches", "hf"},
        {"losses"},
        {"step", "streams"},
        {"config"},
        {"run"},
        {"evaluation"},
        {"learner"},
        {"train"},
        {"cli"},
    ],
}
"""Rooms of each package, lowest first: a file, or a folder of files. A room may import from lower
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
"""Libraries that only these rooms, or these files of a room, of the pipeline may import."""


def modules(*packages):
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def package_of(path):
    return path.relative_to(ROOT).parts[0]


def room(path):
    return path.relative_to(ROOT / package_of(path)).parts[0].removesuffix(".py")


def module(path):
    """`fetch.web` for the file of that name; `fetch` for what makes `fetch` a package."""
    relative = path.relative_to(ROOT / package_of(path)).with_suffix("")
    return ".".join(relative.parts).removesuffix(".__init__")


def folders():
    return [face.parent for package in LAYERS for face in (ROOT / package).glob("*/__init__.py")]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: write whole names, which this test can read"
            yield str(node.module)
            yield from (f"{node.module}.{name.name}" for name in node.names)


def imported_within(path):
    """The same of the file's own package alone, named as `module` names a file."""
    own = f"{package_of(path)}."
    return {name.removeprefix(own) for name in imported(path) if name.startswith(own)}


def levels(package):
    return {name: number for number, rooms in enumerate(LAYERS[package]) for name in rooms}


@pytest.mark.parametrize("path", modules(*LAYERS), ids=module)
def test_imports_point_downward(path):
    here, level = room(path), levels(package_of(path))
    if here == "__init__":
        return
    assert here in level, f"{here} has no place in the table above"
    for name in imported_within(path):
        there = name.split(".")[0]
        if there in level:
            assert there == here or level[there] < level[here], f"{path.name}: {name}"


@pytest.mark.parametrize("path", modules("pmd_pipeline"), ids=module)
def test_a_library_is_known_to_few_rooms(path):
    for name in imported(path):
        library = name.split(".")[0]
        known_to = MAY_KNOW.get(library, {room(path)})
        assert {room(path), module(path)} & known_to, f"{path.name} may not know {library}"
        assert library != "flava_train"


@pytest.mark.parametrize("folder", folders(), ids=module)
def test_no_files_of_a_room_import_each_other_in_a_circle(folder):
    files = {module(path): path for path in sorted(folder.glob("*.py"))}
    below = {name: imported_within(files[name]) & (files.keys() - {name}) for name in files}

    try:
        TopologicalSorter(below).prepare()
    except CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


@pytest.mark.parametrize("path", modules("flava_train"), ids=module)
def test_the_trainer_knows_only_the_format_of_the_pipeline(path):
    for name in imported(path):
        if name.split(".")[0] == "pmd_pipeline":
            assert name.startswith("pmd_pipeline.format")


@pytest.mark.parametrize("package", LAYERS)
def test_every_room_of_the_table_is_there(package):
    rooms = {room(path) for path in modules(package)} - {"__init__"}

    assert rooms == levels(package).keys()


def on_the_map(package):
    """What the first column of the table of a package names in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition(f"| room of `{package}` |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [Path(name).stem for cell in cells for name in re.findall("`(.+?)`", cell)]


@pytest.mark.parametrize("package", LAYERS)
def test_every_room_is_on_the_map(package):
    shown, level = on_the_map(package), levels(package)

    assert set(shown) == level.keys()
    assert sorted(shown, key=level.__getitem__) == shown


@pytest.mark.parametrize("module", ["pmd_pipeline.cli", "pmd_pipeline.format"])
def test_the_command_and_the_format_load_neither_torch_nor_ray(module):
    code = f"import sys, {module}; print({{'torch', 'ray', 'polars'}} & set(sys.modules))"

    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert found.stdout.strip() == "set()"
