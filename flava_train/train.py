"""A run, from a configuration to checkpoints and metrics: `train`."""

from collections.abc import Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flava_train.config import (
    TrainConfig,
    as_tables,
    as_toml,
    load_objective,
    load_step_metrics,
    user_references,
)
from flava_train.data.loader import RankBatch, load_batches
from flava_train.data.manifests import load_complete_manifest
from flava_train.data.order import STREAMS
from flava_train.data.training_data import TrainingData
from flava_train.data.wordpiece import load_wordpiece
from flava_train.evaluation.evaluate import check_evaluation
from flava_train.model.flava import FlavaConfig
from flava_train.run.checkpoint import (
    Progress,
    checkpoint_name,
    find_checkpoint,
    load_moments,
    load_progress,
    load_weights,
    newest_checkpoint,
)
from flava_train.run.init import init_model
from flava_train.run.loggers import RunLogger
from flava_train.run.optimizer import adamw
from flava_train.run.ranks import Ranks, broadcast_from_rank_0, init_ranks, shard_model
from flava_train.run.run_dir import (
    CONFIG,
    VOCABULARY,
    StopRequest,
    handle_signals,
    lock_run_dir,
)
from flava_train.trainer import FIRST_LOSS_SCALE, NotFinite, Trainer
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import write_whole
from pmd_pipeline.contract.plugins import source_digest

SHAPES_BATCHES = (
    "seed",
    "batch",
    "data.caption_tokens",
    "data.text_tokens",
    "data.window_shards",
    "objective.itm_negatives",
    "objective.itm_rate",
    "objective.streams.images",
    "objective.streams.pairs",
    "objective.streams.texts",
)
"""Keys whose values determine the batches of a run."""


@dataclass(frozen=True)
class TrainResult:
    """The steps of a run when it ended, and the signal that stopped it, if any."""

    steps: int
    signal: int | None


def train(
    config: TrainConfig,
    *,
    resume: str = "auto",
    allow_changed_data: bool = False,
    quiet: bool = False,
) -> TrainResult:
    """Take the remaining steps of a run.

    A run that was killed resumes from its newest checkpoint. Its losses are then those of an
    uninterrupted run, on a CPU bit for bit. After SIGTERM or Ctrl-C the step ends, a checkpoint is
    written, and this returns.

    Args:
        config: of the run; the same on every rank.
        resume: `auto` resumes if there is a checkpoint; `never` refuses to; a path is the
            checkpoint, or the run, to start from. If the run has started from there already, it
            resumes from its own newest checkpoint.
        allow_changed_data: resume even if batches would differ from those of the checkpoint's run.
        quiet: print nothing.

    Raises:
        PmdError: the configuration, the data or the checkpoint is unusable, or a loss or gradient
            is not finite.
    """
    run = Path(config.out)
    with (
        handle_signals() as stop,
        init_ranks(config.compute) as ranks,
        lock_run_dir(run) if ranks.is_main else nullcontext(),
    ):
        if config.batch % ranks.size:
            raise PmdError(
                f"a batch of {config.batch} cannot be split equally over {ranks.size} ranks"
            )
        config, data = open_data(config)
        check_evaluation(config.evaluation)
        trainer, changes = _make_trainer(
            config, data, ranks, resume, allow_changed=allow_changed_data
        )
        if ranks.is_main:
            write_whole(str(run / CONFIG), as_toml(config).encode())
            vocabulary = "".join(f"{token}\n" for token in data.wordpiece.vocabulary)
            write_whole(str(run / VOCABULARY), vocabulary.encode())
        first = trainer.progress.steps
        batches = load_batches(
            data,
            first,
            config.steps,
            rank=ranks.rank,
            ranks=ranks.size,
            workers=config.data.workers,
        )
        with (
            closing(RunLogger(run, config, first, quiet=quiet, is_main=ranks.is_main)) as logger,
            closing(batches),  # type: ignore[type-var]  # a generator
        ):
            logger.print(
                f"{run}: step {first:,} of {config.steps:,}, {ranks.size} x {ranks.device}"
            )
            for change in changes:
                logger.print(change)
            _take_steps(trainer, batches, stop, logger)
        return TrainResult(trainer.progress.steps, stop.signal)


