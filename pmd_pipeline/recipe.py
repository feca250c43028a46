"""Recipes: TOML files with the rules of one source or several, validated before a build begins."""

import inspect
import json
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PydanticUserError,
    ValidationError,
    create_model,
)

from pmd_pipeline import sources
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.image_format import FormatName
from pmd_pipeline.contract.models import Kind
from pmd_pipeline.contract.names import FileName, Sha256
from pmd_pipeline.contract.plugins import (
    check_digest,
    failure,
    is_reference,
    load_reference,
    source_digest,
)
from pmd_pipeline.contract.suggestions import suggestion
from pmd_pipeline.filters import caption as caption_filters
from pmd_pipeline.filters import image as image_filters
from pmd_pipeline.filters import pixels as pixel_filters
from pmd_pipeline.sources import Source

Signal: TypeAlias = Literal["robots", "tdm", "x-robots-tag"]
SIGNALS: tuple[Signal, ...] = get_args(Signal)
"""Signals by which a publisher asks that an image is not kept."""

_Name = TypeVar("_Name", bound=str)

_ORDERED_TABLES = {"filters", "pixel_filters"}
"""Tables whose order matters, so a change replaces the whole table."""

Arguments = dict[str, Any]
"""Arguments of a filter or of a source's `read`, validated against its signature."""

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
"""A value of another type is an error; `"256"` or `95.0` is not converted."""


def _added_key(default: object) -> Any:  # noqa: ANN401 - as pydantic's Field
    """A key that is left out of the rules at its default.

    So a new key does not change the digests of recipes without it.
    """
    return Field(default=default, exclude_if=lambda value: value == default)


class RecipeError(PmdError):
    """A recipe is invalid; the message states where, and what would be valid."""


class _Section(BaseModel):
    model_config = _STRICT


Filters: TypeAlias = dict[str, Arguments]
"""Arguments of each filter, in order; a filter is a name of the package or `module:function`."""

FileDigests: TypeAlias = dict[str, Sha256]
"""SHA-256 of the source file of each filter from outside the package. Another file is refused. A
missing digest is filled in, so that the rules of a dataset identify the version of each filter."""


class Clean(_Section):
    """Optional cleaning of captions before the filters; the paper does none of it.

    Args:
        entities: replace `&amp;` by `&`.
        html: remove tags; `<3`, `a < b` and `<PERSON>` stay.
        urls: remove addresses.
        camera_names: a text that is only a camera's file name (`IMG_1234.JPG`) becomes empty.
    """

    entities: bool = False
    html: bool = False
    urls: bool = False
    camera_names: bool = False


class Captions(_Section):
    """Which candidates of a row become pairs.

    Args:
        choose: `all` makes a pair of each candidate; `first` makes one pair of a row, of the first
            candidate that passes the filters.
        filters: see `Filters`; names are those of `filters/caption.py`.
        filters_sha256: see `FileDigests`.
        clean: see `Clean`.
        drop_repeats: drop a pair whose caption and box its record already has.
    """

    choose: Literal["all", "first"] = "all"
    filters: Filters = Field(default_factory=dict)
    filters_sha256: FileDigests = _added_key({})
    clean: Clean = Clean()
    drop_repeats: bool = False


def _sorted_set(names: list[_Name]) -> list[_Name]:
    return sorted(set(names))  # no digest may depend on their order


class Images(_Section):
    """How fetched images are filtered and stored.

    Args:
        size: pixels of the side that `mode` names; smaller images are not enlarged.
        mode: `shorter` or `longer` side, or `none` to keep the size.
        format: of the stored images.
        quality: of the JPEG or the lossy WebP, 1 to 100.
        fast: decode larger JPEGs at a reduced scale; saves up to a third of the time, and costs up
            to about 1 dB.
        max_bytes: larger bodies are not fetched (`too_large`).
        max_pixels: larger images are not decoded (`bomb`).
        respect: publishers' signals for which an image is left out: `robots` (robots.txt),
            `x-robots-tag`, `tdm` (TDM-Reservation). They decide what is kept, so they are not in
            `[fetch]`. Local images have no signals.
        licences: globs; the licence that upstream states for an image must match one of them.
            Empty allows all images, and those without a licence.
        filters: see `Filters`; names are those of `filters/image.py`.
        pixel_filters: likewise, of `filters/pixels.py`; they run on the resized pixels.
        filters_sha256: see `FileDigests`; for both.
    """

    size: Annotated[int, Field(ge=16, le=8192)] = 256
    mode: Literal["shorter", "longer", "none"] = "shorter"
    format: FormatName = _added_key("jpeg")
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    fast: bool = False
    max_bytes: Annotated[int, Field(ge=1)] = 64 << 20
    max_pixels: Annotated[int, Field(ge=1)] = 128_000_000
    respect: Annotated[list[Signal], AfterValidator(_sorted_set)] = sorted(SIGNALS)
    licences: Annotated[list[str], AfterValidator(_sorted_set)] = Field(default_factory=list)
    filters: Filters = Field(default_factory=dict)
    pixel_filters: Filters = _added_key({})
    filters_sha256: FileDigests = _added_key({})


