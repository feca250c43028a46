"""The pages are true: links, commands, options, files and figures exist as they state."""

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from flava_train.cli import app as flava_train
from pmd_pipeline.cli.app import ORDER
from pmd_pipeline.cli.app import app as pmd
from pmd_pipeline.recipe import load_recipe
from pmd_pipeline.sources import names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [
    README,
    CONTRIBUTING,
    ROOT / "manifests" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def links(page):
    text = page.read_text(encoding="utf-8")
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """The generated pages, written by a process without beartype, which rejects Typer's types."""
    folder = tmp_path_factory.mktemp("docs")
    subprocess.run([sys.executable, DOCS / "generate.py", folder], check=False, capture_output=True)
    return folder


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_generated_page_is_up_to_date(name, generated):
    expected = (generated / name).read_text(encoding="utf-8")

    assert (DOCS / name).read_text(encoding="utf-8") == expected, "run `make docs`"


@pytest.mark.parametrize("name", names())
def test_every_source_has_a_page(name):
    assert (DOCS / "sources" / f"{name}.md").is_file()
    assert f"({name}.md)" in (DOCS / "sources" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [*generate.commands(pmd, "pmd")], ids=" ".join)
def test_every_command_of_pmd_has_a_sentence_and_an_example(words):
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    text = page.split(f"## {' '.join(words)}\n", 1)[1].split("\n## ", 1)[0]

    assert f"Example: {words[0]}" in text


def test_every_command_has_its_place_in_the_help():
    assert {words[1] for words in generate.commands(pmd, "pmd") if words[1:]} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_every_command_of_pmd_is_in_the_readme(name):
    assert f"pmd {name}" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize(("program", "typed"), [("pmd", "verif"), ("flava-train", "expo")])
def test_a_shell_completes_commands(program, typed):
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    words = {variable: "complete_bash", "COMP_WORDS": f"{program} {typed}", "COMP_CWORD": "1"}

    result = subprocess.run(
        [Path(sys.executable).parent / program],
        env={**os.environ, **words},
        check=False,
        capture_output=True,
        text=True,
    )

    assert result.stdout.strip().startswith(typed)


@each_page
def test_links_between_pages_lead_somewhere(page):
    for link in links(page):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_reachable_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [
            (page.parent / link.partition("#")[0]).resolve()
            for link in links(page)
            if not link.startswith(("http", "mailto:", "#"))
        ]

    assert set(PAGES) - reached == set()


@cache
def options(program, *words):
    """The options of a command; None if there is no such command."""
    command = get_command(pmd if program == "pmd" else flava_train)
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            return None
    names = {name for parameter in command.params for name in parameter.opts}
    return names | {"--help", "-h"}


def calls(text):
    """The calls of `pmd` and `flava-train` in a shell script, as lists of words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[-2:-1] == ["|"] or not words:
            continue
        if "flava_train.cli" in words:  # torchrun
            words = ["flava-train", *words[words.index("flava_train.cli") + 1 :]]
        if words[0] in {"pmd", "flava-train"}:
            yield words


@each_page
def test_commands_and_options_in_pages_exist(page):
    for block in blocks(page, "bash"):
        for program, *words in calls(block):
            path = words[:1] if words and options(program, words[0]) is not None else []
            assert path or program == "flava-train" or words[:1] == ["--help"], f"{program} {words}"
            if path == ["codes"]:  # `pmd codes MANIFEST` is `pmd codes make MANIFEST`
                path.append(words[1] if options(program, "codes", words[1]) else "make")
            for word in words:
                name = word.partition("=")[0]
                if name.startswith("-"):
                    assert name in options(program, *path), f"{page.name}: {program} {path} {word}"


@each_page
def test_make_targets_in_pages_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name}: make {target}"


def named_places():
    """What CONTRIBUTING calls `folder/file.py` or `folder/file.py::name`, with further names."""
    for row in CONTRIBUTING.read_text(encoding="utf-8").splitlines():
        folder = ""
        for place in re.findall(r"`([\w./]+\.py(?:::\w+)?|[\w.]+/[\w./]*/)`", row):
            path, _, name = place.partition("::")
            if "/" not in path:  # a further file of the folder that was named last
                path = folder + path
            folder = path[: path.rindex("/") + 1] if "/" in path else ""
            yield path, name


@pytest.mark.parametrize(("path", "name"), sorted(set(named_places())))
def test_a_place_that_contributing_names_exists(path, name):
    candidates = [ROOT / path, ROOT / "pmd_pipeline" / path, ROOT / "flava_train" / path]
    existing = [candidate for candidate in candidates if candidate.exists()]
    assert existing, path

    if name:
        tree = ast.parse(existing[0].read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if hasattr(node, "name")}
        assigned = {node.id for line in tree.body for node in ast.walk(line) if is_assigned(node)}
        assert name in defined | assigned


def is_assigned(node):
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


@pytest.mark.parametrize("recipe", load_recipe("pmd"), ids=lambda recipe: recipe.source)
def test_the_costs_in_the_readme_are_those_of_the_recipe(recipe):
    text = README.read_text(encoding="utf-8")
    row = re.search(rf"^\| {recipe.source} \|(.+)$", text, re.MULTILINE)[1].split("|")
    expected = recipe.expected
    images = expected.records * expected.alive

    assert quantity(row[0]) == pytest.approx(recipe.load_source().info.paper.pairs, rel=0.01)
    assert quantity(row[1]) == pytest.approx(expected.pairs * expected.alive, rel=0.01)
    assert quantity(row[2]) == pytest.approx(images * expected.image_bytes, rel=0.05)
    assert quantity(row[3]) == pytest.approx(images * expected.stored_bytes, rel=0.1)


def quantity(text):
    """`1.9M`, `18 GB` and so on as a number."""
    number, unit = re.search(r"([\d.]+) ?(M|GB|TB)", text).groups()
    return float(number) * {"M": 1e6, "GB": 1e9, "TB": 1e12}[unit]


def test_python_in_the_readme_uses_public_names():
    [api, *_] = blocks(README, "python")
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(ast.parse(api))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    modules = {name: __import__(name) for name in ("pmd_pipeline", "flava_train")}

    for module, name in used:
        if module in modules:
            assert name in modules[module].__all__, f"{module}.{name}"


def test_the_recipe_in_own_data_loads(tmp_path):
    [content] = blocks(DOCS / "own_data.md", "toml")
    path = tmp_path / "my_cc12m.toml"
    path.write_text(content, encoding="utf-8")

    [recipe] = load_recipe(str(path))

    assert (recipe.source, recipe.images.format) == ("cc12m", "webp")
    assert recipe.captions.clean.html
