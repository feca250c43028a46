"""The command `flava-train`: parses, calls one function, prints."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flava_train.errors import FlavaError

app = typer.Typer(
    help="FLAVA: look at the model, at published weights, and at the shards to train it from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def shards(
    manifest: Annotated[
        Path, typer.Option("--shards", metavar="MANIFEST", help="A manifest of `pmd build`.")
    ] = Path("manifests/pmd.json"),
) -> None:
    """Check that a manifest is unchanged and that all of its shards are there.

    Example: flava-train shards --shards manifests/pmd.json
    """
    from flava_train.shards import stock

    loaded, found = stock(manifest)
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

    from flava_train.hf import load_hf
    from flava_train.model import Flava, FlavaConfig

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


def main() -> None:
    """Run `flava-train`: exit 0 done, 2 fix the input."""
    try:
        app()
    except FlavaError as error:
        typer.echo(f"flava-train: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
