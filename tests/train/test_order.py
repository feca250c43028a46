import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flava_train.data.order import (
    MIN_WINDOW_BATCHES,
    STREAMS,
    SampleOrder,
    StreamSchedule,
    random_bits,
)

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)
seeds = st.integers(0, 2**40)


def batches_of(order, epoch, image_of):
    """Every batch of an epoch, as lists of (shard, pair)."""
    batches = []
    for number in range(order.windows):
        window = order.window(epoch, number)
        pairs = [
            (piece.shard, pair)
            for piece in window.ranges
            for pair in range(piece.start, piece.stop)
        ]
        images = np.array([image_of(*pair) for pair in pairs], np.uint64)
        batches += [[pairs[n] for n in row] for row in order.assign_batches(window, images)]
    return batches


def own_image(shard, pair):
    return shard << 32 | pair


@given(sizes, st.integers(1, 30), seeds, st.integers(0, 3), st.integers(1, 5))
def test_an_epoch_has_every_pair_once_except_less_than_a_batch(
    given_sizes, batch, seed, epoch, window_shards
):
    order = SampleOrder(tuple(given_sizes), min(batch, sum(given_sizes)), seed, 0, window_shards)

    batches = batches_of(order, epoch, own_image)

    seen = Counter(pair for row in batches for pair in row)
    assert all(len(row) == order.batch for row in batches)
    assert len(batches) == order.batches
    assert set(seen.values()) == {1}
    assert seen.keys() <= {(s, p) for s, size in enumerate(given_sizes) for p in range(size)}
    assert order.pairs - len(seen) < order.batch


@given(sizes, st.integers(1, 30), seeds, st.integers(1, 5))
def test_windows_have_consecutive_batches(given_sizes, batch, seed, window_shards):
    order = SampleOrder(tuple(given_sizes), min(batch, sum(given_sizes)), seed, 0, window_shards)

    places = [order.position(index) for index in range(2 * order.batches)]

    expected, now = [], (0, 0)
    while len(expected) < len(places):
        expected += [(*now, row) for row in range(order.window(*now).batches)]
        now = order.next_window(*now)
    assert places == expected


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60), st.integers(1, 20), seeds)
def test_captions_of_an_image_are_spread_evenly_over_the_batches_of_a_window(captions, batch, seed):
    total = sum(captions)
    owner = np.repeat(np.arange(len(captions)), captions)
    order = SampleOrder((total,), min(batch, total), seed)

    for number in range(order.windows):
        window = order.window(0, number)
        images = np.concatenate([owner[piece.start : piece.stop] for piece in window.ranges])
        batches = order.assign_batches(window, images.astype(np.uint64))
        in_window = Counter(images.tolist())
        for row in batches:
            for image, count in Counter(images[row].tolist()).items():
                assert count <= math.ceil(in_window[image] / window.batches)


