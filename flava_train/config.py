"""What a run is told: TOML, laid over a base, changed by `--set`, checked before all else."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from flava_train.data.config import DataConfig
from flava_train.model.flava import FlavaConfig
from flava_train.objective.losses import Objective
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.suggestions import suggestion

PREFIX = "flava_"
"""Begins the names of training configurations, which share a folder with the data recipes."""

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class ModelConfig(FlavaConfig):
    """The model, and where its weights come from.

    Args:
        text_vocab: 0 takes the size of the tokenizer's vocabulary.
        image_vocab: 0 takes that of the image codes.
        init_image: file of DINO's ViT, `.pth` or `.safetensors`, for the image encoder, if the
            objective has `unimodal_init`; empty for none.
        init_text: run whose text encoder is taken, of the same tokenizer, likewise.
        weights: run, or folder or hub id of a `FlavaForPreTraining`, for the whole model.
        revision: commit of `weights` on the hub.
    """

    text_vocab: int = 0
    image_vocab: int = 0
    init_image: str | None = None
    init_text: str | None = None
    weights: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate; the defaults are the paper's, as far as it says.

    Args:
        lr: highest learning rate.
        warmup: steps in which it rises to that, linearly.
        schedule: how it falls afterwards.
        end: learning rate that the schedule would reach at the step after the last.
        betas: decay of both moments.
        eps: added to the root of the second moment.
        weight_decay: of the weights of linear layers.
        decay_all: of every parameter, as in the authors' port.
        clip: greatest norm of the gradient; none if absent.
    """

    lr: NotNegative = 1e-3
    warmup: Annotated[int, Field(ge=0)] = 10_000
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    end: NotNegative = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.1
    decay_all: bool = False
    clip: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True)
class ComputeConfig:
    """How steps are computed; it changes no more than the last digits of what is learnt.

    Args:
        device: `auto` takes a GPU where there is one.
        precision: of matrix products. Weights, their moments and all normalisations are float32.
        compile: compile blocks and heads.
        recompute: keep no activations inside blocks, and compute them again.
        shard: share blocks and heads, with their moments, out over the ranks (FSDP2).
        threads: of one process on a CPU; torch's choice if absent.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    compile: bool = False
    recompute: bool = False
    shard: bool = False
    threads: Count | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save.

    Args:
        every: steps between checkpoints; there is always one after the last step.
        keep: newest checkpoints that are kept, besides the best.
    """

    every: Count = 1000
    keep: Count = 2


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on what is never trained on.

    Args:
        every: steps between evaluations; 0 evaluates after the last step only.
        retrieval: manifest of held-out pairs.
        classes: folder with a folder of images for each class.
        metric: which figure makes a checkpoint the best; more is better.
        batch: images or texts at once.
    """

    every: Annotated[int, Field(ge=0)] = 8000
    retrieval: str | None = None
    classes: str | None = None
    metric: Literal[
        "text_to_image_r1",
        "text_to_image_r5",
        "text_to_image_r10",
        "image_to_text_r1",
        "image_to_text_r5",
        "image_to_text_r10",
        "zero_shot_top1",
        "zero_shot_top5",
    ] = "text_to_image_r1"
    batch: Count = 256


@dataclass(frozen=True)
class MetricsConfig:
    """Who is told how it goes, besides the terminal and `metrics.jsonl`.

    Args:
        tensorboard: write for TensorBoard where it is installed.
        wandb: project of Weights & Biases.
        peak: dense TFLOP/s of the card, where it is none that we know.
    """

    tensorboard: bool = True
    wandb: str | None = None
    peak: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Args:
        steps: updates of the weights.
        batch: pairs, images or texts in one step, over all ranks.
        micro: of these, as many as one device computes at once; changes memory, not gradients.
        seed: of weights, order, crops and masks.
        out: folder of the run; `runs/` and the configuration's name if empty.
        skip: steps that are passed over, since their batch is no good.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        strict=True,  # nothing is guessed from "256" or 95.0
        extra="forbid",
        allow_inf_nan=False,
    )

    steps: Count
    batch: Count
    micro: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    out: str = ""
    skip: tuple[int, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = ModelConfig()
    objective: Objective = field(default_factory=Objective)
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()

    def __post_init__(self) -> None:
        warmup = self.optimizer.warmup
        if self.optimizer.schedule != "constant" and warmup >= self.steps:
            raise ValueError(
                f"optimizer.warmup = {warmup} leaves nothing of the {self.steps} steps to come down"
            )


def load_config(
    name_or_file: str, changes: Mapping[str, Any] | None = None, *, settings: Sequence[str] = ()
) -> TrainConfig:
    """The configuration of a name (`flava_pmd`) or TOML file, checked.

    A file with `base = ...` is laid over the configuration that this names.

    Args:
        name_or_file: a file ends in `.toml`.
        changes: values by dotted key, laid over it.
        settings: the same as `key=value`, the value as in TOML or a bare word; laid over that.

    Raises:
        PmdError: no such configuration, no TOML, an unknown key or a value that cannot be.
    """
    path = _find(name_or_file, Path())
    content = _with_bases(path, ())
    spoken = dict(changes or {}) | dict(_parsed(setting) for setting in settings)
    for key, value in spoken.items():
        _put(content, key, value)
    if not content.get("out"):
        content["out"] = f"runs/{path.stem}"
    return checked(content, where=str(path), spoken=spoken)


def checked(
    content: Mapping[str, Any], *, where: str, spoken: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The configuration that a TOML document holds.

    Args:
        content: as `tomllib` reads it.
        where: it stands, for sentences about mistakes.
        spoken: dotted keys in it that come from the command line.

    Raises:
        PmdError: an unknown key, or a value that cannot be.
    """
    try:
        # as JSON, because from Python's objects a strict model takes no dict for a section
        return _ADAPTER.validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise PmdError(_sentence(where, error, spoken or {})) from error


