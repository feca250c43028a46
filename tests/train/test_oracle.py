"""Parity with transformers' `FlavaForPreTraining` (measured with 5.23.0 on torch 2.13.0).

Tolerances: 2e-6 in float32 and 1e-10 in float64, absolute, on hidden states, losses and
gradients. Every parameter is random.
"""

from dataclasses import replace

import pytest
import torch
from tiny import PATCHES, TINY, flava, gradients, images, max_difference, pairs, texts

from flava_train.data.masking import IGNORE
from flava_train.model.flava import Flava, FlavaConfig
from flava_train.model.hf import hf_state, read_config, write_config
from flava_train.objective.losses import masked_patches
from flava_train.objective.objective import Objective
from flava_train.objective.step import train_step

transformers = pytest.importorskip("transformers")

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-10)]
)


def oracle(model):
    theirs = transformers.FlavaForPreTraining(transformers.FlavaConfig(**write_config(model)))
    missing, unexpected = theirs.load_state_dict(hf_state(model), strict=False)
    assert [name for name in missing if not name.endswith("_head.bias")] == []
    assert unexpected == []
    return theirs.to(model.logit_scale.dtype).train()


def scatter(positions, labels, width):
    """Labels at their positions, as transformers reads them."""
    wide = torch.full((len(positions), width), IGNORE)
    for row in range(len(positions)):
        kept = labels[row] != IGNORE
        wide[row, positions[row][kept]] = labels[row][kept]
    return wide


def text_inputs(batch):
    length = batch.tokens.shape[1]
    return {
        "input_ids": batch.tokens,
        "input_ids_masked": batch.masked_tokens,
        "attention_mask": (torch.arange(length) < batch.lengths[:, None]).long(),
        "mlm_labels": scatter(batch.masked_positions, batch.labels, length),
    }


def image_inputs(batch):
    return {
        "pixel_values": batch.pixels,
        "bool_masked_pos": masked_patches(batch, PATCHES),
        "mim_labels": scatter(batch.masked_positions, batch.codes, PATCHES),
    }


@PRECISIONS
@pytest.mark.parametrize("mismatched", [(), (1, 4)], ids=["matched", "mixed"])
def test_pairs_have_the_losses_and_gradients_of_transformers(dtype, tolerance, mismatched):
    model = flava(dtype=dtype)
    theirs = oracle(model)
    batch = pairs(6, dtype=dtype, mismatched=mismatched)

    ours = train_step(model, [batch], Objective())
    output = theirs(
        **text_inputs(batch.texts),
        **image_inputs(batch.images),
        itm_labels=batch.matched.long(),
        return_loss=True,
    )
    output.loss.backward()

    expected = {
        "contrastive": output.loss_info.global_contrastive,
        "mmm_image": output.loss_info.mmm_image,
        "mmm_text": output.loss_info.mmm_text,
        "itm": output.loss_info.itm,
    }
    assert max_difference(ours, expected) < tolerance
    assert max_difference(as_theirs(model), their_gradients(theirs)) < tolerance


@PRECISIONS
@pytest.mark.parametrize("kind", ["mim", "mlm"])
def test_images_and_texts_alone_have_the_losses_and_gradients_of_transformers(
    dtype, tolerance, kind
):
    model = flava(dtype=dtype)
    theirs = oracle(model)
    batch = images(5, dtype=dtype) if kind == "mim" else texts(5)

    ours = train_step(model, [batch], Objective())
    output = theirs(
        **(image_inputs(batch) if kind == "mim" else text_inputs(batch)), return_loss=True
    )
    output.loss.backward()

    assert max_difference(ours, {kind: output.loss_info[kind]}) < tolerance
    assert max_difference(as_theirs(model), their_gradients(theirs)) < tolerance


