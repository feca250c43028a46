"""The configuration of a run: TOML over a base configuration, changed by `--set`, validated."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import tomli_w
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from flava_train.data.config import DataConfig
from flava_train.model.flava import FlavaConfig
from flava_train.objective.losses import LOSSES, EmbeddingLoss, Loss
from flava_train.objective.metrics import STEP_METRICS, StepMetric
from flava_train.objective.objective import ExtraLoss, LoadedLoss, Objective
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.plugins import failure, is_reference, load_reference
from pmd_pipeline.contract.suggestions import suggestion

PREFIX = "flava_"
"""Prefix of the names of training configurations, which share a folder with the data recipes."""

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class ModelConfig(FlavaConfig):
    """The model, and its initial weights.

    Args:
        text_vocab: 0 means the size of the tokenizer's vocabulary.
        image_vocab: 0 means the vocabulary size of the image codes.
        init_image: file of DINO's ViT, `.pth` or `.safetensors`, for the image encoder, if the
            objective has `unimodal_init`; an empty name for random weights.
        init_text: run with the same tokenizer, for the text encoder, likewise.
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
    """AdamW and its learning rate; the defaults are the paper's, where it states them.

    Args:
        lr: highest learning rate.
        warmup: steps of linear warm-up.
        schedule: decrease of the learning rate after the warm-up.
        end: learning rate that the schedule would reach at the step after the last.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: of the weights of linear layers.
        decay_all: weight decay of every parameter, as in the authors' port.
        grad_clip_norm: gradients of a greater norm are scaled down to it; absent for no clipping.
    """

    lr: NotNegative = 1e-3
    warmup: Annotated[int, Field(ge=0)] = 10_000
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    end: NotNegative = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.1
    decay_all: bool = False
    grad_clip_norm: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True)
class ComputeConfig:
    """How steps are computed. No value here changes more than the last digits of the weights.

    Args:
        device: `auto` means a GPU where there is one.
        precision: of matrix products. Weights, moments and all normalisations are float32.
        compile: compile blocks and heads.
        recompute: compute activations inside blocks again in the backward pass (activation
            checkpointing).
        shard: shard blocks and masked heads, with their moments, over the ranks (FSDP2).
        threads: of one process on a CPU; torch's default if absent.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    compile: bool = False
    recompute: bool = False
    shard: bool = False
    threads: Count | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written.

    Args:
        every: steps between checkpoints; the last step is always followed by one.
        keep_checkpoints: number of newest checkpoints to keep, besides the best.
    """

    every: Count = 1000
    keep_checkpoints: Count = 2


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training, on held-out data.

    Args:
        every: steps between evaluations; 0 evaluates after the last step only.
        retrieval: manifest of held-out pairs.
        classes: folder with a folder of images for each class.
        metric: the best checkpoint is the one with the highest value of this metric.
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
    """Metrics of training steps, and where they go besides the terminal and `metrics.jsonl`.

    Args:
        step_metrics: further metrics of each step, reduced over all ranks: names of
            `objective.metrics.STEP_METRICS`, or `module:function` of the user's own.
        tensorboard: write for TensorBoard where it is installed.
        wandb: project of Weights & Biases.
        peak: dense TFLOP/s of the card, if it is not in the table `run.flops.PEAKS`.
    """

    step_metrics: tuple[str, ...] = ()
    tensorboard: bool = True
    wandb: str | None = None
    peak: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Args:
        steps: updates of the weights.
        batch: pairs, images or texts in one step, over all ranks.
        micro_batch_size: rows that one device computes at once; changes memory, not gradients.
        seed: of weights, order, crops and masks.
        out: folder of the run; `runs/` and the configuration's name if empty.
        skip_steps: numbers of steps that are not computed, because their batch is unusable.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        strict=True,  # "256" and 95.0 are no whole numbers
        extra="forbid",
        allow_inf_nan=False,
    )

    steps: Count
    batch: Count
    micro_batch_size: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    out: str = ""
    skip_steps: tuple[int, ...] = ()
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
                f"optimizer.warmup = {warmup} must be less than the {self.steps} steps of the run"
            )
        if self.objective.contrastive_loss == "siglip" and self.model.logit_bias is None:
            raise ValueError(
                "objective.contrastive_loss = siglip needs a bias: set model.logit_bias = -10.0"
            )


def load_config(
    name_or_file: str, changes: Mapping[str, Any] | None = None, *, settings: Sequence[str] = ()
) -> TrainConfig:
    """The validated configuration of a name (`flava_pmd`) or of a TOML file.

    A file with `base = ...` changes the configuration that this names.

    Args:
        name_or_file: a file ends in `.toml`.
        changes: values by dotted key, over those of the file.
        settings: the same as `key=value`, over `changes`; the value as in TOML, or a bare word.

    Raises:
        PmdError: there is no such configuration, the file is no TOML, or a key or value is
            invalid.
    """
    path = _find(name_or_file, Path())
    content = _with_bases(path, ())
    overrides = dict(changes or {}) | dict(_parsed(setting) for setting in settings)
    for key, value in overrides.items():
        _put(content, key, value)
    if not content.get("out"):
        content["out"] = f"runs/{path.stem}"
    return validate_config(content, source=str(path), overrides=overrides)