def test_no_image_is_twice_in_a_batch_if_the_window_has_a_batch_for_each_caption():
    order = SampleOrder((2000,) * 10, 100, 7, window_shards=1)

    batches = batches_of(order, 0, lambda shard, pair: pair // 50 << 32)  # copies in all ten shards

    assert order.windows == 200 // MIN_WINDOW_BATCHES
    for row in batches:
        images = Counter(pair // 50 for _, pair in row)
        assert max(images.values()) <= math.ceil(500 / MIN_WINDOW_BATCHES)
    batches = batches_of(order, 0, lambda shard, pair: shard << 32 | pair // 50)
    assert all(len({(s, p // 50) for s, p in row}) == 100 for row in batches)


def test_captions_of_an_image_are_not_in_consecutive_steps():
    order = SampleOrder((6400,), 100, 1)

    batches = batches_of(order, 0, lambda _, pair: pair // 5)

    steps = [
        sorted(n for n, row in enumerate(batches) if (0, pair) in row) for pair in range(0, 500, 5)
    ]
    later = [
        sorted(n for n, row in enumerate(batches) if (0, pair + 1) in row)
        for pair in range(0, 500, 5)
    ]
    neighbours = sum(abs(a[0] - b[0]) == 1 for a, b in zip(steps, later, strict=True))
    assert neighbours < 20  # by chance about 3 in 100


def test_every_pair_is_equally_likely_in_every_batch_and_slot():
    order = SampleOrder((7, 0, 20, 13), 8, 3, window_shards=1)
    first = Counter()
    left_out = Counter()

    for epoch in range(2000):
        batches = batches_of(order, epoch, own_image)
        first.update([batches[0][0]])
        seen = {pair for row in batches for pair in row}
        left_out.update({(0, 0), (0, 6), (2, 19), (3, 12), (2, 10)} - seen)

    # 2000 draws among 40 pairs: 50 each, with a standard deviation of 7
    assert len(first) == 40
    assert all(18 < count < 82 for count in first.values())
    assert not left_out  # 40 pairs are five batches exactly


def test_the_pairs_that_an_epoch_leaves_out_are_drawn_evenly():
    order = SampleOrder((11,), 4, 5)
    left_out = Counter()

    for epoch in range(1000):
        seen = {pair for row in batches_of(order, epoch, own_image) for _, pair in row}
        left_out.update(set(range(11)) - seen)

    # three of eleven, 273 times each, with a standard deviation of 14
    assert all(200 < left_out[pair] < 345 for pair in range(11))


def test_the_order_of_shards_differs_by_epoch_and_stream():
    orders = {
        tuple(piece.shard for piece in SampleOrder((9,) * 30, 5, 1, stream).window(epoch, 0).ranges)
        for epoch in range(4)
        for stream in range(3)
    }

    assert len(orders) == 12


def test_windows_have_approximately_the_given_number_of_shards():
    order = SampleOrder((10_000,) * 700, 1000, 1, window_shards=16)

    assert [len(order.window(0, n).ranges) for n in range(order.windows)] == [
        pytest.approx(16.5, abs=1.5)
    ] * order.windows


@pytest.mark.parametrize("start", [0, 1, 999, 65_530, 200_000])
def test_steps_of_a_stream_are_counted_equally_from_any_start(start):
    shares = (0.7, 0.15, 0.15)
    uniform = (random_bits(5, "stream", np.arange(start)) >> np.uint64(11)) * 2.0**-53
    counts = Counter(
        pairs=int((uniform < 0.7).sum()),
        images=int(((uniform >= 0.7) & (uniform < 0.85)).sum()),
        texts=int((uniform >= 0.85).sum()),
    )

    fresh = StreamSchedule(5, shares)

    for step in range(start, start + 20):
        name = fresh.stream(step)
        assert fresh.count_before(step) == counts[name]
        counts[name] += 1


def test_streams_occur_in_proportion_to_their_shares():
    schedule = StreamSchedule(1, (0.70, 0.15, 0.15))

    taken = Counter(schedule.stream(step) for step in range(20_000))

    # standard deviations of 65 and 51
    assert taken["pairs"] == pytest.approx(14_000, abs=300)
    assert taken["images"] == pytest.approx(3_000, abs=250)
    assert taken["texts"] == pytest.approx(3_000, abs=250)


def test_a_stream_without_a_share_never_occurs():
    schedule = StreamSchedule(1, (0.0, 0.0, 1.0))

    assert {schedule.stream(step) for step in range(1000)} == {STREAMS[2]}


@given(seeds, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_random_bits_depend_on_their_number_only(seed, number, more):
    alone = random_bits(seed, "crop", np.array([number], np.uint64), more)

    among = random_bits(seed, "crop", np.array([1, number, 2], np.uint64), more)

    assert among[1] == alone[0]
    assert random_bits(seed, "mismatch", np.array([number], np.uint64), more) != alone


def test_all_64_bits_of_a_number_and_of_the_seed_matter():
    numbers = np.array([5, 5 + (1 << 32), 5 + (1 << 63)], np.uint64)

    drawn = [random_bits(seed, "images", numbers) for seed in (3, 3 + (1 << 32), 3 + (1 << 63))]

    assert len(set(np.concatenate(drawn).tolist())) == 9


def test_the_order_is_the_recorded_one():
    order = SampleOrder((10, 7, 13), 4, 3)
    window = order.window(2, 0)

    assert order.windows == 1
    assert [(p.shard, p.start, p.stop) for p in window.ranges] == GOLDEN_PIECES
    assert order.assign_batches(window, np.arange(28, dtype=np.uint64))[0].tolist() == GOLDEN_BATCH


GOLDEN_PIECES = [(2, 2, 13), (0, 0, 10), (1, 0, 7)]
GOLDEN_BATCH = [10, 12, 3, 27]
