"""Patch k-means: the code of a patch is the number of the nearest centroid.

It replaces DALL-E's dVAE where its weights are not available; its codes represent colours and
edges, not objects. All sums are whole numbers that float32 holds exactly (even ones up to 2**25,
others up to 2**24), so codes are bit-equal on every machine, in whatever order a BLAS adds.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from pmd_pipeline.codes.tokenizers import MAX_VOCABULARY, Tokenizer
from pmd_pipeline.codes.weights import read_tensors
from pmd_pipeline.contract.errors import PmdError

PATCH_SIZE = 8
"""The patch size of DALL-E's dVAE."""

_VALUES = PATCH_SIZE * PATCH_SIZE * 3
_ROWS = 2048
"""Patches compared at a time, so that memory does not grow with images times codes."""

_STEPS = 12
_PATCHES_PER_CODE = 50
"""Patches that Lloyd's steps use, drawn from all."""

_CANDIDATES_PER_CODE = 8
"""Patches that k-means++ chooses from; it compares each of them with each centroid."""


def open_tokenizer(weights: str | None, *, dtype: str, device: str) -> Tokenizer:
    """Patch k-means on the CPU; see `Tokenizer`. `device` has no effect.

    Raises:
        PmdError: there are no weights, they are not those of k-means, or `dtype` is not float32.
    """
    del device
    if dtype != "float32":
        raise PmdError("k-means computes in whole numbers: leave --dtype out")
    if weights is None:
        raise PmdError("k-means needs its centroids: give --weights FILE")
    centroids = read_tensors(weights).tensors.get("centroids", np.empty(0, np.uint8))
    shape = (PATCH_SIZE, PATCH_SIZE, 3)
    if centroids.dtype != np.uint8 or centroids.shape[1:] != shape:
        raise PmdError(
            f"{weights} holds no `centroids` of {PATCH_SIZE} x {PATCH_SIZE} RGB pixels, so these "
            "are not weights of kmeans"
        )
    if not 0 < len(centroids) <= MAX_VOCABULARY:
        raise PmdError(f"{weights} has {len(centroids):,} centroids, not 1 to {MAX_VOCABULARY:,}")
    return Tokenizer(PATCH_SIZE, len(centroids), partial(encode, centroids))


def encode(centroids: NDArray[np.uint8], images: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Codes [b, g, g] of images [b, 8 g, 8 g, 3] by `centroids` [v, 8, 8, 3]."""
    grid = images.shape[1] // PATCH_SIZE
    nearest = _nearest(patches(images), centroids.reshape(len(centroids), _VALUES))
    return nearest.astype(np.uint16).reshape(len(images), grid, grid)


def patches(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The patches [b g g, 192] of images [b, 8 g, 8 g, 3], row by row."""
    grid = images.shape[1] // PATCH_SIZE
    tiles = images.reshape(len(images), grid, PATCH_SIZE, grid, PATCH_SIZE, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, _VALUES)


def fit(samples: NDArray[np.uint8], vocabulary: int, seed: int) -> NDArray[np.uint8]:
    """Centroids [vocabulary, 8, 8, 3] of patches [n, 192], by k-means++ and Lloyd's steps.

    Raises:
        PmdError: there are fewer different patches than codes.
    """
    random = np.random.Philox(key=seed)
    samples = samples[
        np.argsort(random.random_raw(len(samples)), kind="stable")[: _PATCHES_PER_CODE * vocabulary]
    ]
    distinct = np.unique(samples, axis=0)
    if len(distinct) < vocabulary:
        raise PmdError(
            f"the images have {len(distinct):,} different patches, too few for "
            f"{vocabulary:,} codes: give a smaller --vocabulary"
        )
    centroids = _seeds(distinct, vocabulary, random)
    before: NDArray[np.int64] | None = None
    for _ in range(_STEPS):
        nearest = _nearest(samples, centroids)
        if before is not None and np.array_equal(nearest, before):
            break
        before = nearest
        centroids = _means(samples, nearest, centroids)
    return centroids.reshape(vocabulary, PATCH_SIZE, PATCH_SIZE, 3)


def _seeds(distinct: NDArray[np.uint8], count: int, random: np.random.Philox) -> NDArray[np.uint8]:
    """Initial centroids by k-means++: chances are squared distances from the nearest so far."""
    order = np.argsort(random.random_raw(len(distinct)), kind="stable")
    points = distinct[order[: _CANDIDATES_PER_CODE * count]]
    values = points.astype(np.float32)
    squares = (values * values).sum(1)
    chosen = [0]
    distances = np.full(len(points), np.inf, dtype=np.float32)
    for raw in random.random_raw(count - 1).tolist():
        last = chosen[-1]
        distances = np.minimum(distances, squares - 2 * (values @ values[last]) + squares[last])
        cumulative = np.cumsum(distances.astype(np.int64))
        chosen.append(int(np.searchsorted(cumulative, raw % int(cumulative[-1]), side="right")))
    return points[chosen]


def _means(
    samples: NDArray[np.uint8], nearest: NDArray[np.int64], centroids: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The mean patch of each code, rounded; a code without patches keeps its centroid."""
    counts = np.bincount(nearest, minlength=len(centroids))
    sums = np.stack(
        [np.bincount(nearest, column, len(centroids)) for column in samples.T], axis=1
    ).astype(np.int64)
    taken = counts > 0
    means = centroids.copy()
    half = counts[taken, None] // 2
    means[taken] = (sums[taken] + half) // counts[taken, None]
    return means


def _nearest(samples: NDArray[np.uint8], centroids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The nearest centroid of each patch; of equally near ones, the first."""
    values = centroids.astype(np.float32)
    twice, squares = 2 * values.T, (values * values).sum(1)
    nearest = np.empty(len(samples), dtype=np.int64)
    for start in range(0, len(samples), _ROWS):
        rows = samples[start : start + _ROWS].astype(np.float32)
        nearest[start : start + _ROWS] = (rows @ twice - squares).argmax(1)
    return nearest
