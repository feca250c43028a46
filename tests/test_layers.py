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
        ("contract",),
        ("base", "filters"),
        ("sources",),
        ("recipe",),
        ("index",),
        ("images",),
        ("shards",),
        ("codes", "text"),
        ("dataset",),
        ("inspect",),
        ("publish",),
        ("api", "demo"),
        ("cli",),
    ],
    "flava_train": [
        ("shapes",),
        ("model",),
        ("data",),
        ("objective",),
        ("config",),
        ("run",),
        ("evaluation",),
        ("trainer",),
        ("train",),
        ("cli",),
    ],
}
"""Packages and modules of each package, lowest first. One may import from lower ones, and from its
own row only itself; no files of a folder import each other in a circle."""

MAY_KNOW = {
    "ray": {"base.parallel"},
    "torch": {"codes.dvae", "codes.tokenizers"},
    "safetensors": {"codes.weights"},
    "urllib3": {"sources.upstream.download"},
    "pycurl": {"images.fetch"},
    "certifi": {"images.fetch"},
    "typer": {"cli"},
    "PIL": {
        "contract.image_format",
        "images.decode",
        "shards",
        "codes.shard",
        "dataset.probe",
        "dataset.reader",
        "demo",
    },
    "cv2": {"images.decode", "shards.report"},
    "simplejpeg": {"images.decode"},
    "fsspec": {"contract.files"},
    "ijson": {"sources.upstream"},
    "jinja2": {"inspect.report", "publish.bundle"},
    "packaging": {"publish.bundle"},
    "tokenizers": {"text"},
}
"""Libraries that only these packages or modules of the pipeline may import."""


def modules(*packages):
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def package_of(path):
    return path.relative_to(ROOT).parts[0]


def top_of(path):
    """`images` for every file below that folder; `recipe` for `recipe.py`."""
    return path.relative_to(ROOT / package_of(path)).parts[0].removesuffix(".py")


def module(path):
    """`fetch.web` for the file of that name; `fetch` for what makes `fetch` a package."""
    relative = path.relative_to(ROOT / package_of(path)).with_suffix("")
    return ".".join(relative.parts).removesuffix(".__init__")


def folders():
    return [init.parent for package in LAYERS for init in (ROOT / package).rglob("*/__init__.py")]


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
    return {name: number for number, row in enumerate(LAYERS[package]) for name in row}


@pytest.mark.parametrize("path", modules(*LAYERS), ids=module)
def test_imports_point_downward(path):
    here, level = top_of(path), levels(package_of(path))
    if here == "__init__":
        return
    assert here in level, f"{here} has no place in the table above"
    for name in imported_within(path):
        there = name.split(".")[0]
        if there in level:
            assert there == here or level[there] < level[here], f"{path.name}: {name}"


@pytest.mark.parametrize("path", modules("pmd_pipeline"), ids=module)
def test_a_library_is_imported_by_few_modules(path):
    for name in imported(path):
        library = name.split(".")[0]
        allowed = MAY_KNOW.get(library, {module(path)})
        here = f"{module(path)}."
        assert any(here.startswith(f"{one}.") for one in allowed), f"{here} may not use {library}"
        assert library != "flava_train"


@pytest.mark.parametrize("folder", folders(), ids=module)
def test_no_files_of_a_folder_import_each_other_in_a_circle(folder):
    files = {module(path): path for path in sorted(folder.glob("*.py"))}
    below = {name: imported_within(files[name]) & (files.keys() - {name}) for name in files}

    try:
        TopologicalSorter(below).prepare()
    except CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


@pytest.mark.parametrize("path", modules("flava_train"), ids=module)
def test_the_trainer_imports_only_the_contract_of_the_pipeline(path):
    for name in imported(path):
        if name.split(".")[0] == "pmd_pipeline":
            assert name.startswith("pmd_pipeline.contract")


@pytest.mark.parametrize("package", LAYERS)
def test_the_table_names_everything_that_is_there(package):
    there = {top_of(path) for path in modules(package)} - {"__init__"}

    assert there == levels(package).keys()


def on_the_map(package):
    """What the first column of the table of a package names in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition(f"| in `{package}` |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [Path(name).stem for cell in cells for name in re.findall("`(.+?)`", cell)]


@pytest.mark.parametrize("package", LAYERS)
def test_contributing_lists_the_packages_in_order(package):
    shown, level = on_the_map(package), levels(package)

    assert set(shown) == level.keys()
    assert sorted(shown, key=level.__getitem__) == shown


@pytest.mark.parametrize("module", ["pmd_pipeline.cli", "pmd_pipeline.contract.manifest"])
def test_the_command_and_the_contract_load_neither_torch_nor_ray(module):
    code = f"import sys, {module}; print({{'torch', 'ray', 'polars'}} & set(sys.modules))"

    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert found.stdout.strip() == "set()"


def test_no_two_test_modules_share_a_name():
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]

    assert sorted(names) == sorted(set(names)), "pytest imports them by that name"
