import dataclasses
import multiprocessing
import os
import pickle
import signal
from collections import Counter
from contextlib import closing
from io import BytesIO
from itertools import count

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ablations import ABLATIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import TINY, flava
from tiny_datasets import (
    RULES,
    jpeg,
    own_box,
    own_codes,
    reseal,
    sample,
    samples,
    sha256,
    write_pairs,
    write_texts,
    write_vocabulary,
)

from flava_train.data.batches import PairBatch, TextBatch, micro_batches
from flava_train.data.config import DataConfig
from flava_train.data.file_cache import FileCache
from flava_train.data.loader import concatenate, load_batches
from flava_train.data.manifests import check_manifest
from flava_train.data.masking import (
    IGNORE,
    PatchMasking,
    TokenMasking,
    draw_uniforms,
    mask_patches,
    mask_tokens,
    word_starts,
)
from flava_train.data.needs import StreamShares
from flava_train.data.order import random_bits
from flava_train.data.training_data import TrainingData
from flava_train.evaluation.batches import evaluation_batches
from flava_train.objective.objective import Objective
from flava_train.objective.step import train_step
from pmd_pipeline.contract import image_format
from pmd_pipeline.contract.errors import PmdError

ONLY_PAIRS = Objective(streams=StreamShares(1.0, 0.0, 0.0))
TRUE_PAIRS = dataclasses.replace(ONLY_PAIRS, itm_rate=0.0)
BOXES = [[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 1.0, 1.0], [0.5, 0.0, 0.75, 1.0]]
CROP_RULES = RULES.model_copy(update={"views": 3})
SHARDS = [
    samples(9, captions=3),
    samples(14, captions=2, start=50)
    + [sample(n, [f"cat {n} {place}" for place in range(3)], BOXES) for n in range(200, 206)],
    samples(5, start=99),
]
NUMBERS = {one["key"]: one["image"] for shard in SHARDS for one in shard}
numbers = count()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def config(tmp_path):
    """Pairs of three shards, some with boxes; images; texts."""
    return DataConfig(
        pairs=write_pairs(tmp_path / "pairs.json", SHARDS, rules=CROP_RULES, failed=3),
        images=write_pairs(
            tmp_path / "images.json", [samples(20, captions=0, start=300)], kind="images"
        ),
        texts=(write_texts(tmp_path / "texts.json", [[f"dog {n}\n\ncat" for n in range(30)]]),),
        tokenizer=write_vocabulary(tmp_path / "vocab.txt"),
        caption_tokens=12,
        text_tokens=16,
        window_shards=1,
    )


def training_data(config, objective=ONLY_PAIRS, *, batch=6, seed=1, model=TINY):
    return TrainingData(config, objective.data_needs, model, seed=seed, batch=batch)


def pairs_config(tmp_path, shards, **changes):
    """A configuration with pairs only."""
    return DataConfig(
        pairs=write_pairs(tmp_path / "pairs.json", shards, **changes),
        tokenizer=write_vocabulary(tmp_path / "vocab.txt"),
        caption_tokens=12,
    )


def load_batch(data, step):
    return data.load(step, range(data.batch)).rows


