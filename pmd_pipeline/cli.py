"""The command `pmd`: parses, calls one function, prints. Results on stdout, talk on stderr."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pmd_pipeline.errors import PmdError

if TYPE_CHECKING:
    from pmd_pipeline.dataset import Built
    from pmd_pipeline.progress import Show

app = typer.Typer(
    help="Rebuild the Public Multimodal Datasets: nine sources to shards, manifest, statistics.\n\n"
    "Example: pmd quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
_err = Console(stderr=True, emoji=False)


class Runner(StrEnum):
    """Where tasks run."""

    ray = "ray"
    local = "local"


class Form(StrEnum):
    """How statistics are printed."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"


Out = Annotated[
    str, typer.Option("--out", metavar="DIR", help="Folder or fsspec address for index and shards.")
]
Manifests = Annotated[str, typer.Option(metavar="DIR", help="Folder for manifests.")]
RunnerOption = Annotated[Runner, typer.Option(help="Run tasks on Ray, or on local processes.")]
Workers = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tasks at a time; default: all cores.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Join this Ray cluster (auto: the one of this machine)."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@app.command()
def sources(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Only this source, with all it publishes."),
    ] = None,
) -> None:
    """List the nine sources: pairs, licence, where files come from, what to get by hand.

    Example: pmd sources wit
    """
    from pmd_pipeline import listing

    for paragraph in (
        [listing.one_source(name, _out.width)] if name else listing.all_sources(_out.width)
    ):
        typer.echo(paragraph + "\n")


@app.command()
def build(
    source: Annotated[
        list[str] | None,
        typer.Option("--source", "-s", metavar="NAME", help="A source; may be repeated."),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="All nine, as recipes/pmd.toml says.")
    ] = False,
    recipe: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A recipe file of your own; may be repeated."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Only so many records of each source, an unbiased sample."
        ),
    ] = None,
    out: Out = "data",
    manifests: Manifests = "manifests",
    raw: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder of annotation files you have [default: OUT/raw/SOURCE]."
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLACE",
            help="Where images are: web, a folder, a zip, a tar, or img2dataset's output folder; "
            "may be repeated, in order of preference [default: web].",
        ),
    ] = None,
    runner: RunnerOption = Runner.ray,
    workers: Workers = None,
    ray_address: RayAddress = None,
    contact: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="Mail or web address told to every host in the User-Agent."
        ),
    ] = "",
    lid_model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="lid.176.bin or lid.176.ftz [default: the packaged .ftz]."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Build sources to shards and manifests; interrupted, the same command goes on.

    Example: pmd build --source yfcc100m --limit 10000
    """
    from pmd_pipeline.dataset import Request, build_all
    from pmd_pipeline.filters import caption

    if lid_model:
        caption.use_lid_model(lid_model)  # says what is wrong with it before anything is done
    request = Request(
        recipes=(*(source or ()), *(recipe or ()), *(("pmd",) if all_ else ())),
        out=out,
        manifests=manifests,
        raw=raw,
        images=tuple(images or ("web",)),
        limit=limit,
        changes={"fetch": {"contact": contact}} if contact else {},
        runner=runner.value,
        workers=workers,
        ray_address=ray_address,
    )
    with _interruptible():
        built = build_all(request, _show(quiet=quiet))
    for path, manifest in built.manifests:
        typer.echo(f"{path}  {manifest.digest}")
    _fail_if_parts_failed(built)


@app.command()
def stats(
    manifest: Annotated[
        str, typer.Argument(metavar="[MANIFEST]", help="A manifest.")
    ] = "manifests/pmd.json",
    form: Annotated[Form, typer.Option("--format", help="How to print.")] = Form.table,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Also write histograms of text lengths to this PNG."),
    ] = None,
) -> None:
    """Show text lengths and counts per dataset, beside the paper's.

    Example: pmd stats manifests/pmd.json --plot lengths.png
    """
    from pmd_pipeline import stats as statistics
    from pmd_pipeline.manifest import load_manifest

    loaded = load_manifest(manifest)
    rows = statistics.lengths(loaded)
    if plot:
        statistics.plot(rows, loaded, plot)
        _say(f"wrote {plot}")
    for remark in statistics.remarks(loaded):
        _say(remark)
    if form is Form.table:
        for table in statistics.as_table(rows, loaded):
            _out.print(table)
    elif form is Form.json:
        typer.echo(statistics.as_json(rows, loaded))
    elif form is Form.csv:
        typer.echo(statistics.as_csv(rows))
    else:
        typer.echo(statistics.as_markdown(rows))


@app.command()
def merge(
    manifests: Annotated[
        list[str], typer.Argument(metavar="MANIFEST", help="Manifests of different sources.")
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="The manifest to write.")
    ] = "manifests/pmd.json",
) -> None:
    """Make one manifest of several.

    Example: pmd merge manifests/coco.json manifests/sbu.json --out manifests/two.json
    """
    from pmd_pipeline.manifest import load_manifest, merged, save_manifest

    found = merged(Path(out).stem, out, [(path, load_manifest(path)) for path in manifests])
    save_manifest(out, found)
    typer.echo(f"{out}  {found.digest}")


@app.command()
def show(
    key_or_shard: Annotated[
        str, typer.Argument(metavar="KEY|SHARD", help="A sample's key, or the path of a shard.")
    ],
    out: Out = "data",
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the stored JPEG here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell the whole story of a sample, from the upstream row to the bytes; or what a shard holds.

    Example: pmd show 64c23fe1967b35c0
    """
    from pmd_pipeline import story
    from pmd_pipeline.storage import write_whole

    if key_or_shard.endswith(".tar"):
        chapters = story.shard_story(key_or_shard)
    else:
        chapters = story.sample_story(out, key_or_shard)
    if image:
        write_whole(str(image), story.sample_image(chapters))
        _say(f"wrote {image}")
    if as_json:
        typer.echo(
            json.dumps([{"title": c.title, **c.facts} for c in chapters], ensure_ascii=False)
        )
        return
    for chapter in chapters:
        typer.secho(chapter.title, bold=True)
        for name, value in chapter.facts.items():
            typer.echo(f"  {name}: {_plain(value)}")


