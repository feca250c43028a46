"""Write the generated pages: `cli.md` and `reasons.md`. `make docs` runs it.

An argument names another folder to write to.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from typer.testing import CliRunner

from flava_train.cli import app as flava_train
from pmd_pipeline.cli.app import app as pmd
from pmd_pipeline.contract.reasons import DROP_REASONS, FAILURE_REASONS

HERE = Path(__file__).parent


def cli_page() -> str:
    """The output of `--help` of every command."""
    blocks = [
        f"## {' '.join(words)}\n\n```\n{_help(app, words)}```\n"
        for app, name in ((pmd, "pmd"), (flava_train, "flava-train"))
        for words in commands(app, name)
    ]
    start = "# Commands\n\nWritten by `make docs` from each command's `--help`.\n"
    return "\n".join([start, *blocks])


def reasons_page() -> str:
    """The reasons under which pairs are counted that are not kept."""
    text = (
        "# Reasons\n\nWritten by `make docs` from `pmd_pipeline/contract/reasons.py`. "
        "Every pair that is not "
        "kept is counted under one of these,\nor under the name of the filter that refused it.\n"
    )
    for title, reasons in (
        ("Dropped: a decision of the recipe", DROP_REASONS),
        ("Failed: the fault of the world", FAILURE_REASONS),
    ):
        rows = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in sorted(reasons.items()))
        text += f"\n## {title}\n\n| reason | meaning |\n|---|---|\n{rows}\n"
    return text


PAGES = {"cli.md": cli_page, "reasons.md": reasons_page}


def commands(app: typer.Typer, name: str) -> Iterator[tuple[str, ...]]:
    """The words of every command of `app`, groups included."""
    yield (name,)
    for command in app.registered_commands:
        yield name, command.name or str(command.callback and command.callback.__name__)
    for group in app.registered_groups:
        assert group.typer_instance
        for _, *rest in commands(group.typer_instance, ""):
            yield name, str(group.name), *rest


def _help(app: typer.Typer, words: tuple[str, ...]) -> str:
    result = CliRunner().invoke(
        app, [*words[1:], "--help"], prog_name=words[0], env={"COLUMNS": "100"}
    )
    assert result.exit_code == 0, result.output
    return "".join(f"{line.rstrip()}\n" for line in result.output.strip().splitlines())


def main() -> None:
    """Write the pages that changed, and exit with a message if there are any."""
    folder = Path(*sys.argv[1:2]) if sys.argv[1:] else HERE
    changed = [name for name, page in PAGES.items() if _write(folder / name, page())]
    if changed:
        sys.exit(f"written anew: {', '.join(changed)}; commit them")


def _write(path: Path, text: str) -> bool:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.write_text(text, encoding="utf-8")
    return True


if __name__ == "__main__":
    main()
