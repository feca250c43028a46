"""Checkpoints: folders that are complete or absent, from which a run resumes bit for bit.

`model.safetensors` and `optimizer.safetensors` hold tensors by the names of the parameters,
`state.json` everything else. None of them holds code.
"""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flava_train.model.flava import Flava
from flava_train.run.ranks import full_tensor, shard_like
from pmd_pipeline.contract.errors import PmdError

FORMAT: Literal[2] = 2
"""Version of everything in the folder; `state.json` holds the configuration, so its keys too."""

WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_PARTS_OF_ADAM = ("exp_avg", "exp_avg_sq", "step")
_NAME = re.compile(r"step-(\d{8,})")


class Best(BaseModel):
    """The checkpoint with the highest value of the metric so far; `steps` identifies it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    value: float
    steps: int


class Progress(BaseModel):
    """The state of a run, besides its tensors.

    Args:
        steps: steps taken.
        config: as resolved, by sections.
        digests: of the data of each stream, and of the tokenizer.
        code: SHA-256 of the user's own code, by reference.
        loss_scale: of float16; 1 in other precisions.
        good_steps: steps since the loss scale changed.
        best: see `Best`.
        begun_from: the checkpoint of another run that this run started from.
        ranks: that took the last step.
        versions: of libraries that change the last digits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = FORMAT
    steps: int = 0
    config: dict[str, Any]
    digests: dict[str, str]
    code: dict[str, str] = {}
    loss_scale: float = 1.0
    good_steps: int = 0
    best: Best | None = None
    begun_from: str | None = None
    ranks: int = 1
    versions: dict[str, str] = Field(
        default_factory=lambda: {name: version(name) for name in ("numpy", "pillow", "torch")}
    )


def save(
    run: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int
) -> None:
    """Write the checkpoint of a run, then remove older ones.

    It appears in one rename, when all of it is on the disk. Where it exists already, it is not
    written: a run with this number of steps has resumed from it or has just written it. Every rank
    must call this; ranks other than 0 only contribute their parts of sharded tensors.

    Args:
        run: folder of the run.
        progress: state of the run.
        model: its weights.
        optimizer: its moments.
        keep: newest checkpoints to keep, besides the best.

    Raises:
        PmdError: it cannot be written.
    """
    is_main = progress.ranks == 1 or torch.distributed.get_rank() == 0
    weights = _full_tensors(model.state_dict(), keep=is_main)
    moments = _full_tensors(_moments(model, optimizer), keep=is_main)
    if not is_main:
        return
    folder = run / "checkpoints" / checkpoint_name(progress.steps)
    if not folder.exists():
        _write_checkpoint(folder, progress, weights, moments)
    best = progress.best
    protected = {progress.steps} if best is None else {progress.steps, best.steps}
    _remove_old(folder.parent, keep, protected)


def checkpoint_name(steps: int) -> str:
    """Name of the folder of the checkpoint after `steps` steps."""
    return f"step-{steps:08d}"


