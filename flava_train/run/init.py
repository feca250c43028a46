"""Initial weights of a run: random, or those of other models."""

import logging
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flava_train.config import ModelConfig, TrainConfig, load_objective
from flava_train.model.flava import Flava, FlavaConfig, load_dino
from flava_train.model.hf import load_hf
from flava_train.run.checkpoint import (
    find_checkpoint,
    load_progress,
    load_weights,
    newest_checkpoint,
)
from pmd_pipeline.contract.errors import PmdError

_log = logging.getLogger(__name__)


def init_model(config: TrainConfig, tokenizer: str, *, from_scratch: bool) -> Flava:
    """The model of a run before its first step, on the CPU.

    Args:
        config: of the run.
        tokenizer: SHA-256 of its tokenizer, which `model.init_text` must have too.
        from_scratch: false where a checkpoint will replace all weights; then no file of weights
            is read.

    Raises:
        PmdError: weights are missing, cannot be read, or do not fit.
    """
    torch.manual_seed(config.seed)
    model = Flava(config.model, load_objective(config.objective).heads)
    if from_scratch:
        _load_initial_weights(model, config, tokenizer)
    for encoder in (model.image, model.text, model.multimodal):
        encoder.recompute = config.compute.recompute
    return model


def _load_initial_weights(model: Flava, config: TrainConfig, tokenizer: str) -> None:
    section = config.model
    if section.weights:
        for head in _load_all(model, section):
            _log.warning("%s has no %s: its weights are random", section.weights, head)
        return
    if not config.objective.unimodal_init:
        return
    if section.init_image is None or section.init_text is None:
        raise PmdError(
            "objective.unimodal_init needs trained encoders: name DINO's file as "
            "model.init_image and a run of flava_text_mlm as model.init_text (an empty name for "
            "random weights), or set it to false"
        )
    if section.init_image:
        path = Path(section.init_image)
        try:
            load_dino(model.image, load_tensors(path))
        except ValueError as error:
            raise PmdError(f"{path}: {error}") from error
    if section.init_text:
        run = find_checkpoint(Path(section.init_text))
        theirs = load_progress(run).digests.get("tokenizer")
        if theirs != tokenizer:
            raise PmdError(f"{run} has another tokenizer ({theirs}) than this run ({tokenizer})")
        load_weights(run, model, only="text.")


def _load_all(model: Flava, section: ModelConfig) -> list[str]:
    """Load the weights of a run or of a published model; the heads that it lacks."""
    assert section.weights is not None
    path = Path(section.weights)
    if newest_checkpoint(path) is not None or (path / "state.json").is_file():
        return load_weights(find_checkpoint(path), model, new_heads=True)
    theirs = load_hf(section.weights, revision=section.revision)
    ours = {name: getattr(section, name) for name in FlavaConfig.__dataclass_fields__}
    for name, value in ours.items():
        other = getattr(theirs.config, name)
        if other != value and name not in {"logit_scale", "mm_pad_mask"}:
            raise PmdError(
                f"{section.weights} has {name} = {other}, and the configuration {value}: "
                f"make them equal with --set model.{name}=..."
            )
    state = {
        name: tensor for name, tensor in theirs.state_dict().items() if name in model.state_dict()
    }
    missing, _ = model.load_state_dict(state, strict=False)
    return sorted({name.split(".")[0] for name in missing})


def load_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a `.safetensors` file or of `torch.save`; no code in it runs.

    Raises:
        PmdError: the file cannot be read, or holds other things than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        raise PmdError(f"cannot read {path}: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(one, Tensor) for one in state.values()):
        raise PmdError(f"{path} holds other things than tensors by name")
    return state
