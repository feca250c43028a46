"""Options that several commands share, each declared once, and `expand_options`, which adds them.

A command takes a parameter whose default is an instance of one of the dataclasses below. Typer
reads options from the signature, so the decorator puts one parameter per field in its place.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from pmd_pipeline.base.parallel import Pool
    from pmd_pipeline.dataset.build import BuildRequest


class Runner(StrEnum):
    """Where tasks run."""

    ray = "ray"
    local = "local"


Sources = Annotated[
    list[str] | None,
    typer.Option("--source", "-s", metavar="NAME", help="A source; may be repeated."),
]
All = Annotated[bool, typer.Option("--all", help="All nine sources of PMD, by recipes/pmd.toml.")]
Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", metavar="FILE", help="A recipe file of your own; may be repeated."),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Build only N records of each source, an unbiased sample."
    ),
]
Out = Annotated[
    str, typer.Option("--out", metavar="DIR", help="Folder or fsspec address for index and shards.")
]
Manifests = Annotated[str, typer.Option(metavar="DIR", help="Folder for manifests.")]
Raw = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder of annotation files [default: OUT/raw/SOURCE]."),
]
Images = Annotated[
    list[str] | None,
    typer.Option(
        "--images",
        metavar="PLACE",
        help="Where to get images: web, a folder, a zip, a tar, or img2dataset's output folder; "
        "may be repeated, in order of preference [default: web].",
    ),
]
RunnerOption = Annotated[Runner, typer.Option(help="Run tasks on Ray or in local processes.")]
Workers = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tasks in parallel [default: all cores].")
]
RayAddress = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Join this Ray cluster (auto: one on this machine)."),
]
Contact = Annotated[
    str,
    typer.Option(metavar="TEXT", help="Mail or web address for the User-Agent of all requests."),
]
OptOut = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="List of images to leave out, now and in later builds: addresses, sha256s, keys, "
        "source:ID, flickr:ID or host:NAME. Only shards with these images are built again.",
    ),
]
Licences = Annotated[
    list[str] | None,
    typer.Option(
        "--licence-allow",
        metavar="GLOB",
        help="Keep only images whose stated licence matches, ignoring case; may be repeated.",
    ),
]
TextTokenizer = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="vocab.txt or tokenizer.json, to pack sources of texts."),
]
LidModel = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="lid.176.bin or lid.176.ftz [default: the packaged .ftz]."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@dataclass(frozen=True)
class RunOptions:
    """Where tasks run, and how many at a time."""

    runner: RunnerOption = Runner.ray
    workers: Workers = None
    ray_address: RayAddress = None

    @contextmanager
    def open_pool(self) -> Iterator["Pool"]:
        """The pool of workers."""
        from pmd_pipeline.base.parallel import open_pool

        with open_pool(self.runner.value, self.workers, self.ray_address) as pool:
            yield pool


ON_RAY = RunOptions()
ON_PROCESSES = RunOptions(runner=Runner.local)


@dataclass(frozen=True)
class BuildOptions:
    """Sources to build, their files, and changes to their recipes."""

    source: Sources = None
    all_: All = False
    recipe: Recipes = None
    limit: Limit = None
    out: Out = "data"
    manifests: Manifests = "manifests"
    raw: Raw = None
    images: Images = None
    run: RunOptions = ON_RAY
    contact: Contact = ""
    optout: OptOut = None
    licence_allow: Licences = None
    tokenizer: TextTokenizer = None
    lid_model: LidModel = None
    quiet: Quiet = False

    def build_request(self, retry_reasons: frozenset[str] = frozenset()) -> "BuildRequest":
        """The request of a build; `retry_reasons` are failures to retry."""
        from pmd_pipeline.dataset.build import BuildRequest

        return BuildRequest(
            recipes=(
                *(self.source or ()),
                *(self.recipe or ()),
                *(("pmd",) if self.all_ else ()),
            ),
            out=self.out,
            manifests=self.manifests,
            raw=self.raw,
            images=tuple(self.images or ("web",)),
            limit=self.limit,
            changes={
                "fetch": {"contact": self.contact} if self.contact else {},
                "images": {"licences": self.licence_allow} if self.licence_allow else {},
                "texts": {"tokenizer": self.tokenizer} if self.tokenizer else {},
            },
            optout=self.optout,
            retry_reasons=retry_reasons,
            runner=self.run.runner.value,
            workers=self.run.workers,
            ray_address=self.run.ray_address,
        )


BUILD_DEFAULTS = BuildOptions()


def expand_options(
    *, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace each parameter whose default is a dataclass by one keyword parameter for each field.

    The values of that default are the defaults of the options. Fields that hold a dataclass are
    expanded too.

    Args:
        without: fields that are no options of the command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        signature = inspect.signature(command)
        groups = {
            name: parameter.default
            for name, parameter in signature.parameters.items()
            if is_dataclass(parameter.default)
        }
        parameters: list[inspect.Parameter] = []
        for name, parameter in signature.parameters.items():
            if name in groups:
                parameters += _parameters(groups[name], without)
            else:
                keyword = inspect.Parameter.KEYWORD_ONLY
                parameters.append(parameter.replace(annotation=hints[name], kind=keyword))

        @wraps(command)
        def expanded(**values: Any) -> None:  # noqa: ANN401 - as many types as options
            ungrouped = {name: values[name] for name in signature.parameters if name not in groups}
            command(**ungrouped, **{name: _with(one, values) for name, one in groups.items()})

        vars(expanded)["__signature__"] = signature.replace(parameters=parameters)
        return expanded

    return decorate


def _parameters(options: Any, without: Collection[str]) -> Iterator[inspect.Parameter]:  # noqa: ANN401 - any dataclass
    hints = get_type_hints(type(options), include_extras=True)
    for name in (one.name for one in fields(options)):
        default, keyword = getattr(options, name), inspect.Parameter.KEYWORD_ONLY
        if is_dataclass(default):
            yield from _parameters(default, without)
        elif name not in without:
            yield inspect.Parameter(name, keyword, default=default, annotation=hints[name])


def _with(options: Any, values: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any dataclass
    """The options with those of `values` that are fields of theirs."""
    changes = {}
    for name in (one.name for one in fields(options)):
        default = getattr(options, name)
        changes[name] = (
            _with(default, values) if is_dataclass(default) else values.get(name, default)
        )
    return replace(options, **changes)
