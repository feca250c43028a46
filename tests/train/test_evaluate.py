import json
import math
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pytest
import tiny_datasets
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from trials import TOWER, small_config, write_datasets

from flava_train import cli
from flava_train.config import EvaluationConfig
from flava_train.data.config import DataConfig
from flava_train.data.wordpiece import load_wordpiece
from flava_train.evaluation import retrieval, zero_shot
from flava_train.evaluation.batches import evaluation_batches
from flava_train.evaluation.embedder import Embedder
from flava_train.evaluation.evaluate import check_evaluation
from flava_train.evaluation.retrieval import RECALL_AT, retrieval_recall
from flava_train.evaluation.templates import IMAGENET_TEMPLATES
from flava_train.evaluation.trained_model import load_trained_model
from flava_train.evaluation.zero_shot import class_names, zero_shot_accuracy
from flava_train.model.flava import Flava, FlavaConfig, TowerConfig
from flava_train.model.hf import load_hf
from flava_train.train import train
from pmd_pipeline.contract.errors import PmdError


def brute_force(similarity, targets, rank):
    """Share of queries with a target among the first, over all orders of equal candidates."""
    hits = 0.0
    for row, good in zip(similarity, targets, strict=True):
        orders = {
            order
            for order in permutations(range(len(row)))
            if all(row[a] >= row[b] for a, b in pairwise(order))
        }
        hits += sum(bool(good & set(order[:rank])) for order in orders) / len(orders)
    return hits / len(similarity)


@given(
    st.integers(1, 4).flatmap(
        lambda images: st.tuples(
            st.just(images), st.lists(st.integers(0, images - 1), min_size=0, max_size=2)
        )
    ),
    st.integers(0, 2**32),
    st.integers(1, 3),
)
def test_recall_equals_brute_force(shape, seed, levels):
    images, more = shape
    numbers = torch.tensor([*range(images), *more])
    rng = np.random.default_rng(seed)
    # few levels, so that many candidates have equal similarity
    image = torch.from_numpy(rng.integers(-levels, levels + 1, (images, 2))).float()
    text = torch.from_numpy(rng.integers(-levels, levels + 1, (len(numbers), 2))).float()

    result = retrieval_recall(image, text, numbers)

    similarity = (text @ image.T).tolist()
    to_image = [{int(number)} for number in numbers]
    to_text = [set(torch.nonzero(numbers == one)[:, 0].tolist()) for one in range(images)]
    for rank in RECALL_AT:
        expected = brute_force(similarity, to_image, rank)
        assert result.metrics[f"text_to_image_r{rank}"] == pytest.approx(expected)
        expected = brute_force((image @ text.T).tolist(), to_text, rank)
        assert result.metrics[f"image_to_text_r{rank}"] == pytest.approx(expected)


def test_equal_similarities_give_chance_level():
    numbers = torch.arange(100).repeat_interleave(5)
    alike = torch.ones(500, 3) / math.sqrt(3)

    result = retrieval_recall(alike[:100], alike, numbers)

    assert result.metrics == result.chance
    assert result.chance["text_to_image_r5"] == pytest.approx(5 / 100)
    # one of five right ones among ten of five hundred
    miss = math.comb(495, 10) / math.comb(500, 10)
    assert result.chance["image_to_text_r10"] == pytest.approx(1 - miss)


def test_a_perfect_model_has_full_recall(monkeypatch):
    monkeypatch.setattr(retrieval, "_QUERIES_AT_ONCE", 7)  # more than one cut
    image = torch.eye(40)
    numbers = torch.arange(40).repeat_interleave(2)

    result = retrieval_recall(image, image[numbers], numbers)

    assert set(result.metrics.values()) == {1.0}


