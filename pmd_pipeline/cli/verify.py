"""Commands that check and compare datasets: `pmd verify`, `pmd diff`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from pmd_pipeline.cli.app import app, interruptible, make_reporter, say
from pmd_pipeline.cli.options import ON_PROCESSES, AsJson, Quiet, RunOptions, expand_options


@app.command()
@expand_options()
def verify(
    manifest: Annotated[
        str, typer.Argument(metavar="MANIFEST", help="The manifest of the dataset.")
    ],
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Check only sizes and reports, without reading the shards."),
    ] = False,
    as_json: AsJson = False,
    run: RunOptions = ON_PROCESSES,
    quiet: Quiet = False,
) -> None:
    """Check every digest, count, member and offset of a dataset, and list all damage.

    Example: pmd verify manifests/pmd.json
    """
    from pmd_pipeline.contract.manifest import load_manifest
    from pmd_pipeline.inspect.verify.dataset import verify as find_faults

    findings = []
    with interruptible(resumes=False), run.open_pool() as pool:
        for finding in find_faults(manifest, pool, make_reporter(quiet=quiet), fast=fast):
            findings.append(finding)
            if not as_json:
                typer.echo(str(finding))
    if as_json:
        content = {"manifest": manifest, "findings": [asdict(one) for one in findings]}
        typer.echo(json.dumps(content, indent=1))
    if findings:
        damaged = {(one.source, one.part) for one in findings if one.part is not None}
        say(
            f"{manifest}: {_counted(len(findings), 'fault')} in "
            f"{_counted(len(damaged), 'shard')}; delete the .json beside each and run the same "
            "build again, or copy the shard again"
        )
        raise typer.Exit(1)
    shards = load_manifest(manifest).shards
    images = sum(shard.images for shard in shards)
    sequences = sum(shard.pairs for shard in shards if not shard.images)
    contents = _counted(images, "image") if images else _counted(sequences, "sequence")
    say(f"OK: {'sizes and reports of ' * fast}{_counted(len(shards), 'shard')}, {contents}")


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="The first manifest.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The second manifest.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List the differences of two datasets: images, pairs, bytes, rules, versions.

    Example: pmd diff old/pmd.json manifests/pmd.json
    """
    from pmd_pipeline.inspect.diff import as_json as json_of
    from pmd_pipeline.inspect.diff import as_lines, compare

    with interruptible(resumes=False), make_reporter(quiet=quiet).stage("diff", "records") as stage:
        comparison = compare(before, after, stage)
    typer.echo(json_of(comparison) if as_json else "\n".join(as_lines(comparison)))
    if not comparison.are_equal:
        raise typer.Exit(1)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
