"""Commands that build datasets: `pmd build`, `pmd retry`, `pmd merge`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmd_pipeline.cli.app import app, interruptible, make_reporter, say
from pmd_pipeline.cli.options import BUILD_DEFAULTS, BuildOptions, expand_options

if TYPE_CHECKING:
    from pmd_pipeline.dataset.build import BuildResult


@app.command()
@expand_options()
def build(options: BuildOptions = BUILD_DEFAULTS) -> None:
    """Build sources to shards and manifests; the same command resumes an interrupted build.

    Example: pmd build --source yfcc100m --limit 10000
    """
    _run_build(options)


@app.command()
@expand_options(without={"optout", "tokenizer"})
def retry(
    reason: Annotated[
        list[str],
        typer.Option(
            metavar="REASONS", help="Failure reasons, such as timeout,dns; may be repeated."
        ),
    ],
    options: BuildOptions = BUILD_DEFAULTS,
) -> None:
    """Fetch failed images again, in parts that are built; repeat the options of the build.

    Example: pmd retry --reason timeout,dns --source cc12m
    """
    from pmd_pipeline.dataset.build import parse_reasons

    _run_build(options, parse_reasons(reason))


@app.command()
def merge(
    manifests: Annotated[
        list[str], typer.Argument(metavar="MANIFEST", help="Manifests of different sources.")
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="The manifest to write.")
    ] = "manifests/pmd.json",
) -> None:
    """Merge manifests of different sources into one.

    Example: pmd merge manifests/coco.json manifests/sbu.json --out manifests/two.json
    """
    from pmd_pipeline.contract.manifest import load_manifest, save_manifest
    from pmd_pipeline.dataset.manifest import merge_manifests

    merged = merge_manifests(
        Path(out).stem, out, [(path, load_manifest(path)) for path in manifests]
    )
    save_manifest(out, merged)
    typer.echo(f"{out}  {merged.digest}")


def fail_if_parts_failed(result: "BuildResult") -> None:
    """Name the parts that a build could not finish, and exit with 1 if there are any."""
    for failure in result.failures:
        say(f"failed: {failure}; run the same command again")
    if result.failures:
        raise typer.Exit(1)


def _run_build(options: BuildOptions, retry_reasons: frozenset[str] = frozenset()) -> None:
    from pmd_pipeline.dataset.build import build_all
    from pmd_pipeline.filters import caption

    request = options.build_request(retry_reasons)
    if options.lid_model:
        caption.use_lid_model(options.lid_model)  # before the build, so that it fails early
    with interruptible():
        result = build_all(request, make_reporter(quiet=options.quiet))
    for path, manifest in result.manifests:
        typer.echo(f"{path}  {manifest.digest}")
    fail_if_parts_failed(result)
