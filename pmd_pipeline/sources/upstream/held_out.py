"""Karpathy's held-out COCO images, which no source may bring back into the training pairs."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from pmd_pipeline.sources.upstream.files import UpstreamFile, find, fits, json_items

KARPATHY_FILE = "dataset_coco.json"
"""The only file that names the split of every COCO image."""


@dataclass(frozen=True)
class HeldOutImages:
    """Where the held-out ids are read from."""

    file: UpstreamFile

    def coco_ids(self) -> frozenset[int]:
        """COCO ids of the images in Karpathy's val and test splits (10,000 in the real file)."""
        return _coco_ids(self.file)


def find_heldout(folders: Iterable[str]) -> HeldOutImages | None:
    """The first `dataset_coco.json` in the folders, plain or packed; None without one."""
    for folder in folders:
        for file in find(folder):
            if fits(file, KARPATHY_FILE):
                return HeldOutImages(file)
    return None


@lru_cache(maxsize=4)
def _coco_ids(file: UpstreamFile) -> frozenset[int]:
    return frozenset(
        int(image["cocoid"])
        for image in json_items(file, "images.item")
        if isinstance(image, dict)
        and image.get("split") in {"val", "test"}
        and isinstance(image.get("cocoid"), int)
    )