def _take_steps(
    trainer: Trainer, batches: Iterable[RankBatch], stop: StopRequest, logger: RunLogger
) -> None:
    """Take the steps; between them evaluate, save and stop when due.

    If a stop is requested when an evaluation is due, the run saves without it, because there may
    be little time. After a resume, the next evaluation is at the next multiple.
    """
    config = trainer.config
    for batch in batches:
        try:
            metrics, stopping = trainer.train_step(batch, stop)
        except NotFinite:
            _save(trainer, logger)  # the steps before are valid
            raise
        logger.log(metrics)
        done = trainer.progress.steps
        last = done == config.steps
        improved = False
        if last or (_is_due(config.evaluation.every, done) and not stopping):
            try:
                evaluation, improved = trainer.evaluate()
            except (PmdError, OSError, RuntimeError):  # the last also if memory is exhausted
                # ranks save a sharded model together, and the others may not have failed
                if trainer.ranks.size == 1 or not config.compute.shard:
                    _save(trainer, logger)
                raise
            if evaluation:
                logger.log(evaluation)
        if last or improved or stopping or _is_due(config.checkpoint.every, done):
            _save(trainer, logger)
        if stopping:
            break


def _save(trainer: Trainer, logger: RunLogger) -> None:
    logger.sync()  # first: a run that resumes from here does not take these steps again
    trainer.save(Path(trainer.config.out))


def open_data(config: TrainConfig) -> tuple[TrainConfig, TrainingData]:
    """The configuration, with the sizes of the vocabularies, and the data.

    Raises:
        PmdError: data is missing, is damaged, or does not fit the model.
    """
    section, model, shares = config.data, config.model, config.objective.streams
    manifests = [
        load_complete_manifest(address)
        for stream in STREAMS
        for address in section.manifests(stream)
        if getattr(shares, stream)
    ]
    if not model.image_vocab:
        sizes = {one.codes.vocabulary for one in manifests if one.codes is not None}
        # without codes, no loss needs them, or `TrainingData` raises
        size = max(sizes, default=FlavaConfig().image_vocab)
        model = replace(model, image_vocab=size)
    if not model.text_vocab and section.tokenizer:  # after the manifests: the hub may be slow
        wordpiece = load_wordpiece(section.tokenizer, section.revision)
        model = replace(model, text_vocab=len(wordpiece.vocabulary))
    needs = load_objective(config.objective).data_needs
    data = TrainingData(section, needs, model, seed=config.seed, batch=config.batch)
    return replace(config, model=model), data


def _make_trainer(
    config: TrainConfig, data: TrainingData, ranks: Ranks, resume: str, *, allow_changed: bool
) -> tuple[Trainer, list[str]]:
    """The trainer, at its first step or resumed; and what differs from the checkpoint's run."""
    objective = load_objective(config.objective)
    step_metrics = load_step_metrics(config.metrics.step_metrics)
    checkpoint = _find_resume(Path(config.out), resume, ranks)
    progress = Progress(
        config=as_tables(config),
        digests=data.digests,
        code={reference: source_digest(reference) for reference in user_references(config)},
        loss_scale=FIRST_LOSS_SCALE if config.compute.precision == "fp16" else 1.0,
        ranks=ranks.size,
    )
    changes = []
    if checkpoint is not None:
        saved = load_progress(checkpoint)
        changes = _changes(checkpoint, saved, progress, allow_changed=allow_changed)
        progress = _resumed(progress, saved, checkpoint.resolve(), Path(config.out).resolve())
    model = init_model(config, data.digests["tokenizer"], from_scratch=checkpoint is None)
    model.to(ranks.device)
    if config.compute.compile:
        model.compile_regions()
    if config.compute.shard and ranks.size > 1:
        shard_model(model, ranks.device)
    optimizer = adamw(model, config.optimizer)
    if checkpoint is not None:
        load_weights(checkpoint, model)
        load_moments(checkpoint, model, optimizer)
    trainer = Trainer(
        config=config,
        objective=objective,
        step_metrics=step_metrics,
        data=data,
        ranks=ranks,
        model=model,
        optimizer=optimizer,
        progress=progress,
    )
    return trainer, changes