class Fetch(_Section):
    """How images are requested. No digest covers this section, because it does not shape data.

    Args:
        contact: mail or web address for the User-Agent, for operators of hosts.
        concurrency: most requests in flight in each task; fewer while bodies are large.
        per_host: most requests in flight to one host in each task; fewer while it is busy.
        delay: host (`*.example` for its subdomains) to the least seconds between requests to it,
            in each task; not for a host in `connect_to`.
        timeout: seconds for one address, including the bodies of all attempts.
        least_rate: bytes per second; a response that is slower for 15 seconds is ended.
        retries: further attempts after a transient failure.
        connect_to: host (`*.example` for its subdomains) to the `address:port` to connect to
            instead, as curl's option of that name; it may be on a private network.
    """

    contact: str = ""
    concurrency: Annotated[int, Field(ge=1, le=4096)] = 256
    per_host: Annotated[int, Field(ge=1, le=1024)] = 8
    delay: dict[str, Annotated[float, Field(ge=0, le=60)]] = Field(default_factory=dict)
    timeout: Annotated[float, Field(gt=0)] = 30.0
    least_rate: Annotated[int, Field(ge=0)] = 1000
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    connect_to: dict[str, str] = Field(default_factory=dict)


class Expected(_Section):
    """Published figures, for `pmd plan` without a probe; no digest covers this section.

    Args:
        records: images of the source, after its filters.
        pairs: pairs of these images.
        alive: share of the images that could be fetched.
        seen: origin and date of `alive`.
        image_bytes: mean size of an image on the web.
        pixels: mean number of its pixels.
        stored_bytes: mean size of a stored image.
    """

    records: Annotated[int, Field(ge=1)]
    pairs: Annotated[int, Field(ge=1)]
    alive: Annotated[float, Field(gt=0, le=1)]
    seen: str
    image_bytes: Annotated[int, Field(ge=1)]
    pixels: Annotated[int, Field(ge=1)]
    stored_bytes: Annotated[int, Field(ge=1)]


class Texts(_Section):
    """How documents become sequences, for sources of texts.

    Args:
        tokenizer: the `vocab.txt` or `tokenizer.json` whose tokens are counted.
        sha256: of its vocabulary; another one is refused. Filled in if empty.
        tokens: most tokens in a sequence, with one [CLS] and a [SEP] after each document.
        dataset: folder, or id on the hub, of a dataset to read with the library `datasets`, instead
            of files in the source's folder.
        config: the dataset's configuration, if it has several.
        revision: the dataset's commit on the hub.
        split: of the dataset.
    """

    tokenizer: str = ""
    sha256: str = ""
    tokens: Annotated[int, Field(ge=128, le=8192)] = 512
    dataset: str = ""
    config: str = ""
    revision: str = ""
    split: str = "train"


class Recipe(_Section):
    """The rules of one source.

    Args:
        source: name of a source of the package, or any other name for the source of `module`. It
            names folders, and is part of every key.
        module: module of a source from outside the package, as Python imports it.
        module_sha256: of its file; another one is refused. Filled in if missing.
        form: the form of the annotation files to read; None takes the first complete one.
        options: arguments of the source's `read`.
        part_records: approximate number of records in a part.
        expected: see `Expected`.
    """

    source: FileName
    module: str | None = _added_key(None)
    module_sha256: Sha256 | None = _added_key(None)
    form: str | None = None
    options: Arguments = Field(default_factory=dict)
    captions: Captions = Captions()
    images: Images = Images()
    fetch: Fetch = Fetch()
    texts: Texts = Texts()
    part_records: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    expected: Expected | None = None

    @property
    def kind(self) -> Kind:
        """What the source has: pairs, images alone, or texts alone."""
        return self.load_source().info.kind

    def load_source(self) -> Source:
        """The source.

        Raises:
            PmdError: it does not exist, or `module_sha256` is another.
        """
        return sources.load(self.source, self.module, self.module_sha256)

    def index_rules(self) -> dict[str, Any]:
        """The keys that shape the index."""
        return self.model_dump(mode="json", exclude={"images", "fetch", "texts", "expected"})

    def shard_rules(self) -> dict[str, Any]:
        """The keys that shape the shards of a given index."""
        if self.kind == "text":
            return {"texts": self.texts.model_dump(mode="json", exclude={"tokenizer"})}
        return {"images": self.images.model_dump(mode="json")}

    def rules(self) -> dict[str, Any]:
        """The keys that shape data, as the manifest holds them."""
        return {**self.index_rules(), **self.shard_rules()}