def test_captions_may_be_in_any_order():
    image = torch.eye(12)
    numbers = torch.randperm(24, generator=torch.Generator().manual_seed(0)) % 12

    result = retrieval_recall(image, image[numbers], numbers)

    assert set(result.metrics.values()) == {1.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def embedder(world):
    wordpiece = load_wordpiece(str(world / "vocab.txt"))
    tower = TowerConfig(**TOWER)
    config = FlavaConfig(
        image=tower,
        text=tower,
        multimodal=tower,
        image_size=32,
        patch_size=8,
        image_vocab=67,
        text_vocab=len(wordpiece.vocabulary),
        text_positions=20,
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = Flava(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return Embedder(model, wordpiece, 16, 5, None)


def test_held_out_pairs_are_embedded_without_masks(world, embedder):
    batches = list(
        evaluation_batches(str(world / "held-out.json"), embedder.wordpiece, 32, 16, batch=5)
    )

    images, texts, numbers = embedder.images_and_captions(batches)

    assert images.shape == (12, 24)
    assert numbers.tolist() == [number // 2 for number in range(24)]
    one = batches[1]
    with torch.no_grad():
        image = embedder.model.embed_images(one.pixels)
        text = embedder.model.embed_texts(one.tokens, one.lengths)
    assert torch.allclose(images[5:10], image, atol=1e-5)
    assert torch.allclose(texts[10:20], text, atol=1e-5)


def write_image(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny_datasets.jpeg(number))


def test_a_class_is_the_mean_of_its_80_templates(tmp_path, embedder):
    for number in range(14):
        write_image(tmp_path / f"big_{'abcdefg'[number % 7]}" / f"{number}.jpg", number)
    names = [f"big {letter}" for letter in "abcdefg"]

    result = zero_shot_accuracy(embedder, tmp_path)

    vectors = []
    for name in names:
        sentences = embedder.texts(
            [template.replace("{}", name) for template in IMAGENET_TEMPLATES]
        )
        vectors.append(sentences.mean(0) / sentences.mean(0).norm())
    for name, vector in zip(names, vectors, strict=True):
        assert torch.allclose(zero_shot._class_vector(embedder, name), vector, atol=1e-6)
    hits = {1: 0, 5: 0}
    for number in range(14):
        path = tmp_path / names[number % 7].replace(" ", "_") / f"{number}.jpg"
        square = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
        order = (embedder.images(pixels) @ torch.stack(vectors).T)[0].argsort(descending=True)
        for rank in hits:
            hits[rank] += number % 7 in order[:rank].tolist()
    assert result.metrics == {"zero_shot_top1": hits[1] / 14, "zero_shot_top5": hits[5] / 14}
    assert result.chance == {"zero_shot_top1": 1 / 7, "zero_shot_top5": 5 / 7}


def test_there_are_80_templates_with_one_placeholder_each():
    assert len(set(IMAGENET_TEMPLATES)) == 80
    assert all(template.count("{}") == 1 for template in IMAGENET_TEMPLATES)


def test_unreadable_images_are_left_out_and_counted(tmp_path, embedder):
    write_image(tmp_path / "cat" / "a.jpg", 1)
    write_image(tmp_path / "dog" / "b.jpg", 2)
    (tmp_path / "dog" / "c.jpg").write_bytes(b"no write_image")
    (tmp_path / "dog" / "d.jpg").write_bytes(tiny_datasets.jpeg(3)[:200])

    result = zero_shot_accuracy(embedder, tmp_path)

    assert result.metrics["zero_shot_unreadable"] == 0.5


def test_classes_may_have_names_in_a_table(tmp_path):
    for folder in ("n01440764", "n01443537"):
        (tmp_path / folder).mkdir()
    (tmp_path / "classes.tsv").write_text("n01443537\tgoldfish\nn01440764\ttench\n")

    assert class_names(tmp_path) == {"n01440764": "tench", "n01443537": "goldfish"}
    (tmp_path / "n9").mkdir()
    with pytest.raises(PmdError, match="names the class of the folder n9"):
        class_names(tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"retrieval": "none.json"}, "cannot read none.json"),
        ({"classes": "nowhere"}, "no such folder of classes"),
        ({"classes": "empty"}, "it has no folder of a class"),
        ({"classes": "full"}, "evaluation.metric = text_to_image_r1 needs evaluation.retrieval"),
    ],
)
def test_an_impossible_evaluation_is_refused_before_the_first_step(
    tmp_path, monkeypatch, section, message
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("full/cat").mkdir(parents=True)

    with pytest.raises(PmdError, match=message):
        check_evaluation(EvaluationConfig(**section))


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("images", "holds no pairs to evaluate on, but 30 images of kind images"),
        ("texts", "holds no pairs to evaluate on"),
        ("empty", "but 0 images of kind pairs"),
    ],
)
def test_a_manifest_without_pairs_is_refused_before_the_first_step(tmp_path, manifest, message):
    write_datasets(tmp_path)
    tiny_datasets.write_pairs(tmp_path / "empty.json", [])

    with pytest.raises(PmdError, match=message):
        check_evaluation(EvaluationConfig(retrieval=str(tmp_path / f"{manifest}.json")))


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_missing_held_out_shards_are_refused_before_the_first_step(tmp_path, suffix):
    write_datasets(tmp_path)
    config = EvaluationConfig(retrieval=str(tmp_path / "held-out.json"))
    check_evaluation(config)
    for path in (tmp_path / "held-out").glob(f"*.{suffix}"):
        path.unlink()

    with pytest.raises(PmdError, match="run `pmd build` again"):
        check_evaluation(config)


def test_classes_without_any_image_are_refused(tmp_path, embedder):
    (tmp_path / "cat").mkdir()

    with pytest.raises(PmdError, match="no images in the folders"):
        zero_shot_accuracy(embedder, tmp_path)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    changes = {"evaluation.retrieval": str(world / "held-out.json"), "steps": 4}
    train(small_config(world, out, changes), quiet=True)
    return out


def test_the_command_gives_the_metrics_of_the_run(trained, world, capsys):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]

    cli.evaluate(trained, None, None, as_json=True)

    assert {"after": 4} | json.loads(capsys.readouterr().out) == lines[-1]
    cli.evaluate(trained, str(world / "held-out.json"))
    words = capsys.readouterr().out
    assert "text to image r1" in words
    assert words.count("chance") == 6


def test_a_run_is_evaluated_on_classes_too(trained, tmp_path, capsys):
    write_image(tmp_path / "a" / "a.jpg", 1)
    write_image(tmp_path / "b" / "b.jpg", 2)

    cli.evaluate(trained, None, str(tmp_path), as_json=True)

    result = json.loads(capsys.readouterr().out)
    assert result["zero_shot_top5"] == 1.0
    assert result["chance"] == {"zero_shot_top1": 0.5, "zero_shot_top5": 1.0}


def test_an_exported_run_has_the_weights_and_the_vocabulary(trained, tmp_path):
    cli.export(trained, tmp_path / "hf")

    assert (tmp_path / "hf" / "vocab.txt").read_bytes() == (trained / "vocab.txt").read_bytes()
    ours = load_trained_model(trained).model.state_dict()
    assert all(torch.equal(ours[name], one) for name, one in state(tmp_path / "hf").items())


def state(folder):
    return load_hf(folder).state_dict()


def test_held_out_shards_use_the_same_cache(tmp_path):
    files = DataConfig(cache=str(tmp_path), cache_gib=2.0, verify=False).file_cache()

    assert (files.folder, files.max_bytes, files.verify) == (tmp_path, 2 << 30, False)