def validate_config(
    content: Mapping[str, Any], *, source: str, overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The configuration of a TOML document.

    Args:
        content: as `tomllib` reads it.
        source: of the document, for messages.
        overrides: dotted keys in it that come from the command line.

    Raises:
        PmdError: a key or value is invalid.
    """
    try:
        # as JSON, because from Python's objects a strict model takes no dict for a section
        return _ADAPTER.validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise PmdError(_sentence(source, error, overrides or {})) from error


def load_objective(objective: Objective) -> Objective:
    """The objective, with its further losses loaded.

    Raises:
        PmdError: a loss has the name of another, cannot be loaded, or is no loss.
    """
    losses = {name: _load_loss(name, loss) for name, loss in objective.losses.items()}
    return replace(objective, losses=losses)


def load_step_metrics(names: Sequence[str]) -> dict[str, StepMetric]:
    """The metrics of a configuration by name; that of `module:function` is `function`.

    Raises:
        PmdError: there is no such metric, it cannot be loaded, or two have one name.
    """
    metrics: dict[str, StepMetric] = {}
    for name in names:
        if not is_reference(name) and name not in STEP_METRICS:
            near = suggestion(name, STEP_METRICS)
            raise PmdError(f"metrics.step_metrics: there is no metric {name!r}; {near}")
        short = name.rpartition(":")[2]
        if short in metrics:
            raise PmdError(f"metrics.step_metrics: two metrics have the name {short}")
        metric = load_reference(name) if is_reference(name) else STEP_METRICS[name]
        if not callable(metric):
            raise PmdError(f"metrics.step_metrics: {name} is no function")
        metrics[short] = metric
    return metrics


def user_references(config: TrainConfig) -> list[str]:
    """All `module:function` of the user's own code that a configuration names."""
    losses = [loss.function for loss in config.objective.losses.values()]
    return list(filter(is_reference, [*losses, *config.metrics.step_metrics]))


def as_toml(config: TrainConfig) -> str:
    """Every value of a configuration, defaults included, as TOML."""
    return tomli_w.dumps(as_tables(config))


def as_tables(config: TrainConfig) -> dict[str, Any]:
    """The configuration as in TOML and JSON; values that are None are left out."""
    tables: dict[str, Any] = _without_none(asdict(config))
    return tables


def config_names() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in _folder().glob(f"{PREFIX}*.toml"))


def _load_loss(name: str, loss: ExtraLoss) -> ExtraLoss:
    if isinstance(loss, LoadedLoss):
        return loss
    key = f"objective.losses.{name}"
    if not name.isidentifier() or hasattr(Objective, name):
        raise PmdError(f"{key}: {name!r} cannot be the name of a loss; choose another name")
    if not is_reference(loss.function):
        return LoadedLoss(loss.function, loss.weight, entry=_package_loss(name, loss))
    function = load_reference(loss.function)
    try:
        entry = function(**loss.arguments)
    except Exception as error:  # the user's code may raise anything
        raise failure(loss.function, error, f"for {key}") from error
    if not isinstance(entry, Loss | EmbeddingLoss):
        kind = type(entry).__name__
        raise PmdError(f"{key}: {loss.function} returns {kind}; it must return a Loss")
    return LoadedLoss(loss.function, loss.weight, loss.arguments, entry=entry)


_ADAPTER = TypeAdapter(TrainConfig)


def _package_loss(name: str, loss: ExtraLoss) -> Loss:
    key, entry = f"objective.losses.{name}", loss.function or name
    if entry not in LOSSES:
        near = suggestion(entry, LOSSES)
        raise PmdError(f"{key}: {entry!r} is neither module:function nor a loss; {near}")
    if loss.arguments:
        raise PmdError(f"{key}: the loss {entry} has no arguments")
    return LOSSES[entry]


def _folder() -> Path:
    """The folder of the recipes, in an installed package or in a checkout."""
    root = Path(__file__).parents[1]
    installed = root / "pmd_pipeline" / "_recipes"
    return installed if installed.is_dir() else root / "recipes"


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
    """The content of a file over that of its bases."""
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
    except (tomllib.TOMLDecodeError, ValueError):  # a bare word, such as a path
        value = text.strip()
    return key.strip(), value


def _put(content: dict[str, Any], key: str, value: object) -> None:
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise PmdError(f"--set {key}: {section} is a value, so it has no keys")
    content[last] = value


def _sentence(source: str, error: ValidationError, overrides: Mapping[str, Any]) -> str:
    """One mistake as a sentence; an unknown key first, since it may be why another is missing."""
    mistakes = error.errors()
    unknown = [one for one in mistakes if one["type"] == "unexpected_keyword_argument"]
    first = (unknown or mistakes)[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if any(key == override or key.startswith(f"{override}.") for override in overrides):
        source = "--set"
    if first["type"] == "unexpected_keyword_argument":
        if any(override.startswith(f"{key}.") for override in overrides):
            source = "--set"
        return f"{source}: unknown key {key!r}; {suggestion(path[-1], _keys_beside(path))}"
    if first["type"] == "missing":
        return f"{source}: {key} is missing"
    rule = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "value_error":
        return f"{source}: {f'{key}: ' if key else ''}{rule}"
    if first["type"] in {"dataclass_type", "dict_type", "mapping_type"}:
        return f"{source}: {key} is a section, not a value"
    return f"{source}: {key} = {json.dumps(first['input'], default=str)}: {rule}"


def _keys_beside(path: Sequence[str]) -> list[str]:
    """The keys of the section that the last part of a path is in."""
    section: Any = TrainConfig
    for part in path[:-1]:
        # a section of sections, such as `objective.losses`, has any keys
        section = get_type_hints(section)[part] if is_dataclass(section) else get_args(section)[1]
    return [one.name for one in fields(section)]


def _without_none(value: Any) -> Any:  # noqa: ANN401  # any value of TOML
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_none(inner) for inner in value]
    return value