def load_recipe(name_or_path: str, changes: Mapping[str, Any] | None = None) -> list[Recipe]:
    """The validated recipes of a name (`yfcc100m`, `pmd`) or a TOML file.

    A file with `include = [...]` gives the recipes that it names, each changed by the file's other
    sections; paths in it are relative to the file. `changes` are merged into each recipe last.

    Raises:
        RecipeError: there is no such recipe, it is not TOML, or it has an unknown key, filter or
            argument, or a value out of range.
    """
    path = _recipe_path(name_or_path)
    content = _read_toml(path)
    if "include" not in content:
        return [_validated(path, _merge(content, changes or {}))]
    included, rest = content["include"], {k: v for k, v in content.items() if k != "include"}
    if not (included and isinstance(included, list) and all(isinstance(n, str) for n in included)):
        raise RecipeError(f"{path}: include must be a list of recipe names")
    if "source" in rest:
        raise RecipeError(f"{path}: include and source exclude each other; the included have one")
    paths = [_recipe_path(name, path.parent) for name in included]
    recipes = [
        _validated(one if not rest else path, _merge(_merge(_read_toml(one), rest), changes or {}))
        for one in paths
    ]
    if twice := [name for name, count in Counter(r.source for r in recipes).items() if count > 1]:
        raise RecipeError(f"{path}: include gives two recipes for {twice[0]}; leave one out")
    return recipes


def recipe_names() -> list[str]:
    """Names of the package's recipes, without the configurations of `flava_train`."""
    names = (path.stem for path in recipe_folder().glob("*.toml"))
    return sorted(name for name in names if not name.startswith("flava_"))


def recipe_folder() -> Path:
    """The folder of the recipes: inside an installed package, or beside it in a checkout."""
    packed = Path(__file__).parent / "_recipes"
    return packed if packed.is_dir() else Path(__file__).parent.parent / "recipes"


def predicates(
    module: ModuleType, filters: Filters, digests: Mapping[str, str]
) -> dict[str, Callable[..., bool]]:
    """The filters by name, in order, with their arguments bound.

    Args:
        module: the package's filters of this kind.
        digests: see `FileDigests`.

    Raises:
        PmdError: a filter does not exist, its arguments are invalid, or its file has another
            SHA-256.
    """
    bound: dict[str, Callable[..., bool]] = {}
    for name, arguments in filters.items():
        if is_reference(name):
            check_digest(name, digests.get(name))
        bound[name] = predicate(module, name, arguments)
    return bound


def predicate(module: ModuleType, name: str, arguments: Mapping[str, Any]) -> Callable[..., bool]:
    """The filter `name`, of `module` or `module:function`, with its arguments bound.

    Raises:
        RecipeError: there is no such filter, or an argument is invalid.
        PmdError: the user's module cannot be imported.
    """
    if is_reference(name):
        function = load_reference(name)
        if not callable(function):
            raise RecipeError(f"filter {name} is not a function")
        bound = partial(function, **checked_arguments(function, arguments, where=f"filter {name}"))
        return partial(_passes_own, name, bound)
    filters = {
        known: function
        for known, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not known.startswith("_")
        and get_type_hints(function)["return"] is bool
    }
    if name not in filters:
        raise RecipeError(f"no filter {name!r} in {module.__name__}; {suggestion(name, filters)}")
    function = filters[name]
    return partial(function, **checked_arguments(function, arguments, where=f"filter {name}"))


def checked_arguments(
    function: Callable[..., object], given: Mapping[str, Any], *, where: str
) -> Arguments:
    """`given`, with the defaults of the function's arguments after the first, types checked.

    Raises:
        RecipeError: an argument is unknown, missing or of the wrong type, or the function declares
            no type for it.
    """
    try:
        hints = get_type_hints(function, include_extras=True)
        _, *parameters = inspect.signature(function).parameters.values()
        fields: dict[str, Any] = {
            one.name: (hints[one.name], ... if one.default is one.empty else one.default)
            for one in parameters
        }
        model = create_model(where, __config__=_STRICT, **fields)
    except KeyError as error:
        raise RecipeError(
            f"{where}: its argument {error} needs a type, as in `least: int`"
        ) from error
    except (NameError, TypeError, ValueError, PydanticUserError) as error:
        raise RecipeError(f"{where}: its arguments cannot be read: {error}") from error
    try:
        checked: Arguments = model(**given).model_dump(mode="json")
    except ValidationError as error:
        raise RecipeError(_validation_message(where, error, list(fields))) from error
    return checked