@PRECISIONS
def test_every_hidden_state_is_that_of_transformers(dtype, tolerance):
    model = flava(dtype=dtype)
    theirs = oracle(model)
    batch = pairs(6, dtype=dtype)
    patch_mask = masked_patches(batch.images, PATCHES)
    states = {}

    for tower in ("image", "text", "multimodal"):
        for number, block in enumerate(getattr(model, tower).blocks):
            block.register_forward_hook(
                lambda *call, key=(tower, number): states.update({key: call[2]})
            )
    image = model.image(batch.images.pixels, patch_mask)
    text = model.text(batch.texts.masked_tokens, batch.texts.lengths)
    both = model.multimodal(image, text, batch.texts.lengths)
    output = theirs.flava(
        input_ids=batch.texts.masked_tokens,
        pixel_values=batch.images.pixels,
        bool_masked_pos=patch_mask,
        attention_mask=text_inputs(batch.texts)["attention_mask"],
        output_hidden_states=True,
    )
    towers = {"image": output.image_output, "text": output.text_output}
    expected = {
        (tower, number): state
        for tower, output_of in towers.items()
        for number, state in enumerate(output_of.hidden_states[1:])
    }
    last = {key: states.pop(key) for key in list(states) if key[0] == "multimodal"}

    assert max_difference(states, expected) < tolerance
    assert len(last) == TINY.multimodal.layers
    normed = {
        "image": model.image.norm(image),
        "text": model.text.norm(text),
        "multimodal": model.multimodal.norm(both),
    }
    theirs_normed = {
        "image": output.image_embeddings,
        "text": output.text_embeddings,
        "multimodal": output.multimodal_embeddings,
    }
    assert max_difference(normed, theirs_normed) < tolerance


@PRECISIONS
def test_embeddings_are_those_of_transformers(dtype, tolerance):
    model = flava(dtype=dtype)
    theirs = oracle(model).flava
    batch = pairs(6, dtype=dtype)

    image = model.embed_images(batch.images.pixels)
    text = model.embed_texts(batch.texts.tokens, batch.texts.lengths)
    inputs = text_inputs(batch.texts)
    # their features are projections of all tokens
    their_image = theirs.get_image_features(batch.images.pixels).pooler_output[:, 0]
    their_text = theirs.get_text_features(
        inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).pooler_output[:, 0]

    unit = torch.nn.functional.normalize
    assert torch.allclose(image, unit(their_image, dim=-1), rtol=0, atol=tolerance)
    assert torch.allclose(text, unit(their_text, dim=-1), rtol=0, atol=tolerance)


def test_without_the_padding_mask_states_are_those_of_the_released_weights():
    model = flava(replace(TINY, mm_pad_mask=False))
    theirs = oracle(model).flava
    batch = pairs(6)
    lengths = torch.full((6,), batch.texts.tokens.shape[1])  # no mask in transformers: all is text

    image = model.image(batch.images.pixels)
    text = model.text(batch.texts.tokens, lengths)
    ours = model.multimodal.norm(model.multimodal(image, text, batch.texts.lengths))
    output = theirs(
        input_ids=batch.texts.tokens, pixel_values=batch.images.pixels, output_hidden_states=True
    )

    assert torch.allclose(ours, output.multimodal_embeddings, rtol=0, atol=1e-10)


def test_larger_images_get_the_positions_of_transformers():
    model = flava()
    theirs = oracle(model).flava.image_model
    pixels = torch.randn(2, 3, 48, 48, dtype=torch.float64)

    ours = model.image.norm(model.image(pixels))
    output = theirs(pixels, interpolate_pos_encoding=True)

    assert torch.allclose(ours, output.last_hidden_state, rtol=0, atol=1e-10)


def test_the_configuration_survives_a_round_trip():
    model = Flava(replace(TINY, mm_pad_mask=False, logit_bias=-10.0))

    assert read_config(write_config(model)) == model.config
    assert read_config(transformers.FlavaConfig().to_dict()) == FlavaConfig()


def their_gradients(theirs):
    """Gradients by the names in files, where a tied bias has one name."""
    return {
        name.replace("_head.bias", "_head.decoder.bias"): gradient
        for name, gradient in gradients(theirs).items()
    }


def as_theirs(model):
    """Our gradients under transformers' names, without the poolers, which have none."""
    shell = Flava(model.config).to(model.logit_scale.dtype)
    with torch.no_grad():
        for ours, copy in zip(model.parameters(), shell.parameters(), strict=True):
            copy.copy_(torch.full_like(ours, torch.nan) if ours.grad is None else ours.grad)
    theirs = {name: one for name, one in hf_state(shell).items() if "_model.pooler." not in name}
    return {name: one for name, one in theirs.items() if not one.isnan().any()}
