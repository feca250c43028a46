"""The command `pmd bundle`, which packs all files of a dataset except its images."""

from typing import Annotated

import typer

from pmd_pipeline.cli.app import app, say


@app.command()
def bundle(
    manifest: Annotated[
        str, typer.Argument(metavar="[MANIFEST]", help="A manifest.")
    ] = "manifests/pmd.json",
    out: Annotated[
        str, typer.Option("--out", metavar="DIR|FILE.tar", help="A new folder, or a tar.")
    ] = "bundle",
    kit: Annotated[
        str | None, typer.Option(metavar="KIT", help="Folder of the lock file, to pack as well.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Training configuration; may be repeated [default: the package's]."
        ),
    ] = None,
    wheel: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Wheel of the project [default: built from the installed files]."
        ),
    ] = None,
    hashes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Output of pip install --report, for hashes of the requirements."
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Address of the dataset's page, for Croissant.")
    ] = None,
    published: Annotated[
        str | None,
        typer.Option(metavar="DAY", help="Day of publication, YYYY-MM-DD, for Croissant."),
    ] = None,
) -> None:
    """Pack code, recipes, manifest and descriptions of a dataset, without its images.

    Example: pmd bundle manifests/pmd.json --out pmd-bundle.tar
    """
    from pmd_pipeline.publish.bundle.contents import BundleRequest, contents
    from pmd_pipeline.publish.bundle.pack import pack

    request = BundleRequest(manifest, kit, tuple(config or ()), wheel, hashes, url, published)
    say(f"wrote {out}, {pack(contents(request), out)} files")