def as_toml(config: TrainConfig) -> str:
    """Every value of a configuration, those left at their defaults too, as TOML."""
    return "".join(_lines(as_tables(config), ()))


def as_tables(config: TrainConfig) -> dict[str, Any]:
    """The configuration as TOML and JSON know it: what is None is left out."""
    tables: dict[str, Any] = _without_none(asdict(config))
    return tables


def config_names() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in _folder().glob(f"{PREFIX}*.toml"))


_ADAPTER = TypeAdapter(TrainConfig)


def _folder() -> Path:
    """Where recipes are: in an installed package beside this one, or in a checkout."""
    root = Path(__file__).parents[1]
    packed = root / "pmd_pipeline" / "_recipes"
    return packed if packed.is_dir() else root / "recipes"


def _find(name_or_file: str, folder: Path) -> Path:
    if name_or_file.endswith(".toml"):
        path = folder / name_or_file
        if not path.is_file():
            raise PmdError(f"{path}: there is no such configuration file")
        return path
    if name_or_file not in config_names():
        near = suggestion(name_or_file, config_names())
        raise PmdError(f"there is no configuration {name_or_file!r}; {near}")
    return _folder() / f"{name_or_file}.toml"


def _with_bases(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a file over that of its base, and of that one's."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PmdError(f"{path}: this is no TOML: {error}") from error
    except OSError as error:
        raise PmdError(f"{path}: cannot be read: {error.strerror}") from error
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise PmdError(f"{path}: base = {base!r}: should be a name or a file")
    below = _find(base, path.parent)
    if below in (*above, path):
        raise PmdError(f"{path}: its base {base!r} is based on it")
    return _over(_with_bases(below, (*above, path)), content)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            both[key] = _over(old, value)
        else:
            both[key] = value
    return both


def _parsed(setting: str) -> tuple[str, Any]:
    key, equals, text = setting.partition("=")
    if not (equals and key.strip()):
        raise PmdError(f"--set {setting}: write it as key=value, as in optimizer.lr=3e-4")
    try:
        [value] = tomllib.loads(f"value = {text}").values()
    except (tomllib.TOMLDecodeError, ValueError):  # a path, say; the key's type will judge it
        value = text.strip()
    return key.strip(), value


def _put(content: dict[str, Any], key: str, value: object) -> None:
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise PmdError(f"--set {key}: {section} is a value, so nothing stands below it")
    content[last] = value


def _sentence(where: str, error: ValidationError, spoken: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    steps = [str(step) for step in first["loc"]]
    key = ".".join(steps)
    if any(key == said or key.startswith(f"{said}.") for said in spoken):
        where = "--set"
    if first["type"] == "unexpected_keyword_argument":
        if any(said.startswith(f"{key}.") for said in spoken):
            where = "--set"
        return f"{where}: unknown key {key!r}; {suggestion(steps[-1], _keys_beside(steps))}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing"
    rule = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "value_error":
        return f"{where}: {f'{key}: ' if key else ''}{rule}"
    if first["type"] == "dataclass_type":
        return f"{where}: {key} is a section, not a value"
    return f"{where}: {key} = {json.dumps(first['input'], default=str)}: {rule}"


def _keys_beside(steps: Sequence[str]) -> list[str]:
    section: Any = TrainConfig
    for step in steps[:-1]:
        section = get_type_hints(section)[step]
    return [one.name for one in fields(section)]


def _without_none(value: Any) -> Any:  # noqa: ANN401  # any value of TOML
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    assert not is_dataclass(value)
    return value


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [f"\n[{'.'.join(path)}]\n"] if path else []
    lines += [f"{key} = {_text(v)}\n" for key, v in table.items() if not isinstance(v, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _lines(value, (*path, key))
    return lines


def _text(value: Any) -> str:  # noqa: ANN401  # any value of TOML
    if isinstance(value, str):
        # JSON's escapes are TOML's, but TOML wants this character escaped as well
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return json.dumps(value)
