"""The command `flava-train`: parses, calls one function, prints."""

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pmd_pipeline.contract.errors import PmdError

if TYPE_CHECKING:
    from flava_train.config import TrainConfig

app = typer.Typer(
    invoke_without_command=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def train(
    context: typer.Context,
    manifest: Annotated[
        str | None,
        typer.Option(
            "--shards", metavar="MANIFEST", help="Pairs to learn from, as `pmd build` lists them."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="What to do; default: what the run in --out was told, else flava_pmd.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the run; default: runs/NAME.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value: optimizer.lr=3e-4."),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH", help="Go on from a checkpoint: the newest, none, or this."
        ),
    ] = "auto",
    allow_changed_data: Annotated[
        bool,
        typer.Option("--allow-changed-data", help="Go on even if steps would see other data."),
    ] = False,
    explain_step: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Print what step N sees, and do nothing else."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Train FLAVA; the same command goes on where it was stopped or killed.

    Example: flava-train --shards manifests/pmd.json --config flava_mm --set micro=128
    """
    if context.invoked_subcommand:
        return
    from flava_train.config import load_config

    changes = {"data.pairs": manifest, "out": out}
    said = {key: value for key, value in changes.items() if value is not None}
    told = load_config(config or _told_before(out), said, settings=setting or [])
    if explain_step is not None:
        _explain(told, explain_step)
        return
    from flava_train.train import train as run

    outcome = run(told, resume=resume, allow_changed_data=allow_changed_data, quiet=quiet)
    if outcome.signal is None:
        typer.echo(f"{told.out}: {outcome.steps:,} steps taken")
        return
    typer.echo(
        f"{told.out}: stopped after {outcome.steps:,} steps; the same command goes on", err=True
    )
    raise typer.Exit(130 if outcome.signal == signal.SIGINT else 0)


@app.command()
def shards(
    manifest: Annotated[
        Path, typer.Option("--shards", metavar="MANIFEST", help="A manifest of `pmd build`.")
    ] = Path("manifests/pmd.json"),
) -> None:
    """Check that a manifest is unchanged and that all of its shards are there.

    Example: flava-train shards --shards manifests/pmd.json
    """
    from flava_train.data.manifests import check_manifest

    loaded, found = check_manifest(manifest)
    for one in found:
        typer.echo(
            f"{one.source:<22}{one.pairs:>14,} pairs {one.images:>14,} images "
            f"{one.shards:>7,} shards {one.num_bytes / 2**30:>10.2f} GiB"
        )
    typer.echo(f"{manifest}  {loaded.digest}")


@app.command()
def model(
    weights: Annotated[
        str | None,
        typer.Argument(help="A FlavaForPreTraining: its folder, or its id on the hub."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Commit on the hub, 40 hex digits.")
    ] = None,
) -> None:
    """Show the parts of FLAVA and their parameters, as published or of the weights given.

    Example: flava-train model facebook/flava-full --revision COMMIT
    """
    import torch

    from flava_train.model.flava import Flava, FlavaConfig
    from flava_train.model.hf import load_hf

    if weights is None:
        with torch.device("meta"):
            flava = Flava(FlavaConfig())
    else:
        flava = load_hf(weights, revision=revision)
    total = 0
    for name, part in flava.named_children():
        count = sum(parameter.numel() for parameter in part.parameters())
        total += count
        typer.echo(f"{name:<20}{count:>14,}")
    rest = sum(parameter.numel() for parameter in flava.parameters()) - total
    typer.echo(f"{'temperature':<20}{rest:>14,}")
    typer.echo(f"{'parameters':<20}{total + rest:>14,}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.")],
    hf: Annotated[Path, typer.Option("--hf", metavar="DIR", help="Folder to write; must be new.")],
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint, not the newest.")] = (
        False
    ),
) -> None:
    """Write a run's model as a folder that transformers loads, with its tokenizer.

    Example: flava-train export --hf flava-hf runs/flava_pmd
    """
    from flava_train.evaluation.trained_model import load_trained_model
    from flava_train.model.hf import export_hf

    trained = load_trained_model(run, best=best)
    export_hf(trained.model, hf, vocabulary=trained.wordpiece.vocabulary)
    typer.echo(f"{hf}: the model of {trained.checkpoint}")


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.")],
    manifest: Annotated[
        str | None, typer.Argument(help="Held-out pairs; default: those of the run.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="DIR", help="A folder of images for each class.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint, not the newest.")] = (
        False
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure zero-shot retrieval, and classification, beside what guessing would give.

    Example: flava-train eval runs/flava_pmd manifests/flickr30k.json
    """
    from flava_train.evaluation.trained_model import load_trained_model

    trained = load_trained_model(run, best=best)
    found = trained.evaluate(manifest, classes)
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    for name, value in found.figures.items():
        chance = f"   chance {found.chance[name]:7.2%}" if name in found.chance else ""
        typer.echo(f"{name.replace('_', ' '):<22}{value:7.2%}{chance}")


@app.command()
def search(
    run: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.")],
    manifest: Annotated[str, typer.Argument(help="Pairs among whose images to search.")],
    queries: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What to look for.")],
    nearest: Annotated[int, typer.Option(min=1, metavar="N", help="Images for each text.")] = 5,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint, not the newest.")] = (
        False
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the images of a manifest that a trained model thinks nearest to a text.

    Example: flava-train search runs/flava_pmd manifests/coco.json "two dogs on a beach"
    """
    from flava_train.evaluation.search import search as find_images
    from flava_train.evaluation.trained_model import load_trained_model

    found = find_images(load_trained_model(run, best=best), manifest, queries, nearest)
    if as_json:
        rows = [
            {"query": query, "images": [asdict(hit) for hit in hits]}
            for query, hits in zip(queries, found, strict=True)
        ]
        typer.echo(json.dumps(rows))
        return
    for query, hits in zip(queries, found, strict=True):
        typer.echo(query)
        for hit in hits:
            typer.echo(f"  {hit.likeness:6.3f}  {hit.key}")


def _told_before(out: str | None) -> str:
    """The configuration that a run was given before, else the paper's."""
    if out is not None and (Path(out) / "config.toml").is_file():
        return str(Path(out) / "config.toml")
    return "flava_pmd"


def _explain(config: "TrainConfig", step: int) -> None:
    from flava_train.train import open_data

    if step >= config.steps:
        raise PmdError(f"--explain-step {step}: steps are 0 to {config.steps - 1}")
    streams = open_data(config)[1]
    typer.echo(f"step {step}: {streams.stream(step)}")
    for row in streams.rows(step):
        view = "" if row.view is None else f" view {row.view}"
        mismatch = "" if row.matched else " (another image's)"
        text = "" if row.text is None else f"  {row.text!r}"
        typer.echo(f"{row.source} {row.key}{view}{mismatch}{text}")


def main() -> None:
    """Run `flava-train`: exit 0 done or told to stop, 2 fix the input, 130 after Ctrl-C."""
    # before torch is loaded: threads that wait shall not hold the cores that load batches
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except PmdError as error:
        typer.echo(f"flava-train: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
