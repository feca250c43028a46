"""Commands that build: `pmd build`, `pmd retry`, `pmd merge`, `pmd quickstart`."""

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
    make_reporter,
    say,
)

if TYPE_CHECKING:
    from pmd_pipeline.dataset.build import BuildRequest, BuildResult


Sources = Annotated[
    list[str] | None,
    typer.Option("--source", "-s", metavar="NAME", help="A source; may be repeated."),
]
All = Annotated[bool, typer.Option("--all", help="All nine, as recipes/pmd.toml says.")]
Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", metavar="FILE", help="A recipe file of your own; may be repeated."),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Only so many records of each source, an unbiased sample."
    ),
]
Raw = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="Folder of annotation files you have [default: OUT/raw/SOURCE]."
    ),
]
Places = Annotated[
    list[str] | None,
    typer.Option(
        "--images",
        metavar="PLACE",
        help="Where images are: web, a folder, a zip, a tar, or img2dataset's output folder; "
        "may be repeated, in order of preference [default: web].",
    ),
]
Contact = Annotated[
    str,
    typer.Option(metavar="TEXT", help="Mail or web address told to every host in the User-Agent."),
]
Licences = Annotated[
    list[str] | None,
    typer.Option(
        "--licence-allow",
        metavar="GLOB",
        help="Keep only images whose stated licence fits, case ignored; may be repeated.",
    ),
]
LidModel = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="lid.176.bin or lid.176.ftz [default: the packaged .ftz]."),
]


@app.command()
def build(
    source: Sources = None,
    all_: All = False,
    recipe: Recipes = None,
    limit: Limit = None,
    out: Out = "data",
    manifests: Manifests = "manifests",
    raw: Raw = None,
    images: Places = None,
    runner: RunnerOption = Runner.ray,
    workers: Workers = None,
    ray_address: RayAddress = None,
    contact: Contact = "",
    optout: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Addresses, sha256s, keys, source:ID, flickr:ID or host:NAME to leave out, now "
            "and in later builds; only the shards that hold them are made anew.",
        ),
    ] = None,
    licence_allow: Licences = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="vocab.txt or tokenizer.json by which sources of texts are packed."
        ),
    ] = None,
    lid_model: LidModel = None,
    quiet: Quiet = False,
) -> None:
    """Build sources to shards and manifests; interrupted, the same command goes on.

    Example: pmd build --source yfcc100m --limit 10000
    """
    from pmd_pipeline.dataset.build import BuildRequest

    request = BuildRequest(
        recipes=(*(source or ()), *(recipe or ()), *(("pmd",) if all_ else ())),
        out=out,
        manifests=manifests,
        raw=raw,
        images=tuple(images or ("web",)),
        limit=limit,
        changes=_changes(contact, licence_allow, tokenizer),
        optout=optout,
        runner=runner.value,
        workers=workers,
        ray_address=ray_address,
    )
    _build(request, lid_model, quiet=quiet)


@app.command()
def retry(
    reason: Annotated[
        list[str],
        typer.Option(
            metavar="REASONS", help="Reasons of failure, such as timeout,dns; may be repeated."
        ),
    ],
    source: Sources = None,
    all_: All = False,
    recipe: Recipes = None,
    limit: Limit = None,
    out: Out = "data",
    manifests: Manifests = "manifests",
    raw: Raw = None,
    images: Places = None,
    runner: RunnerOption = Runner.ray,
    workers: Workers = None,
    ray_address: RayAddress = None,
    contact: Contact = "",
    licence_allow: Licences = None,
    lid_model: LidModel = None,
    quiet: Quiet = False,
) -> None:
    """Ask again for what failed, in parts that are built; give the options of the build as well.

    Example: pmd retry --reason timeout,dns --source cc12m
    """
    from pmd_pipeline.dataset.build import BuildRequest, reasons_of

    request = BuildRequest(
        recipes=(*(source or ()), *(recipe or ()), *(("pmd",) if all_ else ())),
        out=out,
        manifests=manifests,
        raw=raw,
        images=tuple(images or ("web",)),
        limit=limit,
        changes=_changes(contact, licence_allow, None),
        again=reasons_of(reason),
        runner=runner.value,
        workers=workers,
        ray_address=ray_address,
    )
    _build(request, lid_model, quiet=quiet)


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
    from pmd_pipeline.contract.manifest import load_manifest, save_manifest
    from pmd_pipeline.dataset.manifest import merge_manifests

    found = merge_manifests(
        Path(out).stem, out, [(path, load_manifest(path)) for path in manifests]
    )
    save_manifest(out, found)
    typer.echo(f"{out}  {found.digest}")


def fail_if_parts_failed(built: "BuildResult") -> None:
    """Name the parts that a build could not finish, and exit with 1 if there are any."""
    for failure in built.failures:
        say(f"failed: {failure}; run the same command again")
    if built.failures:
        raise typer.Exit(1)


def _changes(
    contact: str, licences: list[str] | None, tokenizer: str | None
) -> dict[str, dict[str, object]]:
    """What options lay over every recipe."""
    return {
        "fetch": {"contact": contact} if contact else {},
        "images": {"licences": licences} if licences else {},
        "texts": {"tokenizer": tokenizer} if tokenizer else {},
    }


def _build(request: "BuildRequest", lid_model: Path | None, *, quiet: bool) -> None:
    from pmd_pipeline.dataset.build import build_all
    from pmd_pipeline.filters import caption

    if lid_model:
        caption.use_lid_model(lid_model)  # says what is wrong with it before anything is done
    with interruptible():
        built = build_all(request, make_reporter(quiet=quiet))
    for path, manifest in built.manifests:
        typer.echo(f"{path}  {manifest.digest}")
    fail_if_parts_failed(built)
