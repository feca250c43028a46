"""A trained model, loaded from a checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flava_train.config import TrainConfig, validate_config
from flava_train.data.wordpiece import WordPiece, load_wordpiece
from flava_train.evaluation.evaluate import check_evaluation, evaluate
from flava_train.evaluation.result import EvaluationResult
from flava_train.model.flava import Flava
from flava_train.run.checkpoint import find_checkpoint, load_progress, load_weights
from flava_train.run.run_dir import VOCABULARY
from pmd_pipeline.contract.errors import PmdError


@dataclass(frozen=True)
class TrainedModel:
    """The model of a checkpoint, with its run's configuration and tokenizer."""

    checkpoint: Path
    config: TrainConfig
    model: Flava
    wordpiece: WordPiece

    def evaluate(self, manifest: str | None, classes: str | None) -> EvaluationResult:
        """Evaluate on a manifest, on classes, or, if neither is named, as the run was configured.

        Raises:
            PmdError: there is nothing to evaluate on, or it cannot be used.
        """
        section = self.config.evaluation
        if manifest or classes:
            section = replace(section, retrieval=manifest, classes=classes)
        if not (section.retrieval or section.classes):
            raise PmdError(f"{self.checkpoint}: name a manifest of held-out pairs, or --classes")
        check_evaluation(
            replace(section, metric="text_to_image_r1" if section.retrieval else "zero_shot_top1")
        )
        data = self.config.data
        return evaluate(
            self.model,
            self.wordpiece,
            section,
            caption_tokens=data.caption_tokens,
            files=data.file_cache(),
        )


def load_trained_model(place: Path, *, best: bool = False) -> TrainedModel:
    """Load a model to evaluate; it is on the GPU, if there is one.

    Args:
        place: a run, or one of its checkpoints.
        best: of a run, take the best checkpoint, not the newest.

    Raises:
        PmdError: there is no checkpoint, it cannot be read, or its tokenizer is not the run's.
    """
    checkpoint = find_checkpoint(place, best=best)
    progress = load_progress(checkpoint)
    config = validate_config(progress.config, source=str(checkpoint))
    # the run's own copy, since the user's file may have changed
    vocabulary = checkpoint.absolute().parents[1] / VOCABULARY
    wordpiece = load_wordpiece(str(vocabulary))
    if wordpiece.sha256 != progress.digests["tokenizer"]:
        raise PmdError(f"{vocabulary} is not the vocabulary that {checkpoint} was trained with")
    # evaluation reads no head, and the code of the user's own losses may be absent
    model = Flava(config.model, replace(config.objective, losses={}).heads)
    load_weights(checkpoint, model)
    return TrainedModel(
        checkpoint, config, model.to("cuda" if torch.cuda.is_available() else "cpu"), wordpiece
    )
