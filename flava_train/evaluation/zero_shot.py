"""Zero-shot classification of the images in a folder of classes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flava_train.evaluation.embedder import Embedder
from flava_train.evaluation.result import EvaluationResult
from flava_train.evaluation.templates import IMAGENET_TEMPLATES
from flava_train.shapes import Float, UInt
from pmd_pipeline.contract.errors import PmdError


def zero_shot_accuracy(embedder: Embedder, folder: Path) -> EvaluationResult:
    """Share of images whose class is the most similar one, or among the five most similar.

    The vector of a class is the mean over CLIP's 80 templates of its name, normalised. Files that
    are no images are left out; their share is the metric `zero_shot_unreadable`.

    Args:
        embedder: of the model.
        folder: one folder of images for each class, see `class_names`.

    Raises:
        PmdError: there are no classes, or no images in them.
    """
    classes = class_names(folder)
    vectors = torch.stack([_class_vector(embedder, name) for name in classes.values()])
    size = embedder.model.config.image_size
    num_top = min(5, len(classes))
    top1 = top5 = count = unreadable = 0
    for number, name in enumerate(classes):
        for paths in _batched(sorted((folder / name).iterdir()), embedder.batch):
            loaded = [_load_pixels(path, size) for path in paths]
            pixels = [image for image in loaded if image is not None]
            unreadable += len(loaded) - len(pixels)
            if not pixels:
                continue
            similarity = embedder.images(torch.stack(pixels)) @ vectors.T
            is_correct = similarity.topk(num_top).indices == number
            top1 += int(is_correct[:, 0].sum())
            top5 += int(is_correct.any(1).sum())
            count += len(pixels)
    if not count:
        raise PmdError(f"{folder}: no images in the folders of its classes")
    metrics = {"zero_shot_top1": top1 / count, "zero_shot_top5": top5 / count}
    if unreadable:
        metrics["zero_shot_unreadable"] = unreadable / (unreadable + count)
    chance = {"zero_shot_top1": 1 / len(classes), "zero_shot_top5": num_top / len(classes)}
    return EvaluationResult(metrics, chance)


def class_names(folder: Path) -> dict[str, str]:
    """Names of classes by the names of their folders, sorted.

    A class has the name of its folder, with blanks for underscores, unless a file `classes.tsv`
    gives names: in each line a folder, a tab and a name.

    Raises:
        PmdError: there is no class, or `classes.tsv` leaves one out.
    """
    if not folder.is_dir():
        raise PmdError(f"{folder}: no such folder of classes")
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not folders:
        raise PmdError(f"{folder}: it has no folder of a class")
    table = folder / "classes.tsv"
    if not table.is_file():
        return {name: name.replace("_", " ") for name in folders}
    lines = table.read_text(encoding="utf-8").splitlines()
    names = dict(line.split("\t", 1) for line in lines if "\t" in line)
    if missing := [name for name in folders if name not in names]:
        raise PmdError(f"{table}: no line names the class of the folder {missing[0]}")
    return {name: names[name] for name in folders}


def _class_vector(embedder: Embedder, name: str) -> Float[Tensor, " d"]:
    vectors = embedder.texts([template.format(name) for template in IMAGENET_TEMPLATES])
    return torch.nn.functional.normalize(vectors.mean(0), dim=0)


def _batched(paths: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


def _load_pixels(path: Path, size: int) -> UInt[Tensor, "3 {size} {size}"] | None:
    """The whole image, resized to a square as in training; None if the file is no image."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    resized = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized.copy()).permute(2, 0, 1)