@app.command()
def quickstart(
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="Folder for everything.")
    ] = "quickstart",
    scenes: Annotated[int, typer.Option(min=40, metavar="N", help="Scenes per source.")] = 240,
    runner: RunnerOption = Runner.ray,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Build all nine sources from a sample world, drawn and served on this machine.

    Example: pmd quickstart --out quickstart
    """
    from pmd_pipeline import stats as statistics
    from pmd_pipeline.quickstart import run

    with _interruptible():
        built = run(Path(out), scenes, runner.value, workers, _show(quiet=quiet))
    path, manifest = built.manifests[-1]
    for table in statistics.as_table(statistics.lengths(manifest), manifest):
        _out.print(table)
    typer.echo(f"{path}  {manifest.digest}")
    _fail_if_parts_failed(built)


def main() -> None:
    """Run `pmd`: exit 0 done, 1 some parts failed, 2 fix the input, 130 interrupted."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s"
    )
    try:
        app(prog_name="pmd")
    except PmdError as error:
        _say(f"pmd: {error}")
        sys.exit(2)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _say("stopped; the same command goes on from here")
        raise typer.Exit(130) from None


def _fail_if_parts_failed(built: "Built") -> None:
    for failure in built.failures:
        _say(f"failed: {failure}; run the same command again")
    if built.failures:
        raise typer.Exit(1)


def _say(words: str) -> None:
    _err.print(words, markup=False, highlight=False, soft_wrap=True)


def _show(*, quiet: bool) -> "Show":
    from pmd_pipeline.progress import Show

    return Show(_err, quiet=quiet)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


if __name__ == "__main__":
    main()
