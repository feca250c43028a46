import math
from dataclasses import replace

import pytest
import torch
from tiny import PATCHES, TINY, flava, gradients, images, pairs, texts

from flava_train.data.masking import IGNORE
from flava_train.objective.losses import (
    ABLATIONS,
    Objective,
    contrastive_sum,
    masked_patches,
    sigmoid_sum,
)
from flava_train.objective.step import train_step


def units(count, *, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(count, 8, generator=draw, dtype=torch.float64), dim=1
    )


def test_contrast_of_random_guessing_is_log_b():
    same = torch.ones(8, 4) / 2

    loss = contrastive_sum(same, same, torch.ones(8, dtype=torch.bool), torch.ones(1)) / 8

    assert loss.item() == pytest.approx(math.log(8))


def test_contrast_is_cross_entropy_of_both_directions():
    image, text = units(5), units(5, seed=1)

    loss = contrastive_sum(image, text, torch.ones(5, dtype=torch.bool), torch.tensor([3.0])) / 5

    logits = 3 * image @ text.T
    expected = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    assert loss.item() == pytest.approx(expected.item())


def test_a_mismatched_pair_is_a_negative_but_no_question():
    image, text = units(5), units(5, seed=1)
    matched = torch.tensor([True, True, False, True, True])

    loss = contrastive_sum(image, text, matched, torch.tensor([3.0]))

    logits = 3 * image @ text.T
    rows = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
    assert loss.item() == pytest.approx(-rows[matched].sum().item() / 2)


def test_sigmoid_loss_asks_of_every_image_and_text_whether_they_belong_together():
    image, text = units(4), units(4, seed=1)
    matched = torch.tensor([True, True, False, True])

    loss = sigmoid_sum(image, text, matched, torch.tensor([10.0]), torch.tensor([-10.0]))

    expected = 0.0
    for i in range(4):
        for j in range(4):
            sign = 1 if i == j and matched[i] else -1
            logit = 10 * (image[i] @ text[j]).item() - 10
            expected += math.log1p(math.exp(-sign * logit))
    assert loss.item() == pytest.approx(expected)


def test_padding_masks_no_patch():
    batch = images(3)
    batch = replace(
        batch,
        masked_positions=torch.tensor([[3, 7, 0], [0, 5, 0], [0, 0, 0]]),
        codes=torch.tensor([[1, 0, IGNORE], [4, 4, IGNORE], [IGNORE, IGNORE, IGNORE]]),
    )

    mask = masked_patches(batch, PATCHES)

    assert [row.nonzero().flatten().tolist() for row in mask] == [[3, 7], [0, 5], []]


PARTS = {
    "image": {"mim", "flava_c", "flava_mm", "flava_without_init", "flava"},
    "text": {"mlm", "flava_c", "flava_mm", "flava_without_init", "flava"},
    "multimodal": {"flava_mm", "flava_without_init", "flava"},
    "image_projection": {"flava_c", "flava_mm", "flava_without_init", "flava"},
    "logit_scale": {"flava_c", "flava_mm", "flava_without_init", "flava"},
    "mim_head": {"mim", "flava_without_init", "flava"},
    "mlm_head": {"mlm", "flava_without_init", "flava"},
    "mmm_image_head": {"flava_mm", "flava_without_init", "flava"},
    "mmm_text_head": {"flava_mm", "flava_without_init", "flava"},
    "itm_head": {"flava_mm", "flava_without_init", "flava"},
}


@pytest.mark.parametrize("row", ABLATIONS)
def test_each_row_of_the_ablation_trains_its_parts_and_no_others(row):
    objective = ABLATIONS[row]
    model = flava()
    batches = {"pairs": pairs(3), "images": images(3), "texts": texts(3)}
    trained = set()

    for stream, batch in batches.items():
        if getattr(objective.streams, stream):
            train_step(model, [batch], objective)
            trained |= {name.split(".")[0] for name in gradients(model)}

    assert trained & PARTS.keys() == {part for part, rows in PARTS.items() if row in rows}


def test_the_rows_of_the_ablation_draw_streams_as_the_paper_does():
    for objective in ABLATIONS.values():
        streams = objective.streams
        assert streams.pairs + streams.images + streams.texts == pytest.approx(1)
    assert ABLATIONS["flava"] == Objective()
    assert [row for row, objective in ABLATIONS.items() if objective.unimodal_init] == ["flava"]


@pytest.mark.parametrize("name", ["contrastive", "mmm_image", "mmm_text", "itm"])
def test_a_weight_scales_the_gradient_of_its_loss_alone(name):
    nothing = dict.fromkeys(["contrastive", "mmm_image", "mmm_text", "itm"], 0.0)
    model, batch = flava(), pairs(4)

    one = train_step(model, [batch], Objective(**nothing | {name: 1.0}))
    single = gradients(model)
    two = train_step(model, [batch], Objective(**nothing | {name: 2.0}))

    assert one.keys() == {name}
    assert one[name] == two[name]
    assert all(
        torch.allclose(2 * single[part], gradient) for part, gradient in gradients(model).items()
    )


def test_a_batch_without_weight_leaves_no_gradient():
    model = flava()

    losses = train_step(model, [images(2)], Objective(mim=0.0))

    assert losses == {}
    assert gradients(model) == {}


def test_siglip_asks_for_the_bias_it_needs():
    with pytest.raises(ValueError, match=r"FlavaConfig\(logit_bias=-10.0\)"):
        train_step(flava(TINY), [pairs(2)], Objective(contrast="siglip"))
