"""The Typer app that every command joins; the consoles for results and for messages."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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
"""Commands in the order in which a user needs them, for `pmd --help`."""


class InOrder(TyperGroup):
    """A group that lists its commands in `ORDER`."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 - typer's own click is private
        """Names of the commands; those that are not in `ORDER` come last."""
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


@contextmanager
def interruptible(*, resumes: bool = True) -> Iterator[None]:
    """Ctrl-C ends the command with exit code 130 and one sentence.

    Args:
        resumes: the same command continues an interrupted one; else it starts anew.
    """
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted; run the same command to resume" if resumes else "interrupted")
        raise typer.Exit(130) from None


def say(message: str) -> None:
    """Print a message on stderr, without markup."""
    err_console.print(message, markup=False, highlight=False, soft_wrap=True)


def make_reporter(*, quiet: bool) -> "Reporter":
    """A reporter of progress on stderr."""
    from pmd_pipeline.base.progress import Reporter

    return Reporter(err_console, quiet=quiet)
