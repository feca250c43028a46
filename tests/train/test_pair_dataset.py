import gc
import pickle
from collections import Counter
from io import BytesIO

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from tiny_datasets import jpeg, reseal, sample, samples, sha256, write_pairs, write_texts
from torch.utils.data import DataLoader

from flava_train import PairDataset
from flava_train.data import pair_dataset
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.image_format import WEBP

BOXES = [[0.0, 0.0, 0.5, 0.5], [0.25, 0.1, 1.0, 1.0], [0.01, 0.01, 0.015, 0.015]]
REGIONS = sample(200, [f"cat {number}" for number in range(3)], BOXES)
SHARDS = [
    samples(4, captions=3),
    [],
    [*samples(3, captions=2, start=50), REGIONS],
    samples(5, start=99),
]
NUM_PAIRS = 12 + 6 + 3 + 5


@pytest.fixture
def manifest(tmp_path):
    return write_pairs(tmp_path / "pairs.json", SHARDS, rules=None, failed=2)


def stored_pairs(shards=SHARDS):
    """Key and caption of every pair, in the order of ledgers."""
    return [
        (one["key"], caption)
        for shard in shards
        for one in sorted(shard, key=lambda one: one["key"])
        for caption in one["captions"]
    ]


def pixels(image):
    """A transform whose results can be stacked."""
    return torch.from_numpy(np.array(image.resize((8, 8))))


def test_every_pair_is_there_once_in_the_order_of_the_ledgers(manifest):
    dataset = PairDataset(manifest)

    assert len(dataset) == NUM_PAIRS
    assert [(pair.key, pair.caption) for pair in dataset] == stored_pairs()
    assert {pair.source for pair in dataset} == {"coco"}
    assert [len(indices) for indices in dataset.shard_ranges] == [12, 9, 5]


def test_an_image_belongs_to_its_caption(manifest):
    numbers = {one["key"]: one["image"] for shard in SHARDS for one in shard}

    for pair in PairDataset(manifest, crop=False):
        expected = Image.open(BytesIO(jpeg(numbers[pair.key]))).convert("RGB")
        assert np.array_equal(np.array(pair.image), np.array(expected))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_reads_what_webdataset_reads(manifest, tmp_path):
    tars = sorted(str(path) for path in (tmp_path / "pairs").glob("*.tar") if path.stem != "00001")
    expected = {}
    for one in webdataset.WebDataset(tars, shardshuffle=False).decode("pil"):
        expected |= {(one["__key__"], caption): one["jpg"] for caption in one["json"]["captions"]}

    dataset = PairDataset(manifest, crop=False)

    assert len(dataset) == len(expected)
    for pair in dataset:
        assert np.array_equal(np.array(pair.image), np.array(expected[pair.key, pair.caption]))
    gc.collect()  # webdataset leaves its files to the collector, whose warnings are not ours


def test_an_image_is_cropped_to_the_box_of_its_caption(manifest):
    regions = [pair for pair in PairDataset(manifest) if pair.key == REGIONS["key"]]
    whole = [pair for pair in PairDataset(manifest, crop=False) if pair.key == REGIONS["key"]]

    assert [list(pair.box) for pair in regions] == [list(pair.box) for pair in whole] == BOXES
    image = whole[0].image
    sides = [(0, 0, 24, 20), (12, 4, 48, 40), (0, 0, 1, 1)]  # of 48 x 40 pixels, outwards
    for pair, box in zip(regions, sides, strict=True):
        assert np.array_equal(np.array(pair.image), np.array(image.crop(box)))
    others = {pair.box for pair in PairDataset(manifest) if pair.key != REGIONS["key"]}
    assert others == {(0.0, 0.0, 1.0, 1.0)}


def test_transform_and_tokenize_are_applied(manifest):
    pair = PairDataset(manifest, transform=lambda image: image.size, tokenize=str.split)[0]

    assert pair.image == (48, 40)
    assert pair.caption == stored_pairs()[0][1].split()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_two_workers_of_a_data_loader_give_every_pair_once(manifest, context):
    dataset = PairDataset(manifest, transform=pixels)
    _ = dataset[0], dataset[15]  # so that shards are open in this process too

    loader = DataLoader(
        dataset, batch_size=4, shuffle=True, num_workers=2, multiprocessing_context=context
    )
    batches = list(loader)

    pairs = [pair for batch in batches for pair in zip(batch.key, batch.caption, strict=True)]
    assert Counter(pairs) == Counter(stored_pairs())
    assert batches[0].image.shape == (4, 8, 8, 3)
    assert len(batches[0].box) == 4


