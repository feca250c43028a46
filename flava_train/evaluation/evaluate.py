"""All evaluations that a configuration names, and their check before the first step.

Every rank computes all of them: sharded weights are gathered by all ranks at the same time, and no
results have to be exchanged.
"""

from pathlib import Path

import torch

from flava_train.config import EvaluationConfig
from flava_train.data.file_cache import FileCache
from flava_train.data.manifests import check_manifest
from flava_train.data.wordpiece import WordPiece
from flava_train.evaluation.batches import evaluation_batches
from flava_train.evaluation.embedder import Embedder
from flava_train.evaluation.result import EvaluationResult
from flava_train.evaluation.retrieval import retrieval_recall
from flava_train.evaluation.zero_shot import class_names, zero_shot_accuracy
from flava_train.model.flava import Flava
from flava_train.run.ranks import free_gathered
from pmd_pipeline.contract.errors import PmdError


@torch.no_grad()
def evaluate(
    model: Flava,
    wordpiece: WordPiece,
    config: EvaluationConfig,
    *,
    caption_tokens: int,
    files: FileCache,
    autocast: torch.dtype | None = None,
) -> EvaluationResult:
    """The results of all evaluations that the configuration names.

    The model runs eagerly: batches have as many shapes as captions have lengths, more than the
    compiler would specialise for.

    Raises:
        PmdError: the manifest or the folder of classes cannot be used.
    """
    result = EvaluationResult({}, {})
    embedder = Embedder(model, wordpiece, caption_tokens, config.batch, autocast)
    with torch.compiler.set_stance("force_eager"):
        if config.retrieval:
            size = model.config.image_size
            batches = evaluation_batches(
                config.retrieval, wordpiece, size, caption_tokens, batch=config.batch, files=files
            )
            result |= retrieval_recall(*embedder.images_and_captions(batches))
        if config.classes:
            result |= zero_shot_accuracy(embedder, Path(config.classes))
    free_gathered(model)
    return result


def check_evaluation(config: EvaluationConfig) -> None:
    """Check that the named evaluations can run and give the named metric.

    Raises:
        PmdError: they cannot, or do not.
    """
    if config.retrieval:
        manifest, sources = check_manifest(config.retrieval)
        num_images = sum(one.images for one in sources)
        if manifest.kind != "pairs" or not num_images:
            raise PmdError(
                f"evaluation.retrieval = {config.retrieval} holds no pairs to evaluate on, but "
                f"{num_images} images of kind {manifest.kind}: name another"
            )
    if config.classes:
        class_names(Path(config.classes))
    needed = "classes" if config.metric.startswith("zero_shot") else "retrieval"
    if (config.retrieval or config.classes) and not getattr(config, needed):
        raise PmdError(
            f"evaluation.metric = {config.metric} needs evaluation.{needed}; name it, or another "
            "metric"
        )
