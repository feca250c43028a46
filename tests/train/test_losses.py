import math
from dataclasses import replace

import pytest
import torch
from ablations import ABLATIONS
from tiny import PATCHES, TINY, flava, gradients, images, pairs, texts
from user_losses import USER_LOSSES, with_user_losses

from flava_train.data.masking import IGNORE
from flava_train.model.flava import PUBLISHED_HEADS, Flava
from flava_train.objective.losses import (
    LOSSES,
    clip_loss_sum,
    masked_patches,
    siglip_loss_sum,
)
from flava_train.objective.objective import ExtraLoss, Objective
from flava_train.objective.step import train_step


def unit_vectors(count, *, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(count, 8, generator=draw, dtype=torch.float64), dim=1
    )


def test_contrastive_loss_of_random_guessing_is_log_b():
    same = torch.ones(8, 4) / 2

    loss = clip_loss_sum(same, same, torch.ones(8, dtype=torch.bool), torch.ones(1)) / 8

    assert loss.item() == pytest.approx(math.log(8))


def test_contrastive_loss_is_the_mean_cross_entropy_of_both_directions():
    image, text = unit_vectors(5), unit_vectors(5, seed=1)

    loss = clip_loss_sum(image, text, torch.ones(5, dtype=torch.bool), torch.tensor([3.0])) / 5

    logits = 3 * image @ text.T
    expected = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    assert loss.item() == pytest.approx(expected.item())


def test_a_mismatched_pair_is_a_negative_without_a_loss_of_its_own():
    image, text = unit_vectors(5), unit_vectors(5, seed=1)
    matched = torch.tensor([True, True, False, True, True])

    loss = clip_loss_sum(image, text, matched, torch.tensor([3.0]))

    logits = 3 * image @ text.T
    rows = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
    assert loss.item() == pytest.approx(-rows[matched].sum().item() / 2)


def test_siglip_loss_is_binary_cross_entropy_of_every_image_with_every_text():
    image, text = unit_vectors(4), unit_vectors(4, seed=1)
    matched = torch.tensor([True, True, False, True])

    loss = siglip_loss_sum(image, text, matched, torch.tensor([10.0]), torch.tensor([-10.0]))

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


