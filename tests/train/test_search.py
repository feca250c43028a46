from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY, flava
from tiny_datasets import WORDS, samples, write_pairs, write_texts, write_vocabulary

from flava_train.config import validate_config
from flava_train.data.wordpiece import load_wordpiece
from flava_train.evaluation.batches import evaluation_batches
from flava_train.evaluation.search import search
from flava_train.evaluation.trained_model import TrainedModel
from pmd_pipeline.contract.errors import PmdError

QUERIES = [WORDS[7], " ".join(WORDS[5:9]), WORDS[-1]]


@pytest.fixture
def trained(tmp_path):
    wordpiece = load_wordpiece(write_vocabulary(tmp_path / "vocab.txt"))
    shape = replace(TINY, text_vocab=len(wordpiece.vocabulary))
    content = {"steps": 1, "batch": 1, "micro_batch_size": 1, "optimizer": {"warmup": 0}}
    config = validate_config({**content, "data": {"caption_tokens": 16}}, source="test")
    return TrainedModel(Path("nowhere"), config, flava(shape, dtype=torch.float32), wordpiece)


def test_hits_are_the_most_similar_images_in_order(trained, tmp_path):
    manifest = write_pairs(tmp_path / "pairs.json", [samples(5), samples(6, start=5)])

    results = search(trained, manifest, QUERIES, 4)

    [batch] = evaluation_batches(manifest, trained.wordpiece, TINY.image_size, 16)
    tokens, lengths = map(torch.from_numpy, trained.wordpiece.encode(QUERIES, 16))
    with torch.no_grad():
        texts = trained.model.embed_texts(tokens, lengths)
        similarity = texts @ trained.model.embed_images(batch.pixels).T
    for row, hits in zip(similarity, results, strict=True):
        ranked = sorted(zip(row.tolist(), batch.keys, strict=True), reverse=True)[:4]
        assert [hit.key for hit in hits] == [key for _, key in ranked]
        assert [hit.similarity for hit in hits] == pytest.approx([x for x, _ in ranked], abs=1e-5)


def test_a_manifest_with_fewer_images_gives_all_of_them(trained, tmp_path):
    manifest = write_pairs(tmp_path / "pairs.json", [samples(3)])

    [hits] = search(trained, manifest, QUERIES[:1], 10)

    assert len({hit.key for hit in hits}) == 3


def test_texts_are_refused(trained, tmp_path):
    manifest = write_texts(tmp_path / "texts.json", [["some words"]])

    with pytest.raises(PmdError, match="needs pairs"):
        search(trained, manifest, QUERIES, 1)
