"""What the model has learnt, on what it never saw: retrieval and classification, zero-shot.

Every rank computes all of it, so that shared-out weights are gathered by all at the same time
and nothing has to be exchanged.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flava_train.config import EvaluationConfig
from flava_train.data.config import DataConfig
from flava_train.data.file_cache import FileCache
from flava_train.data.manifests import check_manifest
from flava_train.data.wordpiece import WordPiece
from flava_train.evaluation.batches import EvaluationBatch, evaluation_batches
from flava_train.evaluation.templates import TEMPLATES
from flava_train.model.flava import Flava
from flava_train.run.ranks import forget_gathered
from flava_train.shapes import Float, Int, UInt
from pmd_pipeline.contract.errors import PmdError

RANKS = (1, 5, 10)
"""Recall is given at these."""

_ROWS = 512
"""Queries compared at once; it bounds memory."""


@dataclass(frozen=True)
class EvaluationResult:
    """Figures by name, between 0 and 1, and what guessing would give for the same."""

    figures: dict[str, float]
    chance: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """As a line of metrics has it."""
        return {**self.figures, "chance": self.chance}

    def __or__(self, other: "EvaluationResult") -> "EvaluationResult":
        return EvaluationResult(self.figures | other.figures, self.chance | other.chance)


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
    """All that the configuration names.

    Nothing is compiled for it: batches have as many shapes as there are lengths of captions, and
    a compiler that is made for few would give up.

    Raises:
        PmdError: the manifest or the folder of classes is not what it should be.
    """
    found = EvaluationResult({}, {})
    encoder = Embedder(model, wordpiece, caption_tokens, config.batch, autocast)
    with torch.compiler.set_stance("force_eager"):
        if config.retrieval:
            size = model.config.image_size
            batches = evaluation_batches(
                config.retrieval, wordpiece, size, caption_tokens, batch=config.batch, files=files
            )
            found |= retrieval_recall(*encoder.held_out(batches))
        if config.classes:
            found |= zero_shot_accuracy(encoder, Path(config.classes))
    forget_gathered(model)
    return found


def check_evaluation(config: EvaluationConfig) -> None:
    """See before the first step that what is named can be evaluated.

    Raises:
        PmdError: it cannot, or its metric is not among what will be found.
    """
    if config.retrieval:
        manifest, found = check_manifest(config.retrieval)
        if manifest.kind != "pairs" or not any(one.images for one in found):
            raise PmdError(
                f"evaluation.retrieval = {config.retrieval} holds no pairs to evaluate on, but "
                f"{sum(one.images for one in found)} images of kind {manifest.kind}: name another"
            )
    if config.classes:
        class_names(Path(config.classes))
    wanted = "classes" if config.metric.startswith("zero_shot") else "retrieval"
    if (config.retrieval or config.classes) and not getattr(config, wanted):
        raise PmdError(
            f"evaluation.metric = {config.metric} needs evaluation.{wanted}; name it, or another "
            "metric"
        )


def file_cache(data: DataConfig) -> FileCache:
    """Where held-out shards are looked for: where all others are."""
    cache = Path(data.cache) if data.cache else None
    return FileCache(cache, int(data.cache_gib * 2**30), verify=data.verify)


@dataclass(frozen=True)
class Embedder:
    """A model that embeds batch by batch."""

    model: Flava
    wordpiece: WordPiece
    caption_tokens: int
    batch: int
    autocast: torch.dtype | None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.logit_scale.device

    def held_out(
        self, batches: Iterable[EvaluationBatch]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"], Int[Tensor, " m"]]:
        """Embeddings of images and of captions, and the image of each caption."""
        images, texts, numbers = [], [], []
        for one in batches:
            images.append(self.images(one.pixels))
            texts.append(self._texts(one.tokens, one.lengths))
            numbers.append(one.image_numbers)
        if not images:
            raise PmdError("there is no held-out image to evaluate on")
        return torch.cat(images), torch.cat(texts), torch.cat(numbers).to(self.device)

    def images(self, pixels: Tensor) -> Float[Tensor, "b d"]:
        """Unit vectors of uint8 images."""
        with self._precision():
            return self.model.embed_images(pixels.to(self.device)).float()

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Unit vectors of texts."""
        tokens, lengths = self.wordpiece.encode(texts, self.caption_tokens)
        return self._texts(torch.from_numpy(tokens), torch.from_numpy(lengths))

    def _texts(self, tokens: Int[Tensor, "b l"], lengths: Int[Tensor, " b"]) -> Tensor:
        found = []
        for rows in torch.arange(len(tokens)).split(self.batch):
            longest = int(lengths[rows].max())
            some, of = tokens[rows, :longest].to(self.device), lengths[rows].to(self.device)
            with self._precision():
                found.append(self.model.embed_texts(some, of).float())
        return torch.cat(found)

    def _precision(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)


