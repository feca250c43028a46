"""Every help page is the recorded one; commands are found by listing them."""

import re
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
from golden_commands import MODULES, run_well


def pages(program, folder):
    """The help pages of a program and of all its commands, each under the words that ask for it."""
    with ThreadPoolExecutor(2) as pool:
        waiting = [(program,)]
        while waiting:
            printed = [
                pool.submit(run_well, program, *words[1:], "--help", cwd=folder)
                for words in waiting
            ]
            found = list(zip(waiting, [one.result() for one in printed], strict=True))
            yield from found
            waiting = [(*words, name) for words, page in found for name in commands(page)]


def commands(page):
    """Names under `Commands:`; lines of their descriptions that are wrapped are indented more."""
    _, _, listed = page.partition("\nCommands:\n")
    return re.findall(r"^  (\S+)", listed, re.MULTILINE)


@pytest.mark.parametrize("program", MODULES)
def test_help_pages_are_the_recorded_ones(program, golden, tmp_path):
    found = dict(pages(program, tmp_path))
    printer = f"typer {version('typer')}\n"
    text = "".join(f"\n$ {' '.join(words)} --help\n{page}" for words, page in found.items())

    recorded = golden.text(f"help_{program}", printer + text)

    assert len(found) > 5
    listed = [f"{' '.join(words)} --help" for words in found]
    assert listed == re.findall(r"^\$ (.*)$", recorded, re.MULTILINE)
    if not recorded.startswith(printer):
        pytest.skip(f"help pages were printed by {recorded.splitlines()[0]}, here {printer}")
    assert printer + text == recorded
