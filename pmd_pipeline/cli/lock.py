"""Commands for lock files: `pmd lock`, `pmd rebuild`."""

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
    out: Annotated[str, typer.Option("--out", metavar="KIT", help="Folder of the lock file.")] = (
        "kit"
    ),
    hash_captions: Annotated[
        bool,
        typer.Option(
            "--hash-captions",
            help="Write the sha256 of captions instead of captions; a rebuild then needs --raw.",
        ),
    ] = False,
    run: RunOptions = ON_PROCESSES,
    quiet: Quiet = False,
) -> None:
    """Write a lock file, from which others rebuild the dataset and prove that it is the same.

    Example: pmd lock manifests/pmd.json --out kit
    """
    from pmd_pipeline.publish.lockfile.lock import lock as write_lockfile

    with interruptible(), run.open_pool() as pool:
        reporter = make_reporter(quiet=quiet)
        lockfile = write_lockfile(manifest, out, pool, reporter, hashed=hash_captions)
    typer.echo(f"{out}  {lockfile.digest}")


@app.command()
@expand_options()
def rebuild(
    kit: Annotated[str, typer.Argument(metavar="KIT", help="The folder that pmd lock wrote.")],
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Folder or fsspec address for the shards.")
    ] = "data",
    manifests: Manifests = "manifests",
    images: Images = None,
    raw: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of annotation files, for a lock file of hashed captions."
        ),
    ] = None,
    run: RunOptions = ON_RAY,
    contact: Contact = "",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Rebuild a dataset from its lock file, with images of the same sha256, and list missing ones.

    Example: pmd rebuild kit --out data
    """
    from pmd_pipeline.publish.lockfile.rebuild import RebuildRequest
    from pmd_pipeline.publish.lockfile.rebuild import rebuild as rebuild_dataset

    request = RebuildRequest(
        lockfile=kit,
        out=out,
        manifests=manifests,
        images=tuple(images or ("web",)),
        raw=raw,
        changes={"fetch": {"contact": contact}} if contact else {},
    )
    with interruptible(), run.open_pool() as pool:
        result = rebuild_dataset(request, pool, make_reporter(quiet=quiet))
    if as_json:
        typer.echo(json.dumps(result.facts(), indent=1))
    else:
        typer.echo("\n".join(map(str, result.coverage)))
        typer.echo(f"{result.path}  {result.manifest.digest}")
    if result.is_same:
        say("the same dataset: the digest is that of the lock file")
        return
    for sentence in result.reasons():
        say(sentence)
    raise typer.Exit(1)
