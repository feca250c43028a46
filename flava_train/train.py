"""A run: from a configuration to checkpoints and metrics. Read `train` first."""

from collections.abc import Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flava_train.config import TrainConfig, as_tables, as_toml
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
    find,
    load_moments,
    load_progress,
    load_weights,
    newest,
)
from flava_train.run.init import beginning
from flava_train.run.metrics import Metrics
from flava_train.run.optimizer import adamw
from flava_train.run.ranks import Ranks, as_rank_0_has_it, joined, shard
from flava_train.run.run_dir import CONFIG, VOCABULARY, Stop, only_writer, told_to_stop, write_whole
from flava_train.trainer import FIRST_LOSS_SCALE, Learner, NotFinite
from pmd_pipeline.contract.errors import PmdError

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
"""Values on which it depends what a step sees."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after so many steps, and by which signal, if one told it to stop."""

    steps: int
    signal: int | None


def train(
    config: TrainConfig,
    *,
    resume: str = "auto",
    allow_changed_data: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Take the steps of a run that are still to be taken.

    A run that was killed goes on from its newest checkpoint, and has the losses, bit for bit on a
    CPU, of one that was left alone. SIGTERM and Ctrl-C let the step end, save, and return.

    Args:
        config: of the run; every rank gets the same.
        resume: `auto` goes on where there is a checkpoint, `never` refuses to, and a path names
            the checkpoint, or the run, to go on from; one that began from there goes on from
            its own newest.
        allow_changed_data: go on even if steps would see other data than the checkpoint's run.
        quiet: show nothing while it goes.

    Raises:
        PmdError: the configuration, the data or the checkpoint cannot be used, or a loss or
            gradient is not finite.
    """
    run = Path(config.out)
    with (
        told_to_stop() as stop,
        joined(config.compute) as ranks,
        only_writer(run) if ranks.writes else nullcontext(),
    ):
        if config.batch % ranks.size:
            raise PmdError(f"{ranks.size} ranks cannot share a batch of {config.batch} equally")
        config, streams = open_data(config)
        check_evaluation(config.evaluation)
        learner, changes = _learner(
            config, streams, ranks, resume, allow_changed=allow_changed_data
        )
        if ranks.writes:
            write_whole(run / CONFIG, as_toml(config).encode())
            pieces = streams.wordpiece.vocabulary
            write_whole(run / VOCABULARY, "".join(f"{piece}\n" for piece in pieces).encode())
        first = learner.progress.steps
        steps = load_batches(
            streams,
            first,
            config.steps,
            rank=ranks.rank,
            ranks=ranks.size,
            workers=config.data.workers,
        )
        with (
            closing(Metrics(run, config, first, quiet=quiet, writes=ranks.writes)) as metrics,
            closing(steps),  # type: ignore[type-var]  # a generator
        ):
            metrics.say(f"{run}: step {first:,} of {config.steps:,}, {ranks.size} x {ranks.device}")
            for change in changes:
                metrics.say(change)
            _loop(learner, steps, stop, metrics)
        return Outcome(learner.progress.steps, stop.signal)


def _loop(learner: Learner, steps: Iterable[RankBatch], stop: Stop, metrics: Metrics) -> None:
    """Take the steps; between them evaluate, save and stop, as it is time to.

    A run that is told to stop where an evaluation is due saves without it: there may be little
    time. What goes on from there evaluates when it is due again.
    """
    config = learner.config
    for batch in steps:
        try:
            figures, stopping = learner.learn(batch, stop)
        except NotFinite:
            _save(learner, metrics)  # what was learnt before is sound
            raise
        metrics.show(figures)
        done = learner.progress.steps
        last = done == config.steps
        improved = False
        if last or (_every(config.evaluation.every, done) and not stopping):
            try:
                found, improved = learner.evaluate()
            except (PmdError, OSError, RuntimeError):  # the last also where memory is short
                # of what is shared out all ranks save together, and others may not have failed
                if learner.ranks.size == 1 or not config.compute.shard:
                    _save(learner, metrics)
                raise
            if found:
                metrics.show(found)
        if last or improved or stopping or _every(config.checkpoint.every, done):
            _save(learner, metrics)
        if stopping:
            break


def _save(learner: Learner, metrics: Metrics) -> None:
    metrics.sync()  # first: a run that goes on from here takes none of these steps again
    learner.save(Path(learner.config.out))


def open_data(config: TrainConfig) -> tuple[TrainConfig, TrainingData]:
    """The configuration with the sizes of vocabularies in it, and the data.

    Raises:
        PmdError: data is missing, is not to be trusted, or does not fit.
    """
    data, model, shares = config.data, config.model, config.objective.streams
    manifests = [
        load_complete_manifest(address)
        for stream in STREAMS
        for address in data.manifests(stream)
        if getattr(shares, stream)
    ]
    if not model.image_vocab:
        sizes = {one.codes.vocabulary for one in manifests if one.codes is not None}
        # where nothing has codes, nothing needs them, or `TrainingData` will say so
        size = max(sizes, default=FlavaConfig().image_vocab)
        model = replace(model, image_vocab=size)
    if not model.text_vocab and data.tokenizer:  # after the manifests: the hub may be slow
        wordpiece = load_wordpiece(data.tokenizer, data.revision)
        model = replace(model, text_vocab=len(wordpiece.vocabulary))
    streams = TrainingData(
        data, config.objective.data_needs, model, seed=config.seed, batch=config.batch
    )
    return replace(config, model=model), streams


def _learner(
    config: TrainConfig, streams: TrainingData, ranks: Ranks, resume: str, *, allow_changed: bool
) -> tuple[Learner, list[str]]:
    """Model and optimizer, at the beginning or as they were; and what is not as it was."""
    checkpoint = _checkpoint(Path(config.out), resume, ranks)
    progress = Progress(
        config=as_tables(config),
        digests=streams.digests,
        loss_scale=FIRST_LOSS_SCALE if config.compute.precision == "fp16" else 1.0,
        ranks=ranks.size,
    )
    changes = []
    if checkpoint is not None:
        saved = load_progress(checkpoint)
        changes = _changes(checkpoint, saved, progress, allow_changed=allow_changed)
        progress = _gone_on(progress, saved, checkpoint.resolve(), Path(config.out).resolve())
    model = beginning(config, streams.digests["tokenizer"], from_scratch=checkpoint is None)
    model.to(ranks.device)
    if config.compute.compile:
        model.compile_regions()
    if config.compute.shard and ranks.size > 1:
        shard(model, ranks.device)
    optimizer = adamw(model, config.optimizer)
    if checkpoint is not None:
        load_weights(checkpoint, model)
        load_moments(checkpoint, model, optimizer)
    return Learner(config, streams, ranks, model, optimizer, progress), changes


def _checkpoint(run: Path, resume: str, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from; None to begin."""
    there = newest(run)
    if resume == "auto":
        steps = as_rank_0_has_it(-1 if there is None else there, ranks.device)
        return None if steps < 0 else run / "checkpoints" / checkpoint_name(steps)
    if resume == "never":
        if there is not None:
            raise PmdError(
                f"{run} has checkpoints: name another --out, or go on with --resume auto"
            )
        return None
    if there is None:
        return find(Path(resume))
    own = run / "checkpoints" / checkpoint_name(there)
    names = [run.resolve(), own.resolve()]
    if begun_from := load_progress(own).begun_from:  # the same command may be given again
        names += [Path(begun_from), Path(begun_from).parents[1]]
    if Path(resume).resolve() not in names:
        raise PmdError(
            f"{run} has a checkpoint of {there:,} steps: name another --out to go on from {resume}"
        )
    return own


def _gone_on(fresh: Progress, saved: Progress, checkpoint: Path, run: Path) -> Progress:
    update: dict[str, Any] = {"steps": saved.steps, "begun_from": str(checkpoint)}
    if checkpoint.parents[1] == run:  # another run's best is not in this one's folder
        update |= {"best": saved.best, "begun_from": saved.begun_from}
    if _has_loss_scale(fresh) and _has_loss_scale(saved):  # which may have come down to 1
        update |= {"loss_scale": saved.loss_scale, "good_steps": saved.good_steps}
    return fresh.model_copy(update=update)


def _has_loss_scale(progress: Progress) -> bool:
    return bool(progress.config["compute"]["precision"] == "fp16")


def _changes(checkpoint: Path, saved: Progress, now: Progress, *, allow_changed: bool) -> list[str]:
    """What is not as it was in the checkpoint's run, in sentences.

    Raises:
        PmdError: the model is another; or steps would see other data, and nobody allowed it.
    """
    was, now_is = _values(saved.config), _values(now.config)
    different = [key for key in was.keys() | now_is.keys() if was.get(key) != now_is.get(key)]
    said = []
    for key in sorted(different):
        difference = f"{key} was {was.get(key)} in {checkpoint}, and is {now_is.get(key)}"
        if key.startswith("model.") and key.split(".")[1] not in _WHERE_WEIGHTS_ARE:
            raise PmdError(f"{difference}: its weights do not fit; name another --out")
        if key in SHAPES_BATCHES and not allow_changed:
            raise PmdError(f"{difference}: steps would see other data; set it back, {_ALLOW}")
        if not key.startswith(("data.", "out")) or key in SHAPES_BATCHES:
            said.append(difference)
    for stream in sorted(saved.digests.keys() | now.digests.keys()):
        old, new = saved.digests.get(stream, "none"), now.digests.get(stream, "none")
        if old != new:
            difference = f"{stream}: {checkpoint} has learnt from {old}, and this is {new}"
            if not allow_changed:
                raise PmdError(f"{difference}; name the data it began with, {_ALLOW}")
            said.append(difference)
    return said


_WHERE_WEIGHTS_ARE = {"init_image", "init_text", "weights", "revision"}
_ALLOW = "or go on all the same with --allow-changed-data"


def _values(tables: Mapping[str, Any]) -> dict[str, Any]:
    """All values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": one for inner, one in _values(value).items()}
        else:
            found[key] = value
    return found


def _every(steps: int, done: int) -> bool:
    return bool(steps) and done % steps == 0
