"""The command `pmd`, one module a group of commands: each parses, calls a function and prints.

Results go to stdout, messages to stderr.
"""

import importlib
import logging
import pkgutil
import sys

from pmd_pipeline.cli.app import app, say
from pmd_pipeline.contract.errors import PmdError

for module in sorted(entry.name for entry in pkgutil.iter_modules(__path__)):
    if not module.startswith("_"):
        importlib.import_module(f"{__name__}.{module}")  # registers its commands


def main() -> None:
    """Run `pmd`. Exit codes: 0 done, 1 some parts failed, 2 wrong input, 130 interrupted."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s"
    )
    try:
        app(prog_name="pmd")
    except PmdError as error:
        say(f"pmd: {error}")
        sys.exit(2)
