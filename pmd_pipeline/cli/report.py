"""The command `pmd report`, which writes a page about a dataset."""

from typing import Annotated

import typer

from pmd_pipeline.cli.app import app, interruptible, make_reporter, say
from pmd_pipeline.cli.options import Quiet


@app.command()
def report(
    manifest: Annotated[
        str, typer.Argument(metavar="[MANIFEST]", help="A manifest.")
    ] = "manifests/pmd.json",
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="The page to write.")
    ] = "report.html",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Folder or address with the index [default: beside the shards].",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write an HTML page about a dataset: counts, reasons, lengths, hosts, kept and lost samples.

    Example: pmd report manifests/pmd.json --out report.html
    """
    from pmd_pipeline.contract.files import write_whole
    from pmd_pipeline.inspect.report.page import page

    with (
        interruptible(resumes=False),
        make_reporter(quiet=quiet).stage("report", "ledgers") as stage,
    ):
        html = page(manifest, data, stage.update).encode()
    write_whole(out, html)
    say(f"wrote {out}, {len(html) / 1e6:.1f} MB")