def retrieval_recall(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], numbers: Int[Tensor, " m"]
) -> EvaluationResult:
    """Recall at 1, 5 and 10, in both directions, as in the CLIP papers.

    Each caption looks for its one image; each image for any one of its captions. Where several
    candidates are equally near, it counts how likely the right one comes first in a random order
    of them; so a model that finds all alike gets what guessing gets, and no more.

    Args:
        images: unit vectors.
        texts: unit vectors.
        numbers: row of `images` that each text belongs to.
    """
    order = torch.argsort(numbers, stable=True)
    counts = torch.bincount(numbers, minlength=len(images))
    sought = order.split(counts.tolist())
    figures, chance = {}, {}
    all_images = torch.arange(len(images), device=images.device)
    captioned = all_images[counts > 0].tolist()
    for name, queries, keys, targets in (
        ("text_to_image", texts, images, list(numbers[:, None])),
        ("image_to_text", images[counts > 0], texts, [sought[image] for image in captioned]),
    ):
        found = _expected_recall(queries, keys, targets)
        # vectors of no numbers: all are equally near
        guessed = _expected_recall(queries[:, :0], keys[:, :0], targets)
        for rank, hit, luck in zip(RANKS, found, guessed, strict=True):
            figures[f"{name}_r{rank}"], chance[f"{name}_r{rank}"] = hit, luck
    return EvaluationResult(figures, chance)


def _expected_recall(
    queries: Float[Tensor, "q d"], keys: Float[Tensor, "k d"], targets: Sequence[Tensor]
) -> list[float]:
    """Mean chance that one of a query's targets is among the first, for each of `RANKS`."""
    widest = max(len(target) for target in targets)
    right = torch.full((len(targets), widest), -1, device=queries.device)
    for row, target in enumerate(targets):
        right[row, : len(target)] = target
    sums = torch.zeros(len(RANKS), dtype=torch.float64)
    for rows in torch.arange(len(queries), device=queries.device).split(_ROWS):
        likeness = queries[rows] @ keys.T  # rows k
        own = likeness.gather(1, right[rows].clamp_min(0))
        own = own.masked_fill(right[rows] < 0, -math.inf)
        best = own.max(1, keepdim=True).values
        nearer = (likeness > best).sum(1)
        level = (likeness == best).sum(1)
        good = (own == best).sum(1)
        sums += _first(nearer.double().cpu(), level.double().cpu(), good.double().cpu())
    return (sums / len(queries)).tolist()


def _first(
    nearer: Float[Tensor, " q"], level: Float[Tensor, " q"], good: Float[Tensor, " q"]
) -> Float[Tensor, " ranks"]:
    """Sum over queries of the chance that a good one is among the first.

    `nearer` candidates come before; then `level` ones in random order, of which some are good.
    """
    missed = torch.ones_like(nearer)  # chance that none of the places so far has a good one
    hits = []
    for place in range(max(RANKS)):
        drawn = place - nearer  # level ones in the places before this
        here = (drawn >= 0) & (drawn < level)
        bad = (level - good - drawn).clamp_min(0) / (level - drawn).clamp_min(1)
        missed = torch.where(here, missed * bad, missed)
        if place + 1 in RANKS:
            hits.append((1 - missed).sum())
    return torch.stack(hits)


def zero_shot_accuracy(encoder: Embedder, folder: Path) -> EvaluationResult:
    """Share of images whose class is the nearest, or among the five nearest, of all.

    Files that cannot be read as images are left out, and their share is told.

    A class is the mean of its name in CLIP's 80 sentences. Its name is that of its folder, with
    blanks for underscores, or stands behind it and a tab in a file `classes.tsv`.

    Args:
        encoder: of the model.
        folder: one folder of images for each class.

    Raises:
        PmdError: there are no classes, or no images in them.
    """
    classes = class_names(folder)
    names = torch.stack([_class_vector(encoder, name) for name in classes.values()])
    tops = min(5, len(classes))
    top1 = top5 = count = unreadable = 0
    for number, name in enumerate(classes):
        for paths in _batched(sorted((folder / name).iterdir()), encoder.batch):
            views = [_view(path, encoder.model.config.image_size) for path in paths]
            pixels = [view for view in views if view is not None]
            unreadable += len(views) - len(pixels)
            if not pixels:
                continue
            likeness = encoder.images(torch.stack(pixels)) @ names.T
            found = likeness.topk(tops).indices == number
            top1 += int(found[:, 0].sum())
            top5 += int(found.any(1).sum())
            count += len(pixels)
    if not count:
        raise PmdError(f"{folder}: no images in the folders of its classes")
    figures = {"zero_shot_top1": top1 / count, "zero_shot_top5": top5 / count}
    if unreadable:
        figures["zero_shot_unreadable"] = unreadable / (unreadable + count)
    chance = {"zero_shot_top1": 1 / len(classes), "zero_shot_top5": tops / len(classes)}
    return EvaluationResult(figures, chance)


def class_names(folder: Path) -> dict[str, str]:
    """Names of classes by the names of their folders, sorted.

    Raises:
        PmdError: there is no class, or `classes.tsv` leaves one out.
    """
    if not folder.is_dir():
        raise PmdError(f"{folder}: no such folder of classes")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not found:
        raise PmdError(f"{folder}: it has no folder of a class")
    table = folder / "classes.tsv"
    if not table.is_file():
        return {name: name.replace("_", " ") for name in found}
    lines = table.read_text(encoding="utf-8").splitlines()
    said = dict(line.split("\t", 1) for line in lines if "\t" in line)
    if missing := [name for name in found if name not in said]:
        raise PmdError(f"{table}: no line names the class of the folder {missing[0]}")
    return {name: said[name] for name in found}


def _class_vector(encoder: Embedder, name: str) -> Float[Tensor, " d"]:
    sentences = encoder.texts([template.format(name) for template in TEMPLATES])
    return torch.nn.functional.normalize(sentences.mean(0), dim=0)


def _batched(paths: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


def _view(path: Path, size: int) -> UInt[Tensor, "3 {size} {size}"] | None:
    """The whole image of a file, made square as in training; None if it is none."""
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    made = np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(made.copy()).permute(2, 0, 1)
