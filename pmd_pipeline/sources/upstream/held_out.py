"""Karpathy's held-out COCO images, which no source may add to the training pairs."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from pmd_pipeline.sources.upstream.files import UpstreamFile, json_items, matches

KARPATHY_FILE = "dataset_coco.json"
"""The file that states Karpathy's split of every COCO image."""


@dataclass(frozen=True)
class HeldOutImages:
    """The file with the held-out ids."""

    file: UpstreamFile

    def coco_ids(self) -> frozenset[int]:
        """COCO ids of the images in Karpathy's val and test splits (10,000 in the real file)."""
        return _coco_ids(self.file)


def find_held_out(files: Iterable[UpstreamFile]) -> HeldOutImages | None:
    """The first `dataset_coco.json` among the files; None without one."""
    return next((HeldOutImages(file) for file in files if matches(file, KARPATHY_FILE)), None)


@lru_cache(maxsize=4)
def _coco_ids(file: UpstreamFile) -> frozenset[int]:
    return frozenset(
        int(image["cocoid"])
        for image in json_items(file, "images.item")
        if isinstance(image, dict)
        and image.get("split") in {"val", "test"}
        and isinstance(image.get("cocoid"), int)
    )
