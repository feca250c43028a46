"""Patch k-means finds known clusters, and computes exactly."""

import numpy as np
import pytest

from pmd_pipeline.codes.tokenizers import kmeans
from pmd_pipeline.codes.tokenizers.kmeans import encode, fit, patches
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.demo.world.scenes import draw_scene, make_scene


def clusters(count, each, spread=4, seed=0):
    """Patches around `count` random centres, and the number of the centre of each."""
    random = np.random.default_rng(seed)
    centres = random.integers(20, 236, (count, 192))
    names = np.repeat(np.arange(count), each)
    noise = random.integers(-spread, spread + 1, (len(names), 192))
    return (centres[names] + noise).astype(np.uint8), names, centres


@pytest.mark.parametrize("seed", range(5))
def test_known_clusters_are_found(seed):
    seen, _, centres = clusters(12, 60, seed=seed)

    centroids = fit(seen, 12, seed).reshape(12, 192).astype(int)

    away = np.abs(centroids[:, None] - centres[None]).mean(2)
    assert (away.min(1) < 2).all()
    assert sorted(away.argmin(1)) == list(range(12))


def test_a_fit_is_the_same_each_time_and_another_with_another_seed():
    seen, _, _ = clusters(30, 20, spread=40)

    assert np.array_equal(fit(seen, 8, 3), fit(seen, 8, 3))
    assert not np.array_equal(fit(seen, 8, 3), fit(seen, 8, 4))


def test_every_code_is_that_of_the_nearest_centroid_in_whole_numbers():
    random = np.random.default_rng(0)
    centroids = random.choice([0, 255, 127, 128], (50, 8, 8, 3)).astype(np.uint8)
    images = random.choice([0, 255, 126, 129], (3, 32, 32, 3)).astype(np.uint8)

    codes = encode(centroids, images)

    seen, known = patches(images).astype(np.int64), centroids.reshape(50, 192).astype(np.int64)
    away = ((seen[:, None] - known[None]) ** 2).sum(2)
    assert codes.tolist() == away.argmin(1).reshape(3, 4, 4).tolist()


def test_sums_stay_where_float32_counts_exactly():
    brightest = np.full(192, 255)

    assert 2 * brightest @ brightest < 2**25  # all parts of this sum are even
    assert brightest @ brightest < 2**24  # no distance, and no 2 x·c - c·c, is larger


def test_the_patch_of_a_code_is_the_rounded_mean():
    seen = np.repeat(np.array([[10], [11], [11]], dtype=np.uint8), 192, axis=1)

    assert np.unique(fit(seen, 1, 0)).tolist() == [11]


def test_codes_do_not_depend_on_what_else_is_in_the_batch(monkeypatch):
    random = np.random.default_rng(1)
    centroids = random.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    images = random.integers(0, 256, (9, 24, 24, 3), dtype=np.uint8)
    together = encode(centroids, images)

    monkeypatch.setattr(kmeans, "_ROWS", 7)
    alone = np.concatenate([encode(centroids, image[None]) for image in images])

    np.testing.assert_array_equal(together, alone)


def decoded(centroids, codes):
    """The image [8 g, 8 g, 3] made of the centroids of codes [g, g]."""
    return np.concatenate([np.concatenate(centroids[row], axis=1) for row in codes])


def test_decoded_codes_are_made_of_their_centroids():
    random = np.random.default_rng(2)
    centroids = random.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    codes = np.array([[4, 0, 1], [1, 2, 3], [3, 3, 0]], dtype=np.uint16)

    picture = decoded(centroids, codes)

    assert picture[:8, 8:16].tolist() == centroids[0].tolist()
    assert encode(centroids, picture[None])[0].tolist() == codes.tolist()


def test_patches_are_cut_row_by_row():
    image = np.random.default_rng(3).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)

    cut = patches(image).reshape(4, 8, 8, 3)

    assert cut[1].tolist() == image[0, :8, 8:].tolist()
    assert cut[2].tolist() == image[0, 8:, :8].tolist()


def test_too_few_different_patches_is_one_sentence():
    seen = np.repeat(np.eye(3, 192, dtype=np.uint8), 50, axis=0)

    with pytest.raises(PmdError, match=r"3 different patches, too few for 4 codes.*--vocabulary"):
        fit(seen, 4, 0)
    assert len(np.unique(fit(seen, 3, 0), axis=0)) == 3


def test_a_decoded_scene_resembles_the_scene():
    scenes = np.stack(
        [np.asarray(draw_scene(make_scene(f"scene {n}")).resize((112, 112))) for n in range(40)]
    )
    centroids = fit(patches(scenes[:-1]), 256, 0)

    again = decoded(centroids, encode(centroids, scenes[-1:])[0])

    plain = scenes[-1].mean((0, 1))
    missed = np.abs(again.astype(float) - scenes[-1]).mean()
    assert missed < 0.3 * np.abs(plain - scenes[-1]).mean()
