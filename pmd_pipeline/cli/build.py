"""Commands that build: `pmd build`, `pmd merge`, `pmd quickstart`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmd_pipeline.cli.app import (
    Manifests,
    Out,
    Quiet,
    RayAddress,
    Runner,
    RunnerOption,
    Workers,
    app,
    interruptible,
    out_console,
    say,
    shown,
)

if TYPE_CHECKING:
    from pmd_pipeline.dataset import Built


@app.command()
def build(
    source: Annotated[
        list[str] | None,
        typer.Option("--source", "-s", metavar="NAME", help="A source; may be repeated."),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="All nine, as recipes/pmd.toml says.")
    ] = False,
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A recipe file of your own; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Only so many records of each source, an unbiased sample."
        ),
    ] = None,
    out: Out = "data",
    manifests: Manifests = "manifests",
    raw: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of annotation files you have [default: OUT/raw/SOURCE]."
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLACE",
            help="Where images are: web, a folder, a zip, a tar, or img2dataset's output folder; "
            "may be repeated, in order of preference [default: web].",
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
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="vocab.txt or tokenizer.json by which sources of texts are packed."
        ),
    ] = None,
    lid_model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="lid.176.bin or lid.176.ftz [default: the packaged .ftz]."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Build sources to shards and manifests; interrupted, the same command goes on.

    Example: pmd build --source yfcc100m --limit 10000
    """
    from pmd_pipeline.dataset import Request, build_all
    from pmd_pipeline.filters import caption

    if lid_model:
        caption.use_lid_model(lid_model)  # says what is wrong with it before anything is done
    request = Request(
        recipes=(*(source or ()), *(recipe or ()), *(("pmd",) if all_ else ())),
        out=out,
        manifests=manifests,
        raw=raw,
        images=tuple(images or ("web",)),
        limit=limit,
        changes={
            "fetch": {"contact": contact} if contact else {},
            "texts": {"tokenizer": tokenizer} if tokenizer else {},
        },
        runner=runner.value,
        workers=workers,
        ray_address=ray_address,
    )
    with interruptible():
        built = build_all(request, shown(quiet=quiet))
    for path, manifest in built.manifests:
        typer.echo(f"{path}  {manifest.digest}")
    _fail_if_parts_failed(built)


@app.command()
def merge(
    manifests: Annotated[
        list[str], typer.Argument(metavar="MANIFEST", help="Manifests of different sources.")
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="The manifest to write.")
    ] = "manifests/pmd.json",
) -> None:
    """Make one manifest of several.

    Example: pmd merge manifests/coco.json manifests/sbu.json --out manifests/two.json
    """
    from pmd_pipeline.manifest import load_manifest, merged, save_manifest

    found = merged(Path(out).stem, out, [(path, load_manifest(path)) for path in manifests])
    save_manifest(out, found)
    typer.echo(f"{out}  {found.digest}")


@app.command()
def quickstart(
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Folder for everything.")
    ] = "quickstart",
    scenes: Annotated[int, typer.Option(min=40, metavar="N", help="Scenes per source.")] = 240,
    runner: RunnerOption = Runner.ray,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Build all nine sources from a sample world, drawn and served on this machine.

    Example: pmd quickstart --out quickstart
    """
    from pmd_pipeline import stats as statistics
    from pmd_pipeline.quickstart import run

    with interruptible():
        built = run(Path(out), scenes, runner.value, workers, shown(quiet=quiet))
    path, manifest = built.manifests[-1]
    for table in statistics.as_table(statistics.lengths(manifest), manifest):
        out_console.print(table)
    typer.echo(f"{path}  {manifest.digest}")
    _fail_if_parts_failed(built)


def _fail_if_parts_failed(built: "Built") -> None:
    for failure in built.failures:
        say(f"failed: {failure}; run the same command again")
    if built.failures:
        raise typer.Exit(1)
