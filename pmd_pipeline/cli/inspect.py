"""Commands that inspect a dataset: `pmd sources`, `pmd stats`, `pmd show`, `pmd why`."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pmd_pipeline.cli.app import app, out_console, say
from pmd_pipeline.cli.options import AsJson, Out, Workers


class Form(StrEnum):
    """Output formats of `pmd stats`."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"


@app.command()
def sources(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Describe only this source, or those of a recipe file, with all files.",
        ),
    ] = None,
) -> None:
    """List the sources: licence, size, annotation files, and what to download by hand.

    Example: pmd sources wit
    """
    from pmd_pipeline.inspect.source_listing import describe_source, list_sources

    for paragraph in (
        [describe_source(name, out_console.width)] if name else list_sources(out_console.width)
    ):
        typer.echo(paragraph + "\n")


@app.command()
def stats(
    manifest: Annotated[
        str, typer.Argument(metavar="[MANIFEST]", help="A manifest.")
    ] = "manifests/pmd.json",
    form: Annotated[Form, typer.Option("--format", help="Output format.")] = Form.table,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Also write histograms of lengths to this PNG."),
    ] = None,
) -> None:
    """Print caption lengths and counts per source, beside those of the paper.

    Example: pmd stats manifests/pmd.json --plot lengths.png
    """
    from pmd_pipeline.contract.manifest import load_manifest
    from pmd_pipeline.inspect import stats as statistics

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
        str, typer.Argument(metavar="KEY|SHARD", help="Key of a sample, or path of a shard.")
    ],
    out: Out = "data",
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the stored image to this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a sample with its ledger row, or the report and first samples of a shard.

    Example: pmd show 64c23fe1967b35c0 --image dog.jpg
    """
    from pmd_pipeline.base.parallel import open_pool
    from pmd_pipeline.contract.files import write_whole
    from pmd_pipeline.contract.image_format import stored_format
    from pmd_pipeline.inspect.shard_contents import shard_contents
    from pmd_pipeline.inspect.trace import find_traces, stored_image

    facts: dict[str, dict[str, Any]]
    if key_or_shard.endswith((".tar", ".parquet")):
        shard = shard_contents(key_or_shard)
        report = shard.report.model_dump(mode="json", exclude={"words"})
        facts = {"report": report, **shard.first}
    else:
        with open_pool("local", 1, None) as pool:
            trace = find_traces(out, key_or_shard, pool)[0]
        ledger = asdict(trace.ledger) if trace.ledger else {}
        facts = {"ledger": ledger, "sample": trace.sample or {}}
        if trace.sequences:
            facts = {f"sequence {one.row}": asdict(one) for one in trace.sequences}
        if image:
            content = stored_image(trace)
            write_whole(str(image), content)
            kind = stored_format(content)
            say(f"wrote {image}, {kind.pillow if kind else 'no image'}")
        if not (trace.sample or trace.sequences):
            say(f"{key_or_shard} has no stored image: run pmd why {key_or_shard} for the reason")
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    for title, named in facts.items():
        typer.secho(title, bold=True)
        for name, value in named.items():
            typer.echo(f"  {name}: {_plain(value)}")


@app.command()
def why(
    record: Annotated[
        str,
        typer.Argument(metavar="ID|URL|KEY", help="Upstream id, address or key of an image."),
    ],
    out: Out = "data",
    source: Annotated[
        str | None, typer.Option("--source", "-s", metavar="NAME", help="Search only this source.")
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Trace one record from its upstream rows to its stored bytes, with the reason of each step.

    Example: pmd why http://images.cocodataset.org/train2014/COCO_train2014_000000391895.jpg
    """
    from pmd_pipeline.base.parallel import open_pool
    from pmd_pipeline.inspect.trace import find_traces
    from pmd_pipeline.inspect.trace_text import as_facts, trace_lines

    with open_pool("local", workers, None) as pool:
        traces = find_traces(out, record, pool, source)
    if as_json:
        facts = [as_facts(trace) for trace in traces]
        typer.echo(json.dumps(facts, ensure_ascii=False, default=str))
        return
    for number, trace in enumerate(traces):
        for line in ("",) * bool(number) + tuple(trace_lines(trace)):
            typer.secho(line, bold=not line.startswith(" "))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
