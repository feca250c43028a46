"""The command `flava-train`: each command parses, calls one function and prints."""

import json
import os
import signal
import sys
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
            "--shards",
            metavar="MANIFEST",
            help="Manifest of the pairs to train on, as `pmd build` writes it.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Configuration; default: that of the run in --out, or flava_pmd.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the run; default: runs/NAME.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a value, such as optimizer.lr=3e-4."
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH", help="Resume from the newest checkpoint, none, or this one."
        ),
    ] = "auto",
    allow_changed_data: Annotated[
        bool,
        typer.Option(
            "--allow-changed-data", help="Resume even if the remaining steps would see other data."
        ),
    ] = False,
    explain_step: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Print the samples of step N and exit."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Train FLAVA. After a stop or a kill, the same command resumes the run.

    Example: flava-train --shards manifests/pmd.json --config flava_mm --set micro_batch_size=128
    """
    if context.invoked_subcommand:
        return
    from flava_train.config import load_config

    changes = {"data.pairs": manifest, "out": out}
    given = {key: value for key, value in changes.items() if value is not None}
    loaded = load_config(config or _default_config(out), given, settings=setting or [])
    if explain_step is not None:
        _explain_step(loaded, explain_step)
        return
    from flava_train.train import train as run

    outcome = run(loaded, resume=resume, allow_changed_data=allow_changed_data, quiet=quiet)
    if outcome.signal is None:
        typer.echo(f"{loaded.out}: {outcome.steps:,} steps taken")
        return
    typer.echo(
        f"{loaded.out}: stopped after {outcome.steps:,} steps; run the same command to resume",
        err=True,
    )
    raise typer.Exit(130 if outcome.signal == signal.SIGINT else 0)


@app.command()
def shards(
    manifest: Annotated[
        Path, typer.Option("--shards", metavar="MANIFEST", help="A manifest of `pmd build`.")
    ] = Path("manifests/pmd.json"),
) -> None:
    """Check that a manifest is unchanged and that all of its shards exist.

    Example: flava-train shards --shards manifests/pmd.json
    """
    from flava_train.data.manifests import check_manifest

    loaded, sources = check_manifest(manifest)
    for one in sources:
        typer.echo(
            f"{one.source:<22}{one.pairs:>14,} pairs {one.images:>14,} images "
            f"{one.shards:>7,} shards {one.num_bytes / 2**30:>10.2f} GiB"
        )
    typer.echo(f"{manifest}  {loaded.digest}")


@app.command()
def model(
    weights: Annotated[
        str | None,
        typer.Argument(help="Folder or hub id of a FlavaForPreTraining."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Commit on the hub, 40 hex digits.")
    ] = None,
) -> None:
    """Count the parameters of FLAVA's modules, as published or in the given weights.

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
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.")],
    hf: Annotated[
        Path, typer.Option("--hf", metavar="DIR", help="Folder to write; it must not exist.")
    ],
    best: Annotated[
        bool, typer.Option("--best", help="Use the best checkpoint, not the newest.")
    ] = (False),
) -> None:
    """Export a model and its tokenizer to a folder that transformers loads.

    Example: flava-train export --hf flava-hf runs/flava_pmd
    """
    from flava_train.evaluation.trained_model import load_trained_model
    from flava_train.model.hf import export_hf, untrained_heads

    trained = load_trained_model(run, best=best)
    export_hf(trained.model, hf, vocabulary=trained.wordpiece.vocabulary)
    typer.echo(f"{hf}: the model of {trained.checkpoint}")
    if untrained := untrained_heads(trained.model):
        typer.echo(f"{hf}: no loss trained the heads {', '.join(untrained)}", err=True)


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.")],
    manifest: Annotated[
        str | None, typer.Argument(help="Manifest of held-out pairs; default: that of the run.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder with one folder of images per class.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Use the best checkpoint, not the newest.")
    ] = (False),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure zero-shot retrieval and classification, and print chance level beside them.

    Example: flava-train eval runs/flava_pmd manifests/flickr30k.json
    """
    from flava_train.evaluation.trained_model import load_trained_model

    trained = load_trained_model(run, best=best)
    result = trained.evaluate(manifest, classes)
    if as_json:
        typer.echo(json.dumps(result.as_json()))
        return
    for name, value in result.metrics.items():
        chance = f"   chance {result.chance[name]:7.2%}" if name in result.chance else ""
        typer.echo(f"{name.replace('_', ' '):<22}{value:7.2%}{chance}")


@app.command()
def search(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.")],
    manifest: Annotated[str, typer.Argument(help="Manifest of the pairs to search.")],
    queries: Annotated[list[str], typer.Argument(metavar="TEXT...", help="One query each.")],
    nearest: Annotated[int, typer.Option(min=1, metavar="N", help="Images for each query.")] = 5,
    best: Annotated[
        bool, typer.Option("--best", help="Use the best checkpoint, not the newest.")
    ] = (False),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the images of a manifest that are most similar to a text, by a trained model.

    Example: flava-train search runs/flava_pmd manifests/coco.json "two dogs on a beach"
    """
    from flava_train.evaluation.search import search as search_images
    from flava_train.evaluation.trained_model import load_trained_model

    hits = search_images(load_trained_model(run, best=best), manifest, queries, nearest)
    if as_json:
        rows = [
            {
                "query": query,
                "images": [{"key": hit.key, "likeness": hit.similarity} for hit in of_query],
            }
            for query, of_query in zip(queries, hits, strict=True)
        ]
        typer.echo(json.dumps(rows))
        return
    for query, of_query in zip(queries, hits, strict=True):
        typer.echo(query)
        for hit in of_query:
            typer.echo(f"  {hit.similarity:6.3f}  {hit.key}")


def _default_config(out: str | None) -> str:
    """The saved configuration of the run in `out`, or the paper's."""
    if out is not None and (Path(out) / "config.toml").is_file():
        return str(Path(out) / "config.toml")
    return "flava_pmd"


def _explain_step(config: "TrainConfig", step: int) -> None:
    from flava_train.train import open_data

    if step >= config.steps:
        raise PmdError(f"--explain-step {step}: steps are 0 to {config.steps - 1}")
    data = open_data(config)[1]
    typer.echo(f"step {step}: {data.stream(step)}")
    for slot in data.describe(step):
        crop = "" if slot.crop is None else f" view {slot.crop}"
        mismatch = "" if slot.matched else " (another image's)"
        text = "" if slot.text is None else f"  {slot.text!r}"
        typer.echo(f"{slot.source} {slot.key}{crop}{mismatch}{text}")


def main() -> None:
    """Run `flava-train`. Exit codes: 0 done or stopped by SIGTERM, 2 wrong input, 130 Ctrl-C."""
    # before torch is loaded: waiting threads must not occupy the cores of the loader processes
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except PmdError as error:
        typer.echo(f"flava-train: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
