"""Commands that look: `pmd sources`, `pmd stats`, `pmd show`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pmd_pipeline.cli.app import Out, app, out_console, say


class Form(StrEnum):
    """How statistics are printed."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"


@app.command()
def sources(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Only this source, with all it publishes."),
    ] = None,
) -> None:
    """List the nine sources: pairs, licence, where files come from, what to get by hand.

    Example: pmd sources wit
    """
    from pmd_pipeline import listing

    for paragraph in (
        [listing.one_source(name, out_console.width)]
        if name
        else listing.all_sources(out_console.width)
    ):
        typer.echo(paragraph + "\n")


@app.command()
def stats(
    manifest: Annotated[
        str, typer.Argument(metavar="[MANIFEST]", help="A manifest.")
    ] = "manifests/pmd.json",
    form: Annotated[Form, typer.Option("--format", help="How to print.")] = Form.table,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Also write histograms of text lengths to this PNG."),
    ] = None,
) -> None:
    """Show text lengths and counts per dataset, beside the paper's.

    Example: pmd stats manifests/pmd.json --plot lengths.png
    """
    from pmd_pipeline import stats as statistics
    from pmd_pipeline.manifest import load_manifest

    loaded = load_manifest(manifest)
    rows = statistics.lengths(loaded)
    if plot:
        statistics.plot(rows, loaded, plot)
        say(f"wrote {plot}")
    for remark in statistics.remarks(loaded):
        say(remark)
    if form is Form.table:
        for table in statistics.as_table(rows, loaded):
            out_console.print(table)
    elif form is Form.json:
        typer.echo(statistics.as_json(rows, loaded))
    elif form is Form.csv:
        typer.echo(statistics.as_csv(rows))
    else:
        typer.echo(statistics.as_markdown(rows))


@app.command()
def show(
    key_or_shard: Annotated[
        str, typer.Argument(metavar="KEY|SHARD", help="A sample's key, or the path of a shard.")
    ],
    out: Out = "data",
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the stored JPEG here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell the whole story of a sample, from the upstream row to the bytes; or what a shard holds.

    Example: pmd show 64c23fe1967b35c0
    """
    from pmd_pipeline import story
    from pmd_pipeline.storage import write_whole

    if key_or_shard.endswith(".tar"):
        chapters = story.shard_story(key_or_shard)
    else:
        chapters = story.sample_story(out, key_or_shard)
    if image:
        write_whole(str(image), story.sample_image(chapters))
        say(f"wrote {image}")
    if as_json:
        typer.echo(
            json.dumps([{"title": c.title, **c.facts} for c in chapters], ensure_ascii=False)
        )
        return
    for chapter in chapters:
        typer.secho(chapter.title, bold=True)
        for name, value in chapter.facts.items():
            typer.echo(f"  {name}: {_plain(value)}")


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
