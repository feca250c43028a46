"""Commands on image codes: `pmd codes make`, `convert` and `export`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from pmd_pipeline.cli.app import (
    Quiet,
    RayAddress,
    Runner,
    RunnerOption,
    Workers,
    app,
    interruptible,
    make_reporter,
    say,
)
from pmd_pipeline.contract.errors import PmdError

if TYPE_CHECKING:
    from typer._click import Context

    from pmd_pipeline.codes.tokenize import Coded


class Tokenizer(StrEnum):
    """What makes codes."""

    dalle = "dalle"
    kmeans = "kmeans"


class Dtype(StrEnum):
    """What the dVAE computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    """Where the dVAE computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class _MakeByDefault(TyperGroup):
    """Takes `pmd codes MANIFEST` for `pmd codes make MANIFEST`."""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["make", *args]
        return super().parse_args(ctx, args)


codes = typer.Typer(cls=_MakeByDefault, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(codes, name="codes")


@codes.callback()
def about() -> None:
    """Make the image codes that FLAVA predicts, beside the shards; convert weights; export.

    Example: pmd codes manifests/pmd.json --weights dvae.safetensors
    """


@codes.command()
def make(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST", help="It is written again.")],
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ID",
            help="Weights as safetensors: a file, a folder, or an id of the hub "
            "[default: fit k-means to the images, a stand-in].",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Of the hub's id, 40 hex digits.")
    ] = None,
    tokenizer: Annotated[
        Tokenizer | None, typer.Option(help="Insist on this one [default: what the weights are].")
    ] = None,
    vocabulary: Annotated[
        int, typer.Option(min=2, max=1 << 16, metavar="N", help="Codes of a k-means fitted here.")
    ] = 1024,
    grid: Annotated[
        int,
        typer.Option(
            min=1, max=128, metavar="N", help="Codes along each side, as the model has patches."
        ),
    ] = 14,
    views: Annotated[
        int,
        typer.Option(
            min=1,
            max=1024,
            metavar="K",
            help="Views of an image: the whole, and K - 1 drawn boxes. An image with boxes has the "
            "whole, and one for each caption.",
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn views, and of k-means.")] = 0,
    dtype: Annotated[
        Dtype, typer.Option(help="What the dVAE computes in; agreement with float32 is measured.")
    ] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="Where the dVAE computes.")] = Device.auto,
    runner: RunnerOption = Runner.ray,
    workers: Workers = None,
    ray_address: RayAddress = None,
    quiet: Quiet = False,
) -> None:
    """Make codes beside every shard of a manifest; interrupted, the same command goes on.

    Example: pmd codes make manifests/pmd.json --weights dvae.safetensors --views 4
    """
    from pmd_pipeline.codes.tokenize import CodesRequest, code_manifest

    if tokenizer is Tokenizer.dalle and weights is None:
        raise PmdError(
            "DALL-E's dVAE needs its weights: give --weights FILE; `pmd codes convert` makes one "
            "of OpenAI's encoder.pkl"
        )
    request = CodesRequest(
        manifest=manifest,
        weights=weights,
        revision=revision,
        tokenizer=tokenizer.value if tokenizer else None,
        vocabulary=vocabulary,
        grid=grid,
        views=views,
        seed=seed,
        dtype=dtype.value,
        device=device.value,
        runner=runner.value,
        workers=workers,
        ray_address=ray_address,
    )
    with interruptible():
        coded = code_manifest(request, make_reporter(quiet=quiet))
    if coded.failures:
        for failure in coded.failures:
            say(f"failed: {failure}; run the same command again")
        raise typer.Exit(1)
    if not quiet:
        for sentence in _remarks(coded):
            say(sentence)
    typer.echo(f"{manifest}  {coded.manifest.digest}")


@codes.command()
def convert(
    weights: Annotated[
        str,
        typer.Argument(
            metavar="PICKLE", help="OpenAI's encoder.pkl, a pytorch_model.bin, or safetensors."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The safetensors file to write.")],
) -> None:
    """Convert the weights of DALL-E's dVAE to safetensors, running nothing that a pickle asks for.

    Example: pmd codes convert encoder.pkl dvae.safetensors
    """
    from pmd_pipeline.codes.tokenize import convert_weights

    typer.echo(f"{out}  {convert_weights(weights, str(out))}")


@codes.command()
def export(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST", help="A manifest with codes.")],
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Folder or fsspec address for the shards.")
    ],
    runner: RunnerOption = Runner.ray,
    workers: Workers = None,
    ray_address: RayAddress = None,
    quiet: Quiet = False,
) -> None:
    """Write the shards again with codes inside, for loaders of other people.

    Example: pmd codes export manifests/pmd.json --out exported
    """
    from pmd_pipeline.base.parallel import open_pool
    from pmd_pipeline.publish import codes_export as exporting

    with interruptible(), open_pool(runner.value, workers, ray_address) as pool:
        for task, sha256 in exporting.export(manifest, out, pool, make_reporter(quiet=quiet)):
            typer.echo(f"{task.out}  {sha256}")


def _remarks(coded: "Coded") -> list[str]:
    """What a user should know of the codes that are there."""
    rules = coded.rules
    side, name = rules.grid, f"{coded.weights} (sha256 {rules.sha256[:12]})"
    found = [f"{side} x {side} of {rules.vocabulary:,} codes by {rules.tokenizer}, from {name}"]
    if rules.tokenizer == "kmeans":
        found.append(
            "k-means is a stand-in: it knows colours and edges, not things; the paper's codes are "
            "DALL-E's (--weights)"
        )
    if coded.agreement is not None:
        found.append(f"{coded.agreement:.2%} of the codes of a sample are float32's too")
    return found