def newest_checkpoint(run: Path) -> int | None:
    """Steps of the newest checkpoint of a run; None if there is none."""
    return max(_steps_of_checkpoints(run / "checkpoints"), default=None)


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The checkpoint at `path`, or the newest of the run there.

    Args:
        path: a checkpoint, or the folder of a run.
        best: the best checkpoint of the run instead of the newest.

    Raises:
        PmdError: there is none.
    """
    if (path / STATE).is_file():
        return path
    steps = newest_checkpoint(path)
    if steps is None:
        raise PmdError(f"{path} is neither a checkpoint nor a run with a checkpoint")
    folder = path / "checkpoints" / checkpoint_name(steps)
    if not best:
        return folder
    record = load_progress(folder).best
    if record is None:
        raise PmdError(f"{path} was never evaluated, so none of its checkpoints is the best")
    return path / "checkpoints" / checkpoint_name(record.steps)


def load_progress(checkpoint: Path) -> Progress:
    """The state of a run at a checkpoint.

    Raises:
        PmdError: it cannot be read, or is of another version.
    """
    path = checkpoint / STATE
    try:
        return Progress.model_validate_json(path.read_bytes())
    except OSError as error:
        raise PmdError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        raise PmdError(f"{path} is no checkpoint of this version of flava-train") from error


def load_weights(
    checkpoint: Path, model: Flava, *, only: str = "", new_heads: bool = False
) -> list[str]:
    """Load the weights of a checkpoint into a model.

    Heads that the model lacks are skipped.

    Args:
        checkpoint: a folder.
        model: of the same shape.
        only: prefix of the names to load; other weights are not changed.
        new_heads: keep the weights of heads that the checkpoint lacks.

    Returns:
        The heads that the checkpoint lacks.

    Raises:
        PmdError: the file cannot be read, or belongs to a model of another shape; or it lacks a
            head of the model, and `new_heads` is false.
    """
    path = checkpoint / WEIGHTS
    ours = {name: one for name, one in model.state_dict().items() if name.startswith(only)}
    theirs = {name: one for name, one in _read(path).items() if name.startswith(only)}
    missing = sorted(_heads_of(ours) - _heads_of(theirs))
    different = _heads_of(theirs) ^ _heads_of(ours)
    ours, theirs = _without_heads(ours, different), _without_heads(theirs, different)
    _check_same(path, ours, theirs)
    if missing and not new_heads:
        raise PmdError(
            f"{path} has no {missing[0]}: it was trained without this loss; name another --out, "
            "and this run as model.weights"
        )
    with torch.no_grad():
        for name, one in ours.items():
            one.copy_(shard_like(theirs[name], one))
    return missing


def load_moments(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the moments of a checkpoint into the optimizer of the model.

    Raises:
        PmdError: they cannot be read, or belong to another model.
    """
    saved = _read(checkpoint / MOMENTS)
    skipped = _heads_of(_without_part(saved)) - _heads_of(model.state_dict())
    moments = {name: one for name, one in saved.items() if name.split(".")[1] not in skipped}
    parameters = dict(model.named_parameters())
    shaped: dict[str, Tensor] = {
        f"{part}.{name}": tensor
        for name, tensor in parameters.items()
        for part in _PARTS_OF_ADAM
        if f"{part}.{name}" in moments  # a head has none before the first step of its stream
    }
    shaped |= {name: torch.zeros(()) for name in shaped if name.startswith("step.")}
    _check_same(checkpoint / MOMENTS, shaped, moments)
    for name, parameter in parameters.items():
        if f"step.{name}" in moments:
            optimizer.state[parameter] = {
                "step": moments[f"step.{name}"].to(parameter.device),
                "exp_avg": shard_like(moments[f"exp_avg.{name}"], parameter),
                "exp_avg_sq": shard_like(moments[f"exp_avg_sq.{name}"], parameter),
            }


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": state[part]
        for name, parameter in model.named_parameters()
        if (state := optimizer.state.get(parameter))
        for part in _PARTS_OF_ADAM
    }


def _full_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Full tensors on the CPU; one at a time, so that ranks that keep none need no memory."""
    gathered = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if keep:
            gathered[name] = full.cpu().contiguous()
    return gathered


def _write_checkpoint(
    folder: Path, progress: Progress, weights: dict[str, Tensor], moments: dict[str, Tensor]
) -> None:
    unfinished = folder.with_name(f".{folder.name}.{uuid4().hex}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(".*.tmp"):  # of a process that was killed here
            shutil.rmtree(leftover)
        unfinished.mkdir()
        save_file(weights, unfinished / WEIGHTS)
        save_file(moments, unfinished / MOMENTS)
        (unfinished / STATE).write_text(progress.model_dump_json(indent=2) + "\n")
        for name in (WEIGHTS, MOMENTS, STATE, "."):
            _sync(unfinished / name)
        unfinished.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise PmdError(
            f"cannot write {folder}: {error}; make room and run the same command again"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _steps_of_checkpoints(folder: Path) -> list[int]:
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]


def _remove_old(folder: Path, keep: int, protected: set[int]) -> None:
    for steps in sorted(_steps_of_checkpoints(folder))[:-keep]:
        if steps not in protected:
            old = folder / checkpoint_name(steps)
            # renamed first: a partly removed checkpoint must not have a checkpoint's name
            try:
                shutil.rmtree(old.rename(folder / f".{old.name}.{uuid4().hex}.tmp"))
            except OSError as error:
                raise PmdError(
                    f"cannot remove {old}: {error.strerror or error}; remove it, and run again"
                ) from error


def _heads_of(names: Iterable[str]) -> set[str]:
    """The first parts of names that are heads."""
    first = {name.split(".")[0] for name in names}
    return {name for name in first if name.endswith("_head")}


def _without_heads(tensors: Mapping[str, Tensor], heads: set[str]) -> dict[str, Tensor]:
    return {name: one for name, one in tensors.items() if name.split(".")[0] not in heads}


def _without_part(moments: Iterable[str]) -> list[str]:
    """Names of parameters, from names of their moments."""
    return [name.partition(".")[2] for name in moments]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PmdError(f"cannot read {path}: {error}") from error
    return tensors


def _check_same(path: Path, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    different: Iterable[str] = sorted(ours.keys() ^ theirs.keys()) or (
        name for name, tensor in ours.items() if tensor.shape != theirs[name].shape
    )
    name = next(iter(different), None)
    if name is not None:
        raise PmdError(f"{path} is of another model: {name} is missing or of another shape")
