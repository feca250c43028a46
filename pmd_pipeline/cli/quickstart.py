"""The command `pmd quickstart`: the whole product on a sample world."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmd_pipeline.cli.app import app, interruptible, make_reporter, out_console, say
from pmd_pipeline.cli.build import fail_if_parts_failed
from pmd_pipeline.cli.options import Quiet, Runner, RunnerOption, Workers
from pmd_pipeline.contract.errors import PmdError

if TYPE_CHECKING:
    from pmd_pipeline.demo.quickstart import Places


@app.command()
def quickstart(
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Folder for everything.")
    ] = "quickstart",
    scenes: Annotated[int, typer.Option(min=40, metavar="N", help="Scenes per source.")] = 240,
    steps: Annotated[
        int | None,
        typer.Option(min=10, metavar="N", help="Training steps [default: those of flava_tiny]."),
    ] = None,
    no_train: Annotated[bool, typer.Option("--no-train", help="End with the build.")] = False,
    runner: RunnerOption = Runner.ray,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Build all nine sources from a drawn world, train a small FLAVA on them, and test it.

    Example: pmd quickstart --out quickstart
    """
    from pmd_pipeline.demo import quickstart as whole
    from pmd_pipeline.demo.training_summary import as_tables
    from pmd_pipeline.inspect import stats as statistics

    folder, reporter = Path(out), make_reporter(quiet=quiet)
    lacking = whole.lacking()
    trains = not (no_train or lacking)
    if trains and scenes < whole.LEAST_SCENES:
        raise PmdError(
            f"{scenes} scenes are too few to train on: give --scenes {whole.LEAST_SCENES}, or "
            "--no-train"
        )
    with interruptible():
        built = whole.run(folder, scenes, runner.value, workers, reporter)
    path, manifest = built.manifests[-1]
    for table in statistics.as_table(statistics.lengths(manifest), manifest):
        out_console.print(table)
    typer.echo(f"{path}  {manifest.digest}")
    fail_if_parts_failed(built)
    if lacking and not no_train:
        say(
            f"training is left out, since there is no {' and no '.join(lacking)}: "
            'pip install "pmd-flava[train]"'
        )
    if not trains:
        return
    with interruptible():
        whole.prepare(folder, workers, reporter)
        learned = whole.train(folder, steps, quiet=quiet)
        poster = whole.show_off(folder, learned)
    for table in as_tables(learned):
        out_console.print(table)
    for words in _next_steps(whole.Places(folder), poster):
        typer.echo(words)
    if missed := learned.missed(whole.TIMES):
        for sentence in missed:
            say(f"not learned: {sentence}")
        say("more --steps and another --out teach it more")
        raise typer.Exit(1)


def _next_steps(places: "Places", poster: str | None) -> list[str]:
    """What to look at, and commands to go on with."""
    if poster is None:
        say('the picture is left out: it needs matplotlib, pip install "pmd-flava[plot]"')
    held_out = places.held_out
    query = "two large red stars on a striped grey background"
    return [
        *([f"look at   {poster}"] if poster else []),
        f'ask it    flava-train search {places.trained} {held_out} "{query}"',
        f"see one   pmd show KEY --out {places.folder / 'held_out' / 'data'} --image found.jpg",
        f"test it   flava-train eval {places.trained} {held_out}",
        "go on     pmd sources, then pmd plan and pmd build on real data",
    ]
