"""The command `pmd`: parses, calls one function, prints. Results on stdout, talk on stderr."""

import importlib
import logging
import pkgutil
import sys

from pmd_pipeline.cli.app import app, say
from pmd_pipeline.contract.errors import PmdError

for module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
    if not module.startswith("_"):
        importlib.import_module(f"{__name__}.{module}")  # registers its commands


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