def _find_resume(run: Path, resume: str, ranks: Ranks) -> Path | None:
    """The checkpoint to resume from; None to start from scratch."""
    newest = newest_checkpoint(run)
    if resume == "auto":
        steps = broadcast_from_rank_0(-1 if newest is None else newest, ranks.device)
        return None if steps < 0 else run / "checkpoints" / checkpoint_name(steps)
    if resume == "never":
        if newest is not None:
            raise PmdError(f"{run} has checkpoints: name another --out, or use --resume auto")
        return None
    if newest is None:
        return find_checkpoint(Path(resume))
    own = run / "checkpoints" / checkpoint_name(newest)
    names = [run.resolve(), own.resolve()]
    if begun_from := load_progress(own).begun_from:  # the same command may be given again
        names += [Path(begun_from), Path(begun_from).parents[1]]
    if Path(resume).resolve() not in names:
        raise PmdError(
            f"{run} has a checkpoint of {newest:,} steps: name another --out to start from {resume}"
        )
    return own


def _resumed(fresh: Progress, saved: Progress, checkpoint: Path, run: Path) -> Progress:
    update: dict[str, Any] = {"steps": saved.steps, "begun_from": str(checkpoint)}
    if checkpoint.parents[1] == run:  # the best checkpoint of another run is not in this folder
        update |= {"best": saved.best, "begun_from": saved.begun_from}
    if _has_loss_scale(fresh) and _has_loss_scale(saved):  # it may have decreased to 1
        update |= {"loss_scale": saved.loss_scale, "good_steps": saved.good_steps}
    return fresh.model_copy(update=update)


def _has_loss_scale(progress: Progress) -> bool:
    return bool(progress.config["compute"]["precision"] == "fp16")


def _changes(checkpoint: Path, saved: Progress, now: Progress, *, allow_changed: bool) -> list[str]:
    """Differences from the checkpoint's run, as sentences.

    Raises:
        PmdError: the model differs; or batches would differ, and this was not allowed.
    """
    before, after = _by_dotted_key(saved.config), _by_dotted_key(now.config)
    different = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    sentences = []
    for key in sorted(different):
        difference = f"{key} was {before.get(key)} in {checkpoint}, and is {after.get(key)}"
        if key.startswith("model.") and key.split(".")[1] not in _INITIAL_WEIGHTS:
            raise PmdError(f"{difference}: its weights do not fit; name another --out")
        if key in SHAPES_BATCHES and not allow_changed:
            raise PmdError(f"{difference}: batches would differ; restore the value, {_ALLOW}")
        if not key.startswith(("data.", "out")) or key in SHAPES_BATCHES:
            sentences.append(difference)
    for stream in sorted(saved.digests.keys() | now.digests.keys()):
        old, new = saved.digests.get(stream, "none"), now.digests.get(stream, "none")
        if old != new:
            difference = f"{stream}: {checkpoint} was trained on {old}, and this is {new}"
            if not allow_changed:
                raise PmdError(f"{difference}; name the data of that run, {_ALLOW}")
            sentences.append(difference)
    for reference, digest in now.code.items():
        if saved.code.get(reference, digest) != digest:
            sentences.append(f"{reference}: its source file differs from that of {checkpoint}")
    return sentences


_INITIAL_WEIGHTS = {"init_image", "init_text", "weights", "revision"}
_ALLOW = "or resume anyway with --allow-changed-data"


def _by_dotted_key(tables: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            values |= {f"{key}.{inner}": one for inner, one in _by_dotted_key(value).items()}
        else:
            values[key] = value
    return values


def _is_due(every: int, done: int) -> bool:
    return bool(every) and done % every == 0
