"""The pages say what the code does: none is stale, none is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pmd_pipeline.cli.app import ORDER
from pmd_pipeline.cli.app import app as pmd
from pmd_pipeline.sources import names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The generated pages, by a process of its own, in which nothing watches the types of typer."""
    folder = tmp_path_factory.mktemp("docs")
    subprocess.run([sys.executable, DOCS / "generate.py", folder], check=False, capture_output=True)
    return folder


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_generated_page_is_what_the_code_says_now(name, written):
    now = (written / name).read_text(encoding="utf-8")

    assert (DOCS / name).read_text(encoding="utf-8") == now, "run `make docs`"


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


@pytest.mark.parametrize(("program", "typed"), [("pmd", "verif"), ("flava-train", "expo")])
def test_a_shell_completes_commands(program, typed):
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    words = {variable: "complete_bash", "COMP_WORDS": f"{program} {typed}", "COMP_CWORD": "1"}

    found = subprocess.run(
        [Path(sys.executable).parent / program],
        env={**os.environ, **words},
        check=False,
        capture_output=True,
        text=True,
    )

    assert found.stdout.strip().startswith(typed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_pages_exist(page):
    known = {words[1] for words in generate.commands(pmd, "pmd") if len(words) > 1}
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for command in re.findall(r"^pmd ([a-z]+)", block, re.MULTILINE):
            assert command in known, f"{page.name}: pmd {command}"
