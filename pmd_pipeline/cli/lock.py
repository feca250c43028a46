"""Commands of the image-free kit: `pmd lock`, `pmd rebuild`."""

import json
from typing import Annotated

import typer

from pmd_pipeline.cli.app import app, interruptible, make_reporter, say
from pmd_pipeline.cli.options import (
    ON_PROCESSES,
    ON_RAY,
    AsJson,
    Contact,
    Images,
    Manifests,
    Quiet,
    RunOptions,
    expand_options,
)


@app.command()
@expand_options()
def lock(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST", help="The dataset's manifest.")],
    out: Annotated[str, typer.Option("--out", metavar="KIT", help="Folder for the kit.")] = "kit",
    hash_captions: Annotated[
        bool,
        typer.Option(
            "--hash-captions",
            help="Put only the sha256 of captions in; a rebuild then needs --raw.",
        ),
    ] = False,
    run: RunOptions = ON_PROCESSES,
    quiet: Quiet = False,
) -> None:
    """Write the kit of a dataset: all that it takes to fetch its images again and prove them.

    Example: pmd lock manifests/pmd.json --out kit
    """
    from pmd_pipeline.publish.lockfile.lock import lock as write_kit

    with interruptible(), run.open_pool() as pool:
        kit = write_kit(manifest, out, pool, make_reporter(quiet=quiet), hashed=hash_captions)
    typer.echo(f"{out}  {kit.digest}")


@app.command()
@expand_options()
def rebuild(
    kit: Annotated[str, typer.Argument(metavar="KIT", help="A folder that pmd lock has written.")],
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Folder or fsspec address for the shards.")
    ] = "data",
    manifests: Manifests = "manifests",
    images: Images = None,
    raw: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of annotation files, for a kit of hashed captions."
        ),
    ] = None,
    run: RunOptions = ON_RAY,
    contact: Contact = "",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a dataset again from its kit, image by image of the same sha256, and say what lacks.

    Example: pmd rebuild kit --out data
    """
    from pmd_pipeline.publish.lockfile.rebuild import RebuildRequest
    from pmd_pipeline.publish.lockfile.rebuild import rebuild as make

    order = RebuildRequest(
        kit=kit,
        out=out,
        manifests=manifests,
        places=tuple(images or ("web",)),
        raw=raw,
        changes={"fetch": {"contact": contact}} if contact else {},
    )
    with interruptible(), run.open_pool() as pool:
        made = make(order, pool, make_reporter(quiet=quiet))
    if as_json:
        typer.echo(json.dumps(made.facts(), indent=1))
    else:
        typer.echo("\n".join(map(str, made.coverage)))
        typer.echo(f"{made.path}  {made.manifest.digest}")
    if made.is_same:
        say("the same dataset: the digest is that of the kit")
        return
    for sentence in made.reasons():
        say(sentence)
    raise typer.Exit(1)
