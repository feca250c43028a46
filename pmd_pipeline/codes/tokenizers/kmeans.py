"""Patch k-means: the code of a patch is the number of the nearest of some patches seen before.

A stand-in for DALL-E's dVAE that needs no weights from anywhere: it knows colours and edges, not
things. All its sums are whole numbers that float32 holds exactly (even ones up to 2**25, others up
to 2**24), so that codes are bit-equal on every machine, whatever the order in which a BLAS adds.
"""

import numpy as np
from numpy.typing import NDArray

from pmd_pipeline.contract.errors import PmdError

PATCH = 8
"""Pixels of a patch's side, as of a code of DALL-E's dVAE."""

_VALUES = PATCH * PATCH * 3
_ROWS = 2048
"""Patches compared at a time, so that memory does not grow with images times codes."""

_STEPS = 12
_FITTING = 50
"""Patches per code that Lloyd's steps see, drawn from all."""

_SEEDING = 8
"""Patches per code that k-means++ chooses from; it looks at each of them for each code."""


class KMeans:
    """Patch k-means with `centroids` uint8 [v, 8, 8, 3]."""

    batch = 64

    def __init__(self, centroids: NDArray[np.uint8]) -> None:
        self.versions: dict[str, str] = {}
        self._centroids = centroids.reshape(len(centroids), _VALUES)

    def codes(self, images: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """See `Tokenizer.codes`."""
        grid = images.shape[1] // PATCH
        nearest = _nearest(patches(images), self._centroids)
        return nearest.astype(np.uint16).reshape(len(images), grid, grid)

    def picture(self, codes: NDArray[np.uint16]) -> NDArray[np.uint8]:
        """What codes [g, g] stand for, as RGB [8 g, 8 g, 3]."""
        grid = len(codes)
        tiles = self._centroids[codes].reshape(grid, grid, PATCH, PATCH, 3)
        return tiles.transpose(0, 2, 1, 3, 4).reshape(grid * PATCH, grid * PATCH, 3)


def patches(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The patches [b g g, 192] of images [b, 8 g, 8 g, 3], row by row."""
    grid = images.shape[1] // PATCH
    tiles = images.reshape(len(images), grid, PATCH, grid, PATCH, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, _VALUES)


def fit(seen: NDArray[np.uint8], vocabulary: int, seed: int) -> NDArray[np.uint8]:
    """Centroids [vocabulary, 8, 8, 3] of patches [n, 192], by k-means++ and Lloyd's steps.

    Raises:
        PmdError: there are fewer different patches than codes.
    """
    dice = np.random.Philox(key=seed)
    seen = seen[np.argsort(dice.random_raw(len(seen)), kind="stable")[: _FITTING * vocabulary]]
    distinct = np.unique(seen, axis=0)
    if len(distinct) < vocabulary:
        raise PmdError(
            f"the images looked at have {len(distinct):,} different patches, too few for "
            f"{vocabulary:,} codes: give a smaller --vocabulary"
        )
    centroids = _far_apart(distinct, vocabulary, dice)
    before: NDArray[np.int64] | None = None
    for _ in range(_STEPS):
        nearest = _nearest(seen, centroids)
        if before is not None and np.array_equal(nearest, before):
            break
        before = nearest
        centroids = _means(seen, nearest, centroids)
    return centroids.reshape(vocabulary, PATCH, PATCH, 3)


def _far_apart(
    distinct: NDArray[np.uint8], count: int, dice: np.random.Philox
) -> NDArray[np.uint8]:
    """The first centroids: each drawn with chances by its squared distance from those before."""
    order = np.argsort(dice.random_raw(len(distinct)), kind="stable")
    points = distinct[order[: _SEEDING * count]]
    values = points.astype(np.float32)
    squares = (values * values).sum(1)
    chosen = [0]
    away = np.full(len(points), np.inf, dtype=np.float32)
    for raw in dice.random_raw(count - 1).tolist():
        last = chosen[-1]
        away = np.minimum(away, squares - 2 * (values @ values[last]) + squares[last])
        reached = np.cumsum(away.astype(np.int64))
        chosen.append(int(np.searchsorted(reached, raw % int(reached[-1]), side="right")))
    return points[chosen]


def _means(
    seen: NDArray[np.uint8], nearest: NDArray[np.int64], centroids: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The mean patch of each code, rounded; a code that no patch is near stays where it is."""
    counts = np.bincount(nearest, minlength=len(centroids))
    sums = np.stack(
        [np.bincount(nearest, column, len(centroids)) for column in seen.T], axis=1
    ).astype(np.int64)
    taken = counts > 0
    means = centroids.copy()
    half = counts[taken, None] // 2
    means[taken] = (sums[taken] + half) // counts[taken, None]
    return means


def _nearest(seen: NDArray[np.uint8], centroids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The nearest centroid of each patch, the first of equals."""
    values = centroids.astype(np.float32)
    twice, squares = 2 * values.T, (values * values).sum(1)
    nearest = np.empty(len(seen), dtype=np.int64)
    for start in range(0, len(seen), _ROWS):
        rows = seen[start : start + _ROWS].astype(np.float32)
        nearest[start : start + _ROWS] = (rows @ twice - squares).argmax(1)
    return nearest