def _passes_own(name: str, passes: Callable[..., bool], subject: object) -> bool:
    """Whether `subject` passes a filter from outside the package.

    Raises:
        PmdError: the filter raises an exception.
    """
    try:
        return bool(passes(subject))
    except Exception as error:  # the user's code may raise anything
        raise failure(name, error) from error


def _recipe_path(name_or_path: str, folder: Path = Path()) -> Path:
    if name_or_path.endswith(".toml"):
        path = folder / name_or_path
        if not path.is_file():
            raise RecipeError(f"{path}: there is no such recipe file")
        return path
    if name_or_path not in recipe_names():
        near = suggestion(name_or_path, recipe_names())
        raise RecipeError(f"there is no source or recipe {name_or_path!r}; {near}")
    return recipe_folder() / f"{name_or_path}.toml"


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: this is not TOML: {error}") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`, table by table."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and name not in _ORDERED_TABLES:
            merged[name] = _merge(old, value)
        else:
            merged[name] = value
    return merged


def _validated(path: Path, content: Mapping[str, Any]) -> Recipe:
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_validation_message(str(path), error, _keys_of_section(error))) from error
    known = sources.names()
    if recipe.module is None and recipe.source not in known:
        near = suggestion(recipe.source, known)
        raise RecipeError(f"{path}: there is no source {recipe.source!r}; {near}")
    if recipe.module is not None and recipe.source in {*known, *recipe_names()}:
        raise RecipeError(f"{path}: the package has its own {recipe.source}; name yours otherwise")
    try:
        recipe = _with_digests(recipe)
        source = recipe.load_source()
        captions, images = recipe.captions, recipe.images
        predicates(caption_filters, captions.filters, captions.filters_sha256)
        predicates(image_filters, images.filters, images.filters_sha256)
        predicates(pixel_filters, images.pixel_filters, images.filters_sha256)
    except PmdError as error:
        raise RecipeError(f"{path}: {error}") from error
    if recipe.form is not None and recipe.form not in source.forms():
        near = suggestion(recipe.form, source.forms())
        raise RecipeError(f"{path}: {source.name} has no form {recipe.form!r}; {near}")
    options = checked_arguments(source.read, recipe.options, where=f"{path} [options]")
    return recipe.model_copy(update={"options": options})


def _with_digests(recipe: Recipe) -> Recipe:
    """The recipe with the missing SHA-256 digests of files from outside the package filled in.

    Raises:
        PmdError: a file cannot be read, or a digest is stated of code that the recipe does not use.
    """
    changes: dict[str, Any] = {}
    if recipe.module is not None:
        changes["module_sha256"] = recipe.module_sha256 or source_digest(recipe.module)
    elif recipe.module_sha256 is not None:
        raise PmdError("module_sha256 is stated, but no module")
    images = recipe.images
    for name, section, names in (
        ("captions", recipe.captions, [*recipe.captions.filters]),
        ("images", images, [*images.filters, *images.pixel_filters]),
    ):
        own = [filter_ for filter_ in names if is_reference(filter_)]
        if unused := sorted(section.filters_sha256.keys() - set(own)):
            raise PmdError(
                f"{name}.filters_sha256 states {unused[0]}, which is no module:function among the "
                "filters"
            )
        digests = {one: section.filters_sha256.get(one) or source_digest(one) for one in own}
        changes[name] = section.model_copy(update={"filters_sha256": digests})
    return recipe.model_copy(update=changes)


def _keys_of_section(error: ValidationError) -> list[str]:
    model: type[BaseModel] = Recipe
    for step in error.errors()[0]["loc"][:-1]:
        inner = (
            model.model_fields[str(step)].annotation if str(step) in model.model_fields else None
        )
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return list(model.model_fields)


def _validation_message(where: str, error: ValidationError, known: Sequence[str]) -> str:
    first = error.errors()[0]
    key = ".".join(str(step) for step in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}; {suggestion(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing"
    value, rule = json.dumps(first["input"], default=str), first["msg"]
    return f"{where}: {key} = {value}: {rule[:1].lower()}{rule[1:]}"
