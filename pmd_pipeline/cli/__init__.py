"""The command `pmd`: parses, calls one function, prints. Results on stdout, talk on stderr."""

import logging
import sys

from pmd_pipeline.cli import build, look, texts
from pmd_pipeline.cli.app import app, say
from pmd_pipeline.errors import PmdError

COMMANDS = (build, look, texts)
"""Files of commands; importing one registers its commands."""


def main() -> None:
    """Run `pmd`: exit 0 done, 1 some parts failed, 2 fix the input, 130 interrupted."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s"
    )
    try:
        app(prog_name="pmd")
    except PmdError as error:
        say(f"pmd: {error}")
        sys.exit(2)
