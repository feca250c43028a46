"""The command `pmd quickstart`, which builds and trains on a generated sample world."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmd_pipeline.cli.app import app, interruptible, make_reporter, out_console, say
from pmd_pipeline.cli.build import fail_if_parts_failed
from pmd_pipeline.cli.options import Quiet, Runner, RunnerOption, Workers
from pmd_pipeline.contract.errors import PmdError

if TYPE_CHECKING:
    from pmd_pipeline.demo.quickstart import QuickstartPaths


@app.command()
def quickstart(
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Folder for all files.")
    ] = "quickstart",
    scenes: Annotated[int, typer.Option(min=40, metavar="N", help="Scenes per source.")] = 240,
    steps: Annotated[
        int | None,
        typer.Option(min=10, metavar="N", help="Training steps [default: those of flava_tiny]."),
    ] = None,
    no_train: Annotated[bool, typer.Option("--no-train", help="Stop after the build.")] = False,
    runner: RunnerOption = Runner.ray,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Build all nine sources from generated images, train a small FLAVA on them, and test it.

    Example: pmd quickstart --out quickstart
    """
    from pmd_pipeline.demo import quickstart as demo
    from pmd_pipeline.demo.training_summary import summary_tables
    from pmd_pipeline.inspect import stats as statistics

    folder, reporter = Path(out), make_reporter(quiet=quiet)
    missing_packages = demo.missing_libraries()
    trains = not (no_train or missing_packages)
    if trains and scenes < demo.MIN_TRAINING_SCENES:
        least = demo.MIN_TRAINING_SCENES
        raise PmdError(
            f"{scenes} scenes are too few for training: give --scenes {least} or --no-train"
        )
    with interruptible():
        result = demo.run(folder, scenes, runner.value, workers, reporter)
    path, manifest = result.manifests[-1]
    for table in statistics.as_table(statistics.lengths(manifest), manifest):
        out_console.print(table)
    typer.echo(f"{path}  {manifest.digest}")
    fail_if_parts_failed(result)
    if missing_packages and not no_train:
        say(
            f"no training, since these packages are not installed: {', '.join(missing_packages)}; "
            'pip install "pmd-flava[train]"'
        )
    if not trains:
        return
    with interruptible():
        demo.prepare(folder, workers, reporter)
        summary = demo.train_model(folder, steps, quiet=quiet)
        poster = demo.draw_search_results(folder, summary)
    for table in summary_tables(summary):
        out_console.print(table)
    for line in _next_steps(demo.QuickstartPaths(folder), poster):
        typer.echo(line)
    if shortfalls := summary.shortfalls(demo.MIN_TIMES_CHANCE):
        for sentence in shortfalls:
            say(f"not learned: {sentence}")
        say("train longer: give more --steps and another --out")
        raise typer.Exit(1)


def _next_steps(paths: "QuickstartPaths", poster: str | None) -> list[str]:
    """The path of the poster, and commands to try next."""
    if poster is None:
        say('no picture, since matplotlib is not installed: pip install "pmd-flava[plot]"')
    held_out = paths.held_out
    query = "two large red stars on a striped grey background"
    return [
        *([f"picture   {poster}"] if poster else []),
        f'search    flava-train search {paths.run_folder} {held_out} "{query}"',
        f"show      pmd show KEY --out {paths.folder / 'held_out' / 'data'} --image found.jpg",
        f"evaluate  flava-train eval {paths.run_folder} {held_out}",
        "real data pmd sources, then pmd plan and pmd build",
    ]