def test_a_pickled_dataset_gives_the_same_pairs(manifest):
    dataset = PairDataset(manifest)
    before = dataset[3]

    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301  # our own

    assert again[3].key == before.key
    assert again.digest == dataset.digest


def test_indices_are_those_of_a_sequence(manifest):
    dataset = PairDataset(manifest)

    assert dataset[-1].key == dataset[np.int64(NUM_PAIRS - 1)].key == stored_pairs()[-1][0]
    for index in (NUM_PAIRS, -NUM_PAIRS - 1):
        with pytest.raises(IndexError, match="of 26"):
            dataset[index]
    with pytest.raises(TypeError):
        dataset["0"]


def test_few_shards_stay_open(manifest, monkeypatch):
    monkeypatch.setattr(pair_dataset, "_MAX_OPEN_SHARDS", 1)
    dataset = PairDataset(manifest)

    keys = [dataset[index].key for index in (0, 13, 25, 1)]

    assert keys == [stored_pairs()[index][0] for index in (0, 13, 25, 1)]
    assert len(dataset._shards) == 1


def test_webp_shards_give_the_same_pixels(manifest, tmp_path):
    other = write_pairs(tmp_path / "webp.json", SHARDS, rules=None, image_format=WEBP)

    for jpeg_pair, webp_pair in zip(PairDataset(manifest), PairDataset(other), strict=True):
        assert webp_pair[1:] == jpeg_pair[1:]
        assert np.array_equal(np.array(webp_pair.image), np.array(jpeg_pair.image))


def test_remote_shards_are_read_through_a_cache(manifest, tmp_path):
    for path in tmp_path.rglob("*.*"):
        with fsspec.open(f"memory://pairs/{path.relative_to(tmp_path)}", "wb") as file:
            file.write(path.read_bytes())

    dataset = PairDataset("memory://pairs/pairs.json", cache=tmp_path / "cache")

    assert [pair.key for pair in dataset] == [key for key, _ in stored_pairs()]
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3
    with pytest.raises(PmdError, match=r"set data\.cache"):
        PairDataset("memory://pairs/pairs.json")[0]


def test_a_manifest_without_pairs_is_refused(tmp_path):
    texts = write_texts(tmp_path / "texts.json", [["a"]])
    images = write_pairs(tmp_path / "images.json", [[sample(1, [])]], kind="images")

    for path in (texts, images):
        with pytest.raises(PmdError, match="PairDataset needs pairs"):
            PairDataset(path)
    with pytest.raises(PmdError, match="cannot read"):
        PairDataset(tmp_path / "nothing.json")


def test_an_empty_manifest_has_no_pairs(tmp_path):
    dataset = PairDataset(write_pairs(tmp_path / "empty.json", []))

    assert len(dataset) == 0
    assert list(dataset) == []


def test_a_changed_shard_is_one_sentence(manifest, tmp_path):
    tar = tmp_path / "pairs" / "00002.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"\1")

    with pytest.raises(PmdError, match=r"00002\.tar is not the file that the manifest names"):
        PairDataset(manifest)[12]
    assert PairDataset(manifest)[0].key == stored_pairs()[0][0]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (".tar", lambda content: content[: len(content) // 2] + bytes(5000), "does not fit"),
        (".tar", lambda content: b"", "byte range"),
        (".tar", lambda content: content.replace(b"\xff\xd8\xff", b"\0\0\0"), "is not the image"),
        (".parquet", lambda content: b"PAR1", "cannot be read as a ledger"),
    ],
)
def test_a_hostile_shard_is_one_sentence(manifest, tmp_path, name, change, reason):
    file = tmp_path / "pairs" / f"00000{name}"
    file.write_bytes(change(file.read_bytes()))
    field = "sha256" if name == ".tar" else "ledger_sha256"
    update = {field: sha256(file)}
    if name == ".tar":
        update["num_bytes"] = file.stat().st_size
    reseal(
        tmp_path / "pairs.json",
        lambda shard: shard.model_copy(update=update) if shard.part == 0 else shard,
    )

    with pytest.raises(PmdError, match=reason) as caught:
        list(PairDataset(manifest))

    assert "\n" not in str(caught.value)
