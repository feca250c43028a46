"""The command `pmd plan`, which estimates the cost of a build before it starts."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pmd_pipeline.cli.app import app, interruptible, make_reporter, out_console, say
from pmd_pipeline.cli.options import AsJson, Contact, Out, Quiet, Raw

if TYPE_CHECKING:
    from rich.table import Table

    from pmd_pipeline.dataset.estimate import BuildEstimate
    from pmd_pipeline.dataset.probe import Interval


@app.command()
def plan(
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source", "-s", metavar="NAME", help="A source; may be repeated [default: all nine]."
        ),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A recipe file of your own; may be repeated."),
    ] = None,
    probe: Annotated[
        int | None,
        typer.Option(min=8, metavar="N", help="Fetch N images of each source, and extrapolate."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tasks in parallel, here or in a cluster [default: all cores]."
        ),
    ] = None,
    out: Out = "data",
    raw: Raw = None,
    contact: Contact = "",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Estimate images, bytes, disk and hours, from a probe or from recorded figures.

    Example: pmd plan --source cc12m --probe 200 --workers 64
    """
    import os
    from itertools import chain

    from pmd_pipeline.dataset import estimate as plans
    from pmd_pipeline.dataset.build import raw_folder
    from pmd_pipeline.recipe import load_recipe

    changes = {"fetch": {"contact": contact}} if contact else {}
    names = [*(source or ()), *(recipe or ())] or ["pmd"]
    recipes = list(chain.from_iterable(load_recipe(name, changes) for name in names))
    tasks = workers or os.cpu_count() or 1
    estimates = []
    with interruptible(resumes=False):
        for one in recipes:
            if probe:
                folder = raw_folder(raw, out, one.source)
                estimates.append(
                    plans.estimate_from_probe(
                        one, folder, out, probe, tasks, make_reporter(quiet=quiet)
                    )
                )
            else:
                estimates.append(plans.estimate_from_recorded(one, out, tasks))
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in estimates]))
        return
    totals = [plans.total_estimate(estimates)] if len(estimates) > 1 else []
    out_console.print(_estimate_table([*estimates, *totals], tasks))
    for each in estimates:
        lost = ", ".join(f"{reason} {share:.1%}" for reason, share in each.lost.items())
        say(f"{each.source}: {each.basis}" + (f"; lost: {lost}" if lost else ""))
    say(
        "CPU time is measured on this machine, without indexing. Without a probe, times do not "
        "include the delays of slow hosts."
    )


def _estimate_table(rows: list["BuildEstimate"], workers: int) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = ("records", "alive", "images", "pairs", "download", "disk", "shards", "CPU time")
    table = Table(
        "source", title=f"{workers} tasks in parallel", title_justify="left", box=SIMPLE_HEAD
    )
    for name in (*columns, "time"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.source,
            f"{row.records:,}",
            _format_share(row.alive),
            _format_count(row.images),
            _format_count(row.pairs),
            _format_bytes(row.bytes_down),
            _format_bytes(row.bytes_stored),
            f"{row.shards:,}",
            _format_hours(row.cpu_hours.value, row.cpu_hours.high),
            _format_time_range(row.hours),
        )
    return table


def _format_share(share: "Interval") -> str:
    if share.low is None or share.high is None:
        return f"{share.value:.0%}"
    return f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"


def _format_count(number: "Interval") -> str:
    return f"{number.value / 1e6:,.2f}M" if number.value >= 1e5 else f"{number.value:,.0f}"


def _format_bytes(size: "Interval") -> str:
    """Bytes with their interval, in one unit."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))
    unit, name = next((pair for pair in units if size.value >= pair[0]), (1e3, "kB"))
    spread = "" if size.high is None else f" ± {(size.high - size.value) / unit:,.1f}"
    return f"{size.value / unit:,.1f}{spread} {name}"


def _format_hours(hours: float, high: float | None = None) -> str:
    """Hours with the interval up to `high`, if given, in one unit."""
    units = ((24.0, "d"), (1.0, "h"), (1 / 60, "min"))
    unit, name = next((pair for pair in units if hours >= 2 * pair[0]), (1 / 3600, "s"))
    spread = "" if high is None else f" ± {(high - hours) / unit:,.1f}"
    return f"{hours / unit:,.1f}{spread} {name}"


def _format_time_range(hours: "Interval") -> str:
    """The least and the most time, or only the least if the most is unknown."""
    if hours.high is None:
        return f"over {_format_hours(hours.value)}"
    return f"{_format_hours(hours.low or 0.0)} to {_format_hours(hours.high)}"