MODULES = {
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
def test_each_row_of_the_ablation_trains_only_its_modules(row):
    objective = ABLATIONS[row]
    model = flava()
    batches = {"pairs": pairs(3), "images": images(3), "texts": texts(3)}
    trained = set()

    for stream, batch in batches.items():
        if getattr(objective.streams, stream):
            train_step(model, [batch], objective)
            trained |= {name.split(".")[0] for name in gradients(model)}

    assert trained & MODULES.keys() == {module for module, rows in MODULES.items() if row in rows}


def test_the_streams_of_each_row_of_the_ablation_add_up_to_1():
    for objective in ABLATIONS.values():
        streams = objective.streams
        assert streams.pairs + streams.images + streams.texts == pytest.approx(1)
    assert ABLATIONS["flava"] == Objective()
    assert [row for row, objective in ABLATIONS.items() if objective.unimodal_init] == ["flava"]


@pytest.mark.parametrize("name", ["contrastive", "mmm_image", "mmm_text", "itm"])
def test_a_weight_scales_the_gradient_of_its_loss_and_not_the_loss(name):
    zero = dict.fromkeys(["contrastive", "mmm_image", "mmm_text", "itm"], 0.0)
    model, batch = flava(), pairs(4)

    one = train_step(model, [batch], Objective(**zero | {name: 1.0}))
    single = gradients(model)
    two = train_step(model, [batch], Objective(**zero | {name: 2.0}))

    assert one.keys() == {name}
    assert one[name] == two[name]
    assert all(
        torch.allclose(2 * single[part], gradient) for part, gradient in gradients(model).items()
    )


def test_a_batch_for_which_no_loss_counts_leaves_no_gradient():
    model = flava()

    losses = train_step(model, [images(2)], Objective(mim=0.0))

    assert losses == {}
    assert gradients(model) == {}


def test_siglip_without_a_bias_is_an_error():
    with pytest.raises(ValueError, match=r"FlavaConfig\(logit_bias=-10.0\)"):
        train_step(flava(TINY), [pairs(2)], Objective(contrastive_loss="siglip"))


def heads_of(model):
    return {name.removesuffix("_head") for name, _ in model.named_children() if "_head" in name}


@pytest.mark.parametrize("row", ABLATIONS)
def test_a_model_has_a_head_for_each_loss_that_counts_and_no_other(row):
    objective = ABLATIONS[row]

    model = Flava(TINY, objective.heads)

    assert heads_of(model) == {name for name in PUBLISHED_HEADS if getattr(objective, name)}


@pytest.mark.parametrize("name", PUBLISHED_HEADS)
def test_a_model_without_a_head_trains_its_other_losses(name):
    objective = Objective(**{name: 0.0})
    model = Flava(TINY, objective.heads).double()

    losses = [train_step(model, [batch], objective) for batch in (pairs(3), images(3), texts(3))]

    names = {loss for one in losses for loss in one}
    assert names == {"contrastive", *PUBLISHED_HEADS} - {name}
    assert not hasattr(model, f"{name}_head")


@pytest.mark.parametrize("name", [*PUBLISHED_HEADS, "rotation", "text_length"])
def test_initial_weights_do_not_depend_on_other_heads(name):
    full = with_user_losses(Objective())
    torch.manual_seed(5)
    expected = Flava(TINY, full.heads).state_dict()

    torch.manual_seed(5)
    model = Flava(TINY, {name: full.heads[name]})

    assert heads_of(model) == {name}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_each_users_head_has_its_own_initial_weights_and_each_seed_others():
    heads = dict.fromkeys(["one", "two"], USER_LOSSES["rotation"].entry.head)
    models = []

    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(Flava(TINY, heads))

    weights = [model.head(name).weight for model in models for name in heads]
    assert not any(torch.equal(weights[i], weights[j]) for i in range(4) for j in range(i))


def test_data_needs_follow_from_the_losses():
    masked = {"masked_length": USER_LOSSES["masked_length"]}
    plain = {"plain_length": USER_LOSSES["plain_length"]}
    contrastive = ABLATIONS["flava_c"]

    assert replace(contrastive, losses=masked).data_needs.masks_pairs
    assert not replace(contrastive, losses=plain).data_needs.masks_pairs
    assert replace(contrastive, losses=plain).uses_fusion
    assert Objective(mmm_image=0.0).data_needs.codes == {"images"}
    assert Objective(mim=0.0).data_needs.codes == {"pairs"}


def test_an_unmasked_loss_reads_images_and_captions_as_they_are():
    model = flava()
    model.add_module("plain_length_head", torch.nn.Linear(32, 2).double())
    objective = Objective(
        **dict.fromkeys(["contrastive", "mmm_image", "mmm_text", "itm"], 0.0),
        losses={"plain_length": USER_LOSSES["plain_length"]},
    )
    batch = pairs(4)

    (loss,) = train_step(model, [batch], objective).values()

    with torch.no_grad():
        image = model.image(batch.images.pixels)
        text = model.text(batch.texts.tokens, batch.texts.lengths)
        states = model.multimodal.norm(model.multimodal(image, text, batch.texts.lengths))
        logits = model.plain_length_head(states[:, 0])
    expected = torch.nn.functional.cross_entropy(logits, (batch.texts.lengths > 8).long())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "text"}, "the stream images has no encoder 'text'; it has image"),
        ({"encoder": "multimodal"}, "the stream images has no encoder 'multimodal'"),
        ({"encoder": None}, "a loss without `predict` needs an encoder and a head"),
        ({"head": None}, "a loss without `predict` needs an encoder and a head"),
    ],
)
def test_a_loss_that_cannot_be_computed_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        replace(LOSSES["mim"], **change)


def test_a_users_loss_must_be_loaded_before_it_is_trained():
    objective = Objective(losses={"mine": ExtraLoss("my_module:loss")})

    with pytest.raises(TypeError, match="the loss mine = my_module:loss is not loaded"):
        train_step(flava(), [pairs(2)], objective)
