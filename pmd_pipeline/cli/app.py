"""The Typer app that every command joins, the consoles, and the options that commands share."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from pmd_pipeline.base.progress import Reporter

ORDER = (
    "quickstart",
    "sources",
    "plan",
    "build",
    "retry",
    "merge",
    "stats",
    "report",
    "show",
    "why",
    "verify",
    "diff",
    "codes",
    "tokenizer",
    "lock",
    "rebuild",
    "bundle",
)
"""Commands as one needs them, for `pmd --help`."""


class InOrder(TyperGroup):
    """Commands in `ORDER`."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 - typer's own click is private
        """Names of the commands; one that has no place yet comes last."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = typer.Typer(
    cls=InOrder,
    help="Rebuild the Public Multimodal Datasets: nine sources to shards, manifest, statistics.\n\n"
    "Example: pmd quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out_console = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
err_console = Console(stderr=True, emoji=False)


class Runner(StrEnum):
    """Where tasks run."""

    ray = "ray"
    local = "local"


Out = Annotated[
    str, typer.Option("--out", metavar="DIR", help="Folder or fsspec address for index and shards.")
]
Manifests = Annotated[str, typer.Option(metavar="DIR", help="Folder for manifests.")]
RunnerOption = Annotated[Runner, typer.Option(help="Run tasks on Ray, or on local processes.")]
Workers = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tasks at a time; default: all cores.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Join this Ray cluster (auto: the one of this machine)."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@contextmanager
def interruptible(*, resumes: bool = True) -> Iterator[None]:
    """Ctrl-C ends the command with exit code 130 and one sentence.

    Args:
        resumes: whether the same command goes on where it was, or begins anew.
    """
    try:
        yield
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here" if resumes else "stopped")
        raise typer.Exit(130) from None


def say(words: str) -> None:
    """Print talk, as it is, on stderr."""
    err_console.print(words, markup=False, highlight=False, soft_wrap=True)


def make_reporter(*, quiet: bool) -> "Reporter":
    """Where progress is make_reporter: stderr."""
    from pmd_pipeline.base.progress import Reporter

    return Reporter(err_console, quiet=quiet)
