"""The command `pmd plan`: what a build will take, before anything is spent."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pmd_pipeline.cli.app import app, interruptible, make_reporter, out_console, say
from pmd_pipeline.cli.options import AsJson, Out, Quiet

if TYPE_CHECKING:
    from rich.table import Table

    from pmd_pipeline.dataset.estimate import BuildEstimate
    from pmd_pipeline.dataset.probe import Interval


@app.command()
def plan(
    source: Annotated[
        list[str] | None,
        typer.Option("--source", "-s", metavar="NAME", help="A source; default: all nine."),
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A recipe file of your own.")
    ] = None,
    probe: Annotated[
        int | None,
        typer.Option(
            min=8, metavar="N", help="Fetch N images of each source now, and extrapolate."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tasks at a time, here or in a cluster; default: all cores."
        ),
    ] = None,
    out: Out = "data",
    raw: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of annotation files [default: OUT/raw/SOURCE]."),
    ] = None,
    contact: Annotated[
        str, typer.Option(metavar="TEXT", help="Mail or web address told to every host.")
    ] = "",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Estimate images, bytes, disk and hours: from a probe, or else from recorded figures.

    Example: pmd plan --source cc12m --probe 200 --workers 64
    """
    import os
    from itertools import chain

    from pmd_pipeline.dataset import estimate as estimates
    from pmd_pipeline.dataset.build import raw_folder
    from pmd_pipeline.recipe import load_recipe

    changes = {"fetch": {"contact": contact}} if contact else {}
    names = [*(source or ()), *(recipe or ())] or ["pmd"]
    recipes = list(chain.from_iterable(load_recipe(name, changes) for name in names))
    tasks = workers or os.cpu_count() or 1
    found = []
    with interruptible(resumes=False):
        for one in recipes:
            if probe:
                folder = raw_folder(raw, out, one.source)
                found.append(
                    estimates.estimate_from_probe(
                        one, folder, out, probe, tasks, make_reporter(quiet=quiet)
                    )
                )
            else:
                found.append(estimates.estimate_from_recorded(one, out, tasks))
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found]))
        return
    out_console.print(
        _table([*found, *([estimates.total_estimate(found)] if len(found) > 1 else [])], tasks)
    )
    for each in found:
        lost = ", ".join(f"{reason} {share:.1%}" for reason, share in each.lost.items())
        say(f"{each.source}: {each.basis}" + (f"; lost: {lost}" if lost else ""))
    say(
        "Processor time is measured on this machine; indexing comes on top. Times without a probe "
        "know nothing of how slow hosts are."
    )


def _table(rows: list["BuildEstimate"], workers: int) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = ("records", "alive", "images", "pairs", "download", "disk", "shards", "CPU time")
    table = Table(
        "source", title=f"{workers} tasks at a time", title_justify="left", box=SIMPLE_HEAD
    )
    for name in (*columns, "time"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.source,
            f"{row.records:,}",
            _share(row.alive),
            _count(row.images),
            _count(row.pairs),
            _size(row.bytes_down),
            _size(row.bytes_stored),
            f"{row.shards:,}",
            _time(row.cpu_hours.value, row.cpu_hours.high),
            _span(row.hours),
        )
    return table


def _share(share: "Interval") -> str:
    if share.low is None or share.high is None:
        return f"{share.value:.0%}"
    return f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"


def _count(number: "Interval") -> str:
    return f"{number.value / 1e6:,.2f}M" if number.value >= 1e5 else f"{number.value:,.0f}"


def _size(size: "Interval") -> str:
    """Bytes with their interval, in a unit that fits both."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))
    unit, name = next((pair for pair in units if size.value >= pair[0]), (1e3, "kB"))
    spread = "" if size.high is None else f" ± {(size.high - size.value) / unit:,.1f}"
    return f"{size.value / unit:,.1f}{spread} {name}"


def _time(hours: float, high: float | None = None) -> str:
    """A time, with its interval if `high` is its upper end, in a unit that fits both."""
    units = ((24.0, "d"), (1.0, "h"), (1 / 60, "min"))
    unit, name = next((pair for pair in units if hours >= 2 * pair[0]), (1 / 3600, "s"))
    spread = "" if high is None else f" ± {(high - hours) / unit:,.1f}"
    return f"{hours / unit:,.1f}{spread} {name}"


def _span(hours: "Interval") -> str:
    """From the least time to the most, if anybody knows how much that is."""
    if hours.high is None:
        return f"over {_time(hours.value)}"
    return f"{_time(hours.low or 0.0)} to {_time(hours.high)}"
