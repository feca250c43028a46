"""The command that packs a dataset's papers: `pmd bundle`."""

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
        str | None, typer.Option(metavar="KIT", help="What pmd lock wrote, to pack as well.")
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="A training configuration; repeatable [default: the package's]."
        ),
    ] = None,
    wheel: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The project's wheel [default: of what is installed]."),
    ] = None,
    hashes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="pip's --report on the requirements, for hashes beside versions."
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Page of the dataset, for Croissant.")] = None,
    published: Annotated[
        str | None, typer.Option(metavar="DAY", help="YYYY-MM-DD, for Croissant.")
    ] = None,
) -> None:
    """Pack what rebuilds, checks, describes and trains a dataset, without its images.

    Example: pmd bundle manifests/pmd.json --out pmd-bundle.tar
    """
    from pmd_pipeline.publish.bundle.contents import BundleRequest, contents
    from pmd_pipeline.publish.bundle.pack import pack

    wanted = BundleRequest(manifest, kit, tuple(config or ()), wheel, hashes, url, published)
    say(f"wrote {out}, {pack(contents(wanted), out)} files")
