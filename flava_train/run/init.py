"""The model as a run begins with it: drawn anew, or with weights of others in it."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flava_train.config import ModelConfig, TrainConfig
from flava_train.model.flava import Flava, FlavaConfig, load_dino
from flava_train.model.hf import load_hf
from flava_train.run.checkpoint import find, load_progress, load_weights, newest
from pmd_pipeline.contract.errors import PmdError


def beginning(config: TrainConfig, tokenizer: str, *, from_scratch: bool) -> Flava:
    """The model of a run before its first step, on the CPU.

    Args:
        config: of the run.
        tokenizer: its sha256, which that of a text encoder taken over must equal.
        from_scratch: false where a checkpoint will replace all weights; then no file of weights
            is looked for.

    Raises:
        PmdError: weights are missing, cannot be read, or do not fit.
    """
    torch.manual_seed(config.seed)
    model = Flava(config.model)
    if from_scratch:
        _take_weights(model, config, tokenizer)
    for encoder in (model.image, model.text, model.multimodal):
        encoder.recompute = config.compute.recompute
    return model


def _take_weights(model: Flava, config: TrainConfig, tokenizer: str) -> None:
    section = config.model
    if section.weights:
        _take_all(model, section)
        return
    if not config.objective.unimodal_init:
        return
    if section.init_image is None or section.init_text is None:
        raise PmdError(
            "objective.unimodal_init wants encoders trained before: name DINO's file as "
            "model.init_image and a run of flava_text_mlm as model.init_text (an empty name for "
            "neither), or set it to false"
        )
    if section.init_image:
        path = Path(section.init_image)
        try:
            load_dino(model.image, read_tensors(path))
        except ValueError as error:
            raise PmdError(f"{path}: {error}") from error
    if section.init_text:
        run = find(Path(section.init_text))
        theirs = load_progress(run).digests.get("tokenizer")
        if theirs != tokenizer:
            raise PmdError(f"{run} has another tokenizer ({theirs}) than this run ({tokenizer})")
        load_weights(run, model, only="text.")


def _take_all(model: Flava, section: ModelConfig) -> None:
    """All weights, of a run or of a published model."""
    assert section.weights is not None
    place = Path(section.weights)
    if newest(place) is not None or (place / "state.json").is_file():
        load_weights(find(place), model)
        return
    theirs = load_hf(section.weights, revision=section.revision)
    ours = {name: getattr(section, name) for name in FlavaConfig.__dataclass_fields__}
    for name, value in ours.items():
        other = getattr(theirs.config, name)
        if other != value and name not in {"logit_scale", "mm_pad_mask"}:
            raise PmdError(
                f"{section.weights} has {name} = {other}, and the configuration {value}: "
                f"--set model.{name}=... makes them agree"
            )
    model.load_state_dict(theirs.state_dict())


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file, `.safetensors` or of `torch.save`; no code in it is run.

    Raises:
        PmdError: it cannot be read, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        raise PmdError(f"cannot read {path}: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(state, dict) or not all(isinstance(one, Tensor) for one in state.values()):
        raise PmdError(f"{path} holds more than tensors by name")
    return state