def bit_equal(one, other):
    """Whether two batches are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and all(
        bit_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(one)
    )


@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=8), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 99),
)
@settings(max_examples=15)
def test_every_pair_is_seen_once_in_an_epoch(tmp_path_factory, captions, batch, seed):
    folder = tmp_path_factory.mktemp("dataset")
    fresh = count()
    shards = [
        [sample(n := next(fresh), [f"{n} {place}" for place in range(many)]) for many in shard]
        for shard in captions
    ]
    total = sum(map(sum, captions))
    data = training_data(
        pairs_config(folder, shards, failed=2), TRUE_PAIRS, batch=min(batch, total), seed=seed
    )

    rows = [row for step in range(total // min(batch, total)) for row in data.describe(step)]

    seen = Counter((row.key, row.text) for row in rows)
    pairs = {(one["key"], text) for shard in shards for one in shard for text in one["captions"]}
    assert set(seen.values()) == {1}
    assert seen.keys() <= pairs
    assert len(pairs) - len(seen) < min(batch, total)


def test_epochs_of_several_windows_have_every_pair_once_in_different_orders(tmp_path):
    config = pairs_config(tmp_path, [samples(80), samples(70, start=80)])
    data = training_data(dataclasses.replace(config, window_shards=1), TRUE_PAIRS, batch=1)

    epochs = [
        [data.describe(step)[0].key for step in range(150 * epoch, 150 * (epoch + 1))]
        for epoch in range(2)
    ]

    assert len(set(epochs[0])) == len(set(epochs[1])) == 150
    assert epochs[0] != epochs[1]


def test_no_image_is_twice_in_a_batch_even_from_two_sources(tmp_path):
    copies = [
        sample(n, [f"cat {n} {i}" for i in range(3)], image=n - 1000) for n in range(1000, 1020)
    ]
    data = training_data(pairs_config(tmp_path, [samples(20, captions=5), copies]), batch=8)

    for step in range(40):
        rows = load_batch(data, step)
        assert len(set(rows.image_ids.tolist())) == 8


def test_a_pair_has_its_own_pixels_caption_and_codes(config):
    data = training_data(config, TRUE_PAIRS)
    for step in range(8):
        part = data.load(step, range(6))
        rows = part.rows
        for slot, row in enumerate(data.describe(step)):
            assert part.keys[slot] == row.key
            number, box = expected_crop(row, step * 6 + slot)
            assert row.crop == number
            assert torch.equal(rows.images.pixels[slot], pixels(NUMBERS[row.key], box))
            masked = rows.images.codes[slot] != IGNORE
            codes = own_codes(row.key, number, RULES).ravel()
            at = rows.images.masked_positions[slot][masked].numpy()
            assert rows.images.codes[slot][masked].tolist() == codes[at].tolist()
            tokens, lengths = data.wordpiece.encode([row.text], 12)
            assert rows.texts.tokens[slot].tolist() == tokens[0].tolist()
            assert rows.texts.lengths[slot] == lengths[0]
            assert row.text.split()[1] == str(NUMBERS[row.key])


def expected_crop(row, number):
    """The crop that a slot should have, and its box."""
    if NUMBERS[row.key] >= 200:
        nth = int(row.text.split()[2])
        return 1 + nth, BOXES[nth]
    crop = 1 + int(random_bits(1, "crop", np.array([number]))[0]) % 2
    return crop, np.array(own_box(row.key, crop), np.float32).tolist()


def pixels(number, box, size=32):
    image = Image.open(BytesIO(jpeg(number))).convert("RGB")
    x0, y0, x1, y1 = box
    sides = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
    made = image.resize((size, size), Image.Resampling.BICUBIC, box=sides)
    return torch.from_numpy(np.asarray(made).copy()).permute(2, 0, 1)


def test_a_caption_with_a_box_gets_the_crop_of_its_region(tmp_path):
    shards = [[sample(7, ["cat 7 0", "cat 7 1", "cat 7 2"], BOXES)]]
    data = training_data(pairs_config(tmp_path, shards), TRUE_PAIRS, batch=1)

    rows = [row for step in range(3) for row in data.describe(step)]

    assert {(row.text[-1], row.crop) for row in rows} == {("0", 1), ("1", 2), ("2", 3)}


def test_crops_are_drawn_evenly_and_the_whole_image_only_if_it_is_the_only_crop(tmp_path):
    many = training_data(pairs_config(tmp_path, [samples(40)], rules=CROP_RULES), batch=40)
    drawn = Counter(row.crop for step in range(10) for row in many.describe(step))

    assert drawn.keys() == {1, 2}
    assert 150 < drawn[1] < 250  # 400 draws, with a standard deviation of 10
    only = training_data(pairs_config(tmp_path, [samples(4)]), batch=4)
    assert {row.crop for row in only.describe(0)} == {0}


def test_masks_are_those_of_their_sample_numbers(config):
    data = training_data(config, TRUE_PAIRS)
    vocabulary = data.wordpiece.vocabulary
    rule = TokenMasking(len(vocabulary), vocabulary.index("[MASK]"), (0, 1, 2, 3, 4))
    for step in (0, 5):
        sample_numbers = step * 6 + np.arange(6)
        rows = load_batch(data, step)

        patches = mask_patches(1, sample_numbers, PatchMasking(grid=4, num_masked=6, min_block=1))
        seen, hidden = mask_tokens(
            1, sample_numbers, rows.texts.tokens.numpy(), rule, starts=word_starts(vocabulary)
        )

        assert rows.texts.masked_tokens.tolist() == seen.tolist()
        for slot in range(6):
            kept = rows.images.codes[slot] != IGNORE
            assert (
                rows.images.masked_positions[slot][kept].tolist()
                == np.flatnonzero(patches[slot]).tolist()
            )
            kept = rows.texts.labels[slot] != IGNORE
            assert (
                rows.texts.masked_positions[slot][kept].tolist()
                == np.flatnonzero(hidden[slot]).tolist()
            )


def test_masks_of_other_grids_scale_with_the_number_of_patches():
    assert PatchMasking.for_grid(14) == PatchMasking()
    assert (PatchMasking.for_grid(28).num_masked, PatchMasking.for_grid(28).min_block) == (300, 64)
    assert (PatchMasking.for_grid(1).num_masked, PatchMasking.for_grid(1).min_block) == (1, 1)


def test_mismatched_captions_are_never_the_images_own_and_occur_at_the_given_rate(tmp_path):
    same = [sample(500 + n, ["cat in a hat", "a CAT , in a hat"]) for n in range(10)]
    copies = [sample(600 + n, [f"cat {n} b"], image=n) for n in range(10)]
    config = pairs_config(tmp_path, [samples(30, captions=2), same, copies])
    data = training_data(config, dataclasses.replace(ONLY_PAIRS, itm_rate=0.4), batch=30)
    truth = {}
    for shard in (samples(30, captions=2), same, copies):
        for one in shard:
            truth.setdefault(one["image"], set()).update(one["captions"])
    images = {one["key"]: one["image"] for s in (samples(30), same, copies) for one in s}

    rows = [(step, slot, row) for step in range(40) for slot, row in enumerate(data.describe(step))]

    mismatched = 0
    for step, slot, row in rows:
        own = truth[images[row.key]]
        drawn = draw_uniforms(1, np.array([step * 30 + slot]))[0, 0] < 0.4
        assert row.matched == (row.text in own) == (not drawn)
        mismatched += not row.matched
    assert 0.35 < mismatched / len(rows) < 0.45
    for step in range(3):
        rows = load_batch(data, step)
        assert rows.matched.tolist() == [row.matched for row in data.describe(step)]


def test_captions_with_equal_tokens_stay_matched(tmp_path):
    shards = [[sample(n, ["cat !"]) for n in range(6)]]
    data = training_data(
        pairs_config(tmp_path, shards), dataclasses.replace(ONLY_PAIRS, itm_rate=1.0), batch=6
    )

    assert load_batch(data, 0).matched.all()


@pytest.mark.parametrize("negatives", ["batch", "hard"])
def test_captions_stay_matched_if_the_step_chooses_the_negatives(config, negatives):
    objective = dataclasses.replace(ONLY_PAIRS, itm_rate=1.0, itm_negatives=negatives)

    rows = load_batch(training_data(config, objective), 0)

    assert rows.matched.all()
    assert torch.equal(rows.uniforms, torch.from_numpy(draw_uniforms(1, np.arange(6))))


def test_texts_have_a_sep_between_documents(config):
    data = training_data(config, Objective(streams=StreamShares(0.0, 0.0, 1.0)))

    rows = load_batch(data, 0)

    assert isinstance(rows, TextBatch)
    assert rows.tokens.shape == (6, 16)
    sep = data.wordpiece.vocabulary.index("[SEP]")
    assert ((rows.tokens == sep).sum(1) == 2).all()
    texts = [row.text for row in data.describe(0)]
    assert rows.tokens.tolist() == data.wordpiece.encode_documents(texts, 16)[0].tolist()
    assert data.describe(0)[0].key.startswith("ccnews-00000-")


def test_every_text_and_image_is_seen_once_in_an_epoch(config):
    for shares, total in ((StreamShares(0.0, 0.0, 1.0), 30), (StreamShares(0.0, 1.0, 0.0), 20)):
        data = training_data(config, Objective(streams=shares), batch=5)

        keys = [row.key for step in range(total // 5) for row in data.describe(step)]

        assert len(set(keys)) == total


def test_an_objective_without_masked_losses_needs_no_codes(tmp_path):
    data = training_data(
        pairs_config(tmp_path, [samples(8)], rules=None), ABLATIONS["flava_c"], batch=4
    )

    rows = load_batch(data, 0)

    assert rows.images.masked_positions.shape == (4, 0)
    assert rows.texts.labels.shape == (4, 0)
    assert "contrastive" in train_step(
        flava(dtype=torch.float32), micro_batches(rows, 2), ABLATIONS["flava_c"]
    )


def test_every_stream_gives_its_losses(config):
    data = training_data(config, Objective())
    losses = {}
    for step in range(12):
        rows = load_batch(data, step)
        cut = micro_batches(rows, 4) if isinstance(rows, PairBatch) else [rows]
        losses |= train_step(flava(dtype=torch.float32), cut, Objective())

    assert losses.keys() == {"contrastive", "mmm_image", "mmm_text", "itm", "mim", "mlm"}
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_any_slots_equal_those_of_the_whole_batch(config):
    data = training_data(config, Objective())
    for step in range(8):
        parts = [data.load(step, range(*ends)) for ends in ((0, 1), (1, 4), (4, 6))]

        assert bit_equal(concatenate([part.rows for part in parts]), load_batch(data, step))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("chunk", [2, 256])
def test_batches_are_the_same_for_any_workers_chunks_and_start(config, workers, chunk):
    expected = [training_data(config, Objective()).load(step, range(6)) for step in range(9)]

    with closing(
        load_batches(training_data(config, Objective()), 3, 9, workers=workers, chunk=chunk)
    ) as loaded:
        for step, batch in enumerate(loaded, 3):
            assert batch.step == step
            assert batch.keys == expected[step].keys
            assert bit_equal(batch.rows, expected[step].rows)
            assert batch.wait_seconds >= 0
    assert step == 8


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_shares_of_all_ranks_make_the_global_batch(config, ranks):
    data = training_data(config, Objective())

    for step in range(5):
        shares = [
            next(load_batches(data, step, step + 1, rank=rank, ranks=ranks))
            for rank in range(ranks)
        ]

        assert bit_equal(concatenate([share.rows for share in shares]), load_batch(data, step))
        assert {share.stream for share in shares} == {data.stream(step)}


def test_a_batch_that_ranks_cannot_share_is_refused(config):
    with pytest.raises(ValueError, match="cannot be shared equally by 4 ranks"):
        load_batches(training_data(config), 0, 1, ranks=4)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_job_does_not_end_the_workers(config, sent):
    with closing(load_batches(training_data(config), 0, 30, workers=2, chunk=3)) as loaded:
        first = next(loaded)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, sent)

        rest = [batch.step for batch in loaded]

    assert [first.step, *rest] == list(range(30))
    assert not multiprocessing.active_children()


def test_pickled_training_data_gives_the_same_batches(config):
    data = training_data(config, Objective())
    before = load_batch(data, 0)

    again = pickle.loads(pickle.dumps(data))  # noqa: S301  # our own

    assert bit_equal(load_batch(again, 0), before)
    assert again.digests == data.digests


def test_a_prefetched_window_has_the_same_batches(config):
    plain, ahead = training_data(config), training_data(config)
    ahead.enable_prefetch()

    for step in range(30):
        assert plain.describe(step) == ahead.describe(step)


def test_another_seed_gives_another_order(config):
    assert training_data(config, seed=1).describe(0) != training_data(config, seed=2).describe(0)


@pytest.fixture
def remote(config, tmp_path):
    """The same data on a remote file system."""
    folder = f"memory://data-{next(numbers)}"
    for path in tmp_path.rglob("*"):
        if path.is_file():
            with fsspec.open(f"{folder}/{path.relative_to(tmp_path)}", "wb") as file:
                file.write(path.read_bytes())
    return dataclasses.replace(
        config,
        pairs=f"{folder}/pairs.json",
        images=f"{folder}/images.json",
        texts=(f"{folder}/texts.json",),
        cache=str(tmp_path / "cache"),
    )


def test_remote_shards_give_the_same_batches(config, remote):
    here, there = training_data(config, Objective()), training_data(remote, Objective())

    for step in range(10):
        assert bit_equal(load_batch(here, step), load_batch(there, step))


def test_a_cache_smaller_than_two_windows_is_refused_before_the_first_step(remote):
    with pytest.raises(PmdError, match="two windows of shards have"):
        training_data(dataclasses.replace(remote, cache_gib=1e-5))


def test_remote_shards_need_a_cache(config, remote):
    with pytest.raises(PmdError, match=r"set data\.cache"):
        training_data(dataclasses.replace(remote, cache=None))
    both = dataclasses.replace(config, texts=(*config.texts, *remote.texts), cache=None)
    with pytest.raises(PmdError, match=r"set data\.cache"):
        training_data(both, Objective())


# Wrong configurations, and damaged or hostile files.


def assert_refused(config, message, objective=ONLY_PAIRS, **changes):
    def run():
        data = training_data(config, objective, **changes)
        for step in range(20):
            load_batch(data, step)

    with pytest.raises(PmdError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_a_stream_without_a_manifest_is_refused_or_its_steps_are_shared(config):
    bare = dataclasses.replace(config, images=None)

    assert_refused(bare, r"15% of its steps from images.*renormalise", Objective())
    shared = training_data(dataclasses.replace(bare, renormalise=True), Objective())
    assert shared.shares == StreamShares(0.7 / 0.85, 0.0, 0.15 / 0.85)
    assert shared.digests.keys() == {"pairs", "texts", "tokenizer"}
    nothing = DataConfig(tokenizer=config.tokenizer, renormalise=True)
    assert_refused(nothing, r"set data\.pairs")


def test_a_manifest_of_another_kind_is_refused(config):
    assert_refused(dataclasses.replace(config, pairs=config.images), "holds images")


def test_missing_codes_are_refused(tmp_path):
    assert_refused(pairs_config(tmp_path, [samples(8)], rules=None), "run `pmd codes .*pairs.json`")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 16}, "4 x 4 codes per image, but the model 2 x 2"),
        ({"image_vocab": 66}, r"codes up to 66.*set model\.image_vocab"),
        ({"text_vocab": 20}, r"set model\.text_vocab"),
        ({"text_positions": 8}, r"data\.caption_tokens is 12"),
    ],
)
def test_data_that_does_not_fit_the_model_is_refused(config, changes, message):
    assert_refused(config, message, model=dataclasses.replace(TINY, **changes))


def test_a_dataset_smaller_than_a_batch_is_refused(config):
    assert_refused(config, r"fewer than one batch of 1,000; lower `batch`", batch=1000)


def test_a_tokenizer_is_needed(config):
    assert_refused(dataclasses.replace(config, tokenizer=""), "`pmd tokenizer` makes")


@pytest.mark.parametrize("name", ["00001.tar", "00001.parquet", "00001.codes.safetensors"])
def test_a_flipped_byte_is_refused_with_the_name_of_the_file(config, tmp_path, name):
    path = tmp_path / "pairs" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    assert_refused(config, rf"{name} is not the file that the manifest names")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_byte_is_one_sentence_from_any_worker(config, tmp_path, workers):
    path = tmp_path / "pairs" / "00001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")

    with (
        pytest.raises(PmdError) as caught,
        closing(load_batches(training_data(config), 0, 20, workers=workers)) as loaded,
    ):
        list(loaded)

    assert str(caught.value).startswith(f"{path} is not the file")
    assert "\n" not in str(caught.value)


def tamper(config, tmp_path, name, change, *, field=None):
    """Change a file of the second shard, and its SHA-256 in the manifest: a hostile dataset."""
    path = tmp_path / "pairs" / f"00001{name}"
    path.write_bytes(change(path.read_bytes()))
    if field:
        update = {field: sha256(path)}
        if field == "sha256":
            update["num_bytes"] = path.stat().st_size
        reseal(
            tmp_path / "pairs.json",
            lambda shard: shard.model_copy(update=update) if shard.part == 1 else shard,
        )


def file_of_first_shard(tmp_path, name):
    return (tmp_path / "pairs" / f"00000{name}").read_bytes()


def test_a_tar_that_ends_early_is_refused(config, tmp_path):
    tamper(config, tmp_path, ".tar", lambda content: content[: len(content) // 2])

    assert_refused(dataclasses.replace(config, verify=False), r"00001\.tar ends early")


def test_a_ledger_that_points_beyond_its_shard_is_refused(config, tmp_path):
    tamper(config, tmp_path, ".tar", lambda content: content[:2048], field="sha256")

    assert_refused(config, r"ledger pairs/00001\.parquet does not fit its shard: the byte range")


@pytest.mark.parametrize("replacement", ["first", b"", b"PAR1 and no more"])
def test_a_ledger_of_another_shard_is_refused(config, tmp_path, replacement):
    if replacement == "first":
        replacement = file_of_first_shard(tmp_path, ".parquet")
    tamper(config, tmp_path, ".parquet", lambda _: replacement, field="ledger_sha256")

    assert_refused(config, r"ledger pairs/00001\.parquet does not fit its shard")


@pytest.mark.parametrize("counts", [[2, 2, 2, 2], [0, 1, 1, 2]])
def test_a_ledger_with_other_counts_than_the_manifest_is_refused(tmp_path, counts):
    config = pairs_config(tmp_path, [samples(4)])
    file = tmp_path / "pairs" / "00000.parquet"
    table = pq.read_table(file)
    place = table.column_names.index("num_pairs")
    pq.write_table(table.set_column(place, "num_pairs", pa.array(counts, pa.int32())), file)

    message = "its number of pairs is not the manifest's"
    assert_refused(dataclasses.replace(config, verify=False), message, batch=2)


@pytest.mark.parametrize("replacement", ["first", b"", b"\xff" * 100])
def test_codes_of_another_shard_are_refused(config, tmp_path, replacement):
    if replacement == "first":
        replacement = file_of_first_shard(tmp_path, ".codes.safetensors")
    tamper(config, tmp_path, ".codes.safetensors", lambda _: replacement, field="codes_sha256")

    assert_refused(config, "run `pmd codes` again")


@pytest.mark.parametrize(
    "change",
    [
        {"codes": np.zeros((32, 5, 5), np.uint16)},
        {"codes": np.zeros((32, 4, 4), np.int16)},
        {"boxes": np.zeros((32, 4), np.float64)},
        {"first": np.arange(5)},
    ],
)
def test_codes_of_another_shape_or_type_are_refused(tmp_path, change):
    config = pairs_config(tmp_path, [samples(16)], rules=RULES.model_copy(update={"views": 2}))
    file = tmp_path / "pairs" / "00000.codes.safetensors"
    save_file(load_file(file) | change, file)

    assert_refused(dataclasses.replace(config, verify=False), "does not hold the codes of", batch=2)


def test_a_tar_of_another_shard_is_refused(config, tmp_path):
    content = file_of_first_shard(tmp_path, ".tar") * 5
    tamper(config, tmp_path, ".tar", lambda _: content, field="sha256")

    assert_refused(config, r"00001\.tar")


def test_codes_beyond_their_tokenizer_are_refused(tmp_path):
    config = pairs_config(
        tmp_path, [samples(8)], codes_of=lambda key, crop, rules: np.full((4, 4), 67)
    )

    assert_refused(config, "has the code 67, beyond the 67 of its tokenizer")


def test_boxes_that_are_not_those_of_the_captions_are_refused(tmp_path):
    one = [sample(1, ["a", "b"], BOXES[:2])]
    other = [sample(1, ["a", "b"], BOXES[1:])]
    config = pairs_config(tmp_path, [one])
    codes = tmp_path / "pairs" / "00000.codes.safetensors"
    content = codes.read_bytes()
    config = pairs_config(tmp_path, [other])
    codes.write_bytes(content)

    assert_refused(dataclasses.replace(config, verify=False), "has other boxes than", batch=2)


@pytest.mark.parametrize(
    "boxes", [[[0, 0, 1]], [[0.5, 0, 0.5, 1]], [[0, 0, 1.5, 1]], ["abcd"], [[0, 0, 1, 1]] * 2, 3]
)
def test_invalid_boxes_are_refused(tmp_path, boxes):
    config = pairs_config(tmp_path, [[sample(1, ["a"], boxes)]], rules=None)

    assert_refused(config, r"the JSON of \w+ has", ABLATIONS["flava_c"], batch=1)


def test_an_image_of_another_size_than_in_the_ledger_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_datasets.jpeg", lambda number: jpeg(number, size=(60, 40)))
    config = pairs_config(tmp_path, [samples(4)])

    assert_refused(
        config, "is not the image that its ledger describes: it has 60 x 40 pixels", batch=2
    )


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff", b"GIF89a", jpeg(1)[:400]])
def test_an_image_that_does_not_decode_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr("tiny_datasets.jpeg", lambda number: content + bytes([number]))
    config = pairs_config(tmp_path, [samples(4)])

    assert_refused(config, "is not the image that its ledger describes", batch=2)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("more", [b"", b"stray bytes"])
def test_every_jpeg_that_a_build_stores_decodes_as_in_pillow(tmp_path, monkeypatch, mode, more):
    stored = jpeg(1, mode=mode)
    stored = stored[:-2] + more + stored[-2:]
    monkeypatch.setattr("tiny_datasets.jpeg", lambda number: stored)
    config = pairs_config(tmp_path, [samples(1)])

    decoded = load_batch(training_data(config, TRUE_PAIRS, batch=1), 0).images.pixels[0]

    expected = Image.open(BytesIO(stored)).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    assert decoded.permute(1, 2, 0).tolist() == np.asarray(expected).tolist()


def test_webp_shards_give_the_same_batches_as_jpeg_shards(config, tmp_path):
    webp = write_pairs(
        tmp_path / "webp.json", SHARDS, rules=CROP_RULES, failed=3, image_format=image_format.WEBP
    )
    ours, other = training_data(config), training_data(dataclasses.replace(config, pairs=webp))

    for step in range(6):
        assert bit_equal(load_batch(other, step), load_batch(ours, step))


ONLY_TEXTS = Objective(streams=StreamShares(0.0, 0.0, 1.0))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": ["a"] * 29}, "another number of rows"),
        ({"words": ["a"] * 30}, "00000.parquet is not the shard"),
        ({"text": ["a", None] * 15}, "has no text"),
        ({"text": list(range(30))}, "has no text"),
    ],
)
def test_a_shard_without_its_texts_is_refused(config, tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "texts" / "00000.parquet")

    assert_refused(dataclasses.replace(config, verify=False), message, ONLY_TEXTS)


def test_a_shard_of_texts_that_is_no_parquet_is_refused(config, tmp_path):
    (tmp_path / "texts" / "00000.parquet").write_bytes(b"PAR1")

    assert_refused(
        dataclasses.replace(config, verify=False), "00000.parquet is not the shard", ONLY_TEXTS
    )
    assert_refused(config, "is not the file that the manifest names", ONLY_TEXTS)


def test_manifests_are_checked_before_a_tokenizer_is_downloaded(config):
    far = dataclasses.replace(config, tokenizer="some/where", revision="0" * 40)

    assert_refused(dataclasses.replace(far, pairs="nothing.json"), "cannot read nothing.json")


def test_local_and_remote_manifests_are_summed_by_source(config, remote):
    for given_config in (config, remote):
        _, sources = check_manifest(given_config.pairs)
        assert [(one.source, one.pairs, one.images, one.shards) for one in sources] == [
            ("coco", 78, 34, 3)
        ]
        assert check_manifest(given_config.texts[0])[1][0].pairs == 30


# Evaluation.


def test_evaluation_has_every_image_once_with_all_its_captions(config):
    wordpiece = training_data(config).wordpiece
    expected = []
    for shard in SHARDS:
        for one in sorted(shard, key=lambda one: one["key"]):
            boxed = zip(one["boxes"] or [], one["captions"], strict=False)
            whole_image = [([0.0, 0.0, 1.0, 1.0], one["captions"])]
            regions = [(box, [caption]) for box, caption in boxed] or whole_image
            expected += [(one, *region) for region in regions]

    batches = list(evaluation_batches(config.pairs, wordpiece, 32, 12, batch=10))

    assert [len(one.keys) for one in batches] == [10, 10, 10, 10, 6]
    assert [key for one in batches for key in one.keys] == [one["key"] for one, _, _ in expected]
    captions = torch.cat([one.tokens for one in batches])
    image_rows = torch.cat([one.image_rows for one in batches])
    images = torch.cat([one.pixels for one in batches])
    for number, (one, box, texts) in enumerate(expected):
        assert torch.equal(images[number], pixels(one["image"], box))
        tokens, _ = wordpiece.encode(texts, 12)
        assert captions[image_rows == number].tolist() == tokens.tolist()


def test_evaluation_needs_pairs(config):
    with pytest.raises(PmdError, match="evaluation needs pairs"):
        list(evaluation_batches(config.images, training_data(config).wordpiece, 32, 12))


def test_a_changed_shard_is_not_evaluated(config, tmp_path):
    path = tmp_path / "pairs" / "00002.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")

    with pytest.raises(PmdError, match=r"00002\.tar is not the file"):
        list(evaluation_batches(config.pairs, training_data(config).wordpiece, 32, 12))
    unchecked = FileCache(verify=False)
    assert list(
        evaluation_batches(config.pairs, training_data(config).wordpiece, 32, 12, files=unchecked)
    )
