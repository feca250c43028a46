"""Commands on image codes: `pmd codes make`, `convert` and `export`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from pmd_pipeline.cli.app import app, interruptible, make_reporter, say
from pmd_pipeline.cli.options import ON_RAY, Quiet, RunOptions, expand_options

if TYPE_CHECKING:
    from typer._click import Context

    from pmd_pipeline.codes.tokenize import CodesResult


class Dtype(StrEnum):
    """Arithmetic of the tokenizer."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    """Where the tokenizer computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class _MakeByDefault(TyperGroup):
    """Reads `pmd codes MANIFEST` as `pmd codes make MANIFEST`."""

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
@expand_options()
def make(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST", help="The manifest; rewritten.")],
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|ID",
            help="Weights as safetensors: a file, a folder, or a hub id "
            "[default: fit k-means to the images].",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Of the hub's id, 40 hex digits.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="dalle, kmeans, or your own as module:function [default: that of the weights].",
        ),
    ] = None,
    vocabulary: Annotated[
        int, typer.Option(min=2, max=1 << 16, metavar="N", help="Codes of a k-means fitted here.")
    ] = 1024,
    grid: Annotated[
        int,
        typer.Option(
            min=1,
            max=128,
            metavar="N",
            help="Codes along each side: the model's patches along a side.",
        ),
    ] = 14,
    views: Annotated[
        int,
        typer.Option(
            min=1,
            max=1024,
            metavar="K",
            help="Crops per image: the whole, and K - 1 random boxes. An image with boxes has the "
            "whole, and one crop per caption.",
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of random crops, and of k-means.")] = 0,
    dtype: Annotated[
        Dtype, typer.Option(help="Arithmetic of the dVAE; agreement with float32 is measured.")
    ] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="Where the dVAE computes.")] = Device.auto,
    run: RunOptions = ON_RAY,
    quiet: Quiet = False,
) -> None:
    """Make codes beside every shard of a manifest; the same command resumes an interrupted run.

    Example: pmd codes make manifests/pmd.json --weights dvae.safetensors --views 4
    """
    from pmd_pipeline.codes.tokenize import CodesRequest, code_manifest

    request = CodesRequest(
        manifest=manifest,
        weights=weights,
        revision=revision,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        grid=grid,
        views=views,
        seed=seed,
        dtype=dtype.value,
        device=device.value,
        runner=run.runner.value,
        workers=run.workers,
        ray_address=run.ray_address,
    )
    with interruptible():
        result = code_manifest(request, make_reporter(quiet=quiet))
    if result.failures:
        for failure in result.failures:
            say(f"failed: {failure}; run the same command again")
        raise typer.Exit(1)
    if not quiet:
        for sentence in _remarks(result):
            say(sentence)
    typer.echo(f"{manifest}  {result.manifest.digest}")


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
    """Convert the weights of DALL-E's dVAE to safetensors, without executing the pickle.

    Example: pmd codes convert encoder.pkl dvae.safetensors
    """
    from pmd_pipeline.codes.tokenizers.dalle import convert_weights

    typer.echo(f"{out}  {convert_weights(weights, str(out))}")


@codes.command()
@expand_options()
def export(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST", help="A manifest with codes.")],
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Folder or fsspec address for the shards.")
    ],
    run: RunOptions = ON_RAY,
    quiet: Quiet = False,
) -> None:
    """Write the shards again with the codes inside, for other loaders.

    Example: pmd codes export manifests/pmd.json --out exported
    """
    from pmd_pipeline.publish import codes_export as exporting

    with interruptible(), run.open_pool() as pool:
        for task, sha256 in exporting.export(manifest, out, pool, make_reporter(quiet=quiet)):
            typer.echo(f"{task.out}  {sha256}")


def _remarks(result: "CodesResult") -> list[str]:
    """Sentences about the codes that were made."""
    rules = result.rules
    codes = f"{rules.grid} x {rules.grid} of {rules.vocabulary:,} codes by {rules.tokenizer}"
    weights = f", from {result.weights} (sha256 {rules.sha256[:12]})" if result.weights else ""
    remarks = [codes + weights]
    if rules.tokenizer == "kmeans":
        remarks.append(
            "k-means is a stand-in: its codes represent colours and edges, not objects; the paper "
            "uses DALL-E's dVAE (--weights)"
        )
    if result.agreement is not None:
        remarks.append(f"{result.agreement:.2%} of the codes of a sample are the same in float32")
    return remarks
