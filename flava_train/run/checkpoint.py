"""Checkpoints: a folder that is whole or absent, from which a run goes on bit for bit.

`model.safetensors` and `optimizer.safetensors` hold tensors by the names of the parameters,
`state.json` all else. Nothing in them is code, and reading them runs none.
"""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flava_train.run.ranks import like, whole
from pmd_pipeline.contract.errors import PmdError

FORMAT = 1
"""Version of all that is in the folder."""

WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_PARTS_OF_ADAM = ("exp_avg", "exp_avg_sq", "step")
_NAME = re.compile(r"step-(\d{8,})")


class Best(BaseModel):
    """The checkpoint with the highest figure so far; `steps` names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    value: float
    steps: int


class Progress(BaseModel):
    """What a run has reached, besides its tensors.

    Args:
        steps: that were taken.
        config: as resolved, by sections.
        digests: versions of all data, by stream, and of the tokenizer.
        loss_scale: of float16; 1 in other precisions.
        good_steps: steps since the loss scale changed.
        best: see `Best`.
        begun_from: the checkpoint of another run that this one began from.
        ranks: that took the last step.
        versions: libraries that shape the last digits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    steps: int = 0
    config: dict[str, Any]
    digests: dict[str, str]
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
    """Write the checkpoint of a run, and then remove those that are no longer kept.

    It appears in one rename, when all of it is on the disk. Where it exists, nothing happens: a
    run that is at these steps has come from it, or has just written it. Every rank must call
    this; all but the first only bring their parts of shared tensors.

    Raises:
        PmdError: it cannot be written.
    """
    writes = progress.ranks == 1 or torch.distributed.get_rank() == 0
    weights = _gathered(model.state_dict(), keep=writes)
    moments = _gathered(_moments(model, optimizer), keep=writes)
    if not writes:
        return
    folder = run / "checkpoints" / checkpoint_name(progress.steps)
    if not folder.exists():
        _write(folder, progress, weights, moments)
    kept = {progress.steps} if progress.best is None else {progress.steps, progress.best.steps}
    _prune(folder.parent, keep, kept)


def checkpoint_name(steps: int) -> str:
    """The folder of the checkpoint that has taken `steps` steps."""
    return f"step-{steps:08d}"


def newest(run: Path) -> int | None:
    """Steps of the newest checkpoint of a run; None where there is none."""
    return max(_found(run / "checkpoints"), default=None)


def find(place: Path, *, best: bool = False) -> Path:
    """The checkpoint at `place`, or the newest of the run that is there.

    Args:
        place: a checkpoint, or the folder of a run.
        best: take the best of the run.

    Raises:
        PmdError: there is none.
    """
    if (place / STATE).is_file():
        return place
    steps = newest(place)
    if steps is None:
        raise PmdError(f"{place} is no checkpoint, and no run that has one")
    folder = place / "checkpoints" / checkpoint_name(steps)
    if not best:
        return folder
    figure = load_progress(folder).best
    if figure is None:
        raise PmdError(f"{place} was never evaluated, so none of its checkpoints is the best")
    return place / "checkpoints" / checkpoint_name(figure.steps)


def load_progress(checkpoint: Path) -> Progress:
    """What the run of a checkpoint had reached.

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


def load_weights(checkpoint: Path, model: nn.Module, *, only: str = "") -> None:
    """Put the weights of a checkpoint into a model.

    Args:
        checkpoint: a folder.
        model: of the same shape.
        only: beginning of the names that are taken; the others stay as they are.

    Raises:
        PmdError: it cannot be read, or the model has another shape.
    """
    held = _tensors(checkpoint / WEIGHTS)
    wanted = {name: ours for name, ours in model.state_dict().items() if name.startswith(only)}
    _check_same(checkpoint / WEIGHTS, wanted, {n: t for n, t in held.items() if n.startswith(only)})
    with torch.no_grad():
        for name, ours in wanted.items():
            ours.copy_(like(held[name], ours))


def load_moments(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the moments of a checkpoint into the optimizer of the model.

    Raises:
        PmdError: they cannot be read, or belong to another model.
    """
    held = _tensors(checkpoint / MOMENTS)
    parameters = dict(model.named_parameters())
    shaped: dict[str, Tensor] = {
        f"{part}.{name}": tensor
        for name, tensor in parameters.items()
        for part in _PARTS_OF_ADAM
        if f"{part}.{name}" in held  # a head whose stream has not come yet has none
    }
    shaped |= {name: torch.zeros(()) for name in shaped if name.startswith("step.")}
    _check_same(checkpoint / MOMENTS, shaped, held)
    for name, parameter in parameters.items():
        if f"step.{name}" in held:
            optimizer.state[parameter] = {
                "step": held[f"step.{name}"].to(parameter.device),
                "exp_avg": like(held[f"exp_avg.{name}"], parameter),
                "exp_avg_sq": like(held[f"exp_avg_sq.{name}"], parameter),
            }


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": state[part]
        for name, parameter in model.named_parameters()
        if (state := optimizer.state.get(parameter))
        for part in _PARTS_OF_ADAM
    }


def _gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU; one at a time, so that ranks that keep none need no memory."""
    found = {}
    for name, tensor in tensors.items():
        everything = whole(tensor.detach())
        if keep:
            found[name] = everything.cpu().contiguous()
    return found


def _write(
    folder: Path, progress: Progress, weights: dict[str, Tensor], moments: dict[str, Tensor]
) -> None:
    unfinished = folder.with_name(f".{folder.name}.{uuid4().hex}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(".*.tmp"):  # of one that was killed in here
            shutil.rmtree(left)
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


def _found(folder: Path) -> list[int]:
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]


def _prune(folder: Path, keep: int, kept: set[int]) -> None:
    for steps in sorted(_found(folder))[:-keep]:
        if steps not in kept:
            old = folder / checkpoint_name(steps)
            # by another name first: a half-removed one must not pass for a whole one
            try:
                shutil.rmtree(old.rename(folder / f".{old.name}.{uuid4().hex}.tmp"))
            except OSError as error:
                raise PmdError(
                    f"cannot remove {old}: {error.strerror or error}; remove it, and run again"
                ) from error


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PmdError(f"cannot read {path}: {error}") from error
    return tensors


def _check_same(path: Path, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    wrong: Iterable[str] = sorted(ours.keys() ^ theirs.keys()) or (
        name for name, tensor in ours.items() if tensor.shape != theirs[name].shape
    )
    name = next(iter(wrong), None)
    if name is not None:
        raise PmdError(f"{path} is of another model: {name} is missing or of another shape")
