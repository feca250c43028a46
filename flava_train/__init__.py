"""Train FLAVA from the shards that `pmd_pipeline` builds; see `docs/python.md`.

The names below are loaded when they are first used, so importing the package does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flava_train.data.pair_dataset import ImageTextPair, PairDataset
    from flava_train.data.wordpiece import WordPiece, load_wordpiece
    from flava_train.evaluation.result import EvaluationResult
    from flava_train.evaluation.search import SearchHit, search
    from flava_train.evaluation.trained_model import TrainedModel, load_trained_model

__all__ = [
    "EvaluationResult",
    "ImageTextPair",
    "PairDataset",
    "SearchHit",
    "TrainedModel",
    "WordPiece",
    "load_trained_model",
    "load_wordpiece",
    "search",
]

_MODULES = {
    "EvaluationResult": "flava_train.evaluation.result",
    "ImageTextPair": "flava_train.data.pair_dataset",
    "PairDataset": "flava_train.data.pair_dataset",
    "SearchHit": "flava_train.evaluation.search",
    "TrainedModel": "flava_train.evaluation.trained_model",
    "WordPiece": "flava_train.data.wordpiece",
    "load_trained_model": "flava_train.evaluation.trained_model",
    "load_wordpiece": "flava_train.data.wordpiece",
    "search": "flava_train.evaluation.search",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  # any of the names above
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
