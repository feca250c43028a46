"""Commands of the image-free kit: `pmd lock`, `pmd rebuild`."""

import json
from typing import Annotated

import typer

from pmd_pipeline.cli.app import (
    Manifests,
    Quiet,
    RayAddress,
    Runner,
    RunnerOption,
    Workers,
    app,
    interruptible,
    make_reporter,
    say,
)


@app.command()
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
    runner: RunnerOption = Runner.local,
    workers: Workers = None,
    ray_address: RayAddress = None,
    quiet: Quiet = False,
) -> None:
    """Write the kit of a dataset: all that it takes to fetch its images again and prove them.

    Example: pmd lock manifests/pmd.json --out kit
    """
    from pmd_pipeline.base.parallel import open_pool
    from pmd_pipeline.publish.lockfile.lock import lock as write_kit

    with interruptible(), open_pool(runner.value, workers, ray_address) as pool:
        kit = write_kit(manifest, out, pool, make_reporter(quiet=quiet), hashed=hash_captions)
    typer.echo(f"{out}  {kit.digest}")


@app.command()
def rebuild(
    kit: Annotated[str, typer.Argument(metavar="KIT", help="A folder that pmd lock has written.")],
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Folder or fsspec address for the shards.")
    ] = "data",
    manifests: Manifests = "manifests",
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLACE",
            help="Where images are: web, a folder, a zip, a tar, or img2dataset's output folder; "
            "may be repeated, in order of preference [default: web].",
        ),
    ] = None,
    raw: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of annotation files, for a kit of hashed captions."
        ),
    ] = None,
    runner: RunnerOption = Runner.ray,
    workers: Workers = None,
    ray_address: RayAddress = None,
    contact: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="Mail or web address told to every host in the User-Agent."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Make a dataset again from its kit, image by image of the same sha256, and say what lacks.

    Example: pmd rebuild kit --out data
    """
    from pmd_pipeline.base.parallel import open_pool
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
    with interruptible(), open_pool(runner.value, workers, ray_address) as pool:
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
