import math
from dataclasses import replace

import pytest
import torch
from tiny import PATCHES, TINY, flava, gradients, images, max_difference, pairs, texts

from flava_train.data.batches import pad_to_width
from flava_train.model.flava import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Flava,
    FlavaConfig,
    LayerNorm,
    TowerConfig,
    gather,
    load_dino,
)
from flava_train.objective.losses import masked_patches
from flava_train.objective.objective import Objective
from flava_train.objective.step import train_step


def test_the_default_model_has_as_many_parameters_as_the_published_one():
    with torch.device("meta"):
        model = Flava(FlavaConfig())

    count = sum(parameter.numel() for parameter in model.parameters())

    # 357.65 M in transformers' FlavaForPreTraining(FlavaConfig()), less 53.79 M of image
    # tokenizer and 3 x 0.59 M of poolers
    assert count / 1e6 == pytest.approx(357.65 - 53.79 - 3 * (768 * 769) / 1e6, abs=0.01)


def test_an_invalid_shape_of_the_model_is_an_error_with_its_reason():
    with pytest.raises(ValueError, match="a width of 30 cannot be split among 4 heads"):
        TowerConfig(width=30, heads=4)
    with pytest.raises(ValueError, match="480 pixels cannot be cut into patches of 14"):
        FlavaConfig(image_size=480, patch_size=14)


def test_losses_of_a_fresh_model_are_those_of_random_guessing():
    torch.manual_seed(0)
    # random vectors of many dimensions are about orthogonal
    model = Flava(replace(TINY, projection_dim=768))

    losses = train_step(model, [pairs(32, dtype=torch.float32)], Objective())
    losses |= train_step(model, [images(32, dtype=torch.float32)], Objective())
    losses |= train_step(model, [texts(32)], Objective())

    log_of_choices = {
        "contrastive": math.log(32),
        "mmm_image": math.log(TINY.image_vocab),
        "mmm_text": math.log(TINY.text_vocab),
        "itm": math.log(2),
        "mim": math.log(TINY.image_vocab),
        "mlm": math.log(TINY.text_vocab),
    }
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        log_of_choices, abs=0.1
    )


def test_initial_weights_are_as_published():
    torch.manual_seed(0)
    model = Flava(replace(TINY, text_vocab=5000))

    assert model.text.words.weight[1:].std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.text.words.weight[0].any()
    assert not model.image.patches.bias.any()
    assert (model.image.norm.weight == 1).all()
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-4)
    assert model.image.positions.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.multimodal.cls.any()


def test_wider_padding_changes_no_loss_and_no_gradient():
    model = flava()
    batch = pairs(5, lengths=[3, 9, 12, 7, 5])
    wide = replace(batch, texts=pad_to_width(batch.texts, 20))

    losses = train_step(model, [batch], Objective())
    narrow = gradients(model)
    more = train_step(model, [wide], Objective())

    assert max_difference(losses, more) < 1e-12
    assert max_difference(narrow, gradients(model)) < 1e-12


def test_the_padding_token_gets_no_gradient_even_without_the_padding_mask():
    model = flava(replace(TINY, mm_pad_mask=False))

    train_step(model, [pairs(5, lengths=[3, 9, 12, 7, 5])], Objective())

    gradient = model.text.words.weight.grad
    assert not gradient[0].any()
    assert gradient[5].any()


def test_uint8_images_are_normalised_as_for_clip():
    model = flava(dtype=torch.float32)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)

    normalised = (pixels / 255 - mean[:, None, None]) / std[:, None, None]

    assert torch.allclose(model.image(pixels), model.image(normalised), atol=1e-5)


def test_states_at_some_positions_equal_those_among_all():
    model, batch = flava(), pairs(3)
    positions = torch.tensor([[0, 5, 2], [7, 7, 0], [1, 2, 3]])

    image = model.image(batch.images.pixels)
    text = model.text(batch.texts.tokens, batch.texts.lengths)
    both = model.multimodal(image, text, batch.texts.lengths)
    some_image = model.image(batch.images.pixels, positions=positions)
    some_text = model.text(batch.texts.tokens, batch.texts.lengths, positions)
    some_of_both = model.multimodal(image, text, batch.texts.lengths, positions)

    for some, states in ((some_image, image), (some_text, text), (some_of_both, both)):
        assert torch.allclose(some, gather(states, positions), rtol=0, atol=1e-12)


def test_pixels_of_masked_patches_change_no_state():
    model = flava()
    batch = images(2)
    patch_mask = masked_patches(batch, PATCHES)
    noise = torch.randn_like(batch.pixels)
    square = patch_mask.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)

    other = torch.where(square, noise, batch.pixels)

    assert torch.equal(model.image(other, patch_mask), model.image(batch.pixels, patch_mask))
    assert not torch.allclose(model.image(other), model.image(batch.pixels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalisation_computes_in_float32_or_wider_and_keeps_the_dtype(dtype):
    norm = LayerNorm(64, 1e-12).to(torch.promote_types(dtype, torch.float32))
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 64, dtype=torch.float64).to(dtype)

    normed = norm(x)

    exact = norm.double()(x.double())
    assert normed.dtype == dtype
    assert (normed - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_states_are_in_half_precision_and_embeddings_in_float32():
    model = flava(dtype=torch.float32)
    batch = pairs(2, dtype=torch.float32)

    with torch.autocast("cpu", torch.bfloat16):
        states = model.image(batch.images.pixels)
        embedding = model.embed_texts(batch.texts.tokens, batch.texts.lengths)

    assert states.dtype == torch.bfloat16
    assert embedding.dtype == torch.float32
    assert embedding.norm(dim=1).tolist() == pytest.approx([1, 1])


def dino(config, seed=0):
    """Random weights by the names and shapes of `dino_vitbase16_pretrain.pth`."""
    width, hidden, patch = config.image.width, config.image.hidden, config.patch_size
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + config.grid**2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for number in range(config.image.layers):
        layer = f"blocks.{number}"
        for name, (outer, inner) in {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (hidden, width),
            "mlp.fc2": (width, hidden),
        }.items():
            shapes |= {f"{layer}.{name}.weight": (outer, inner), f"{layer}.{name}.bias": (outer,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{layer}.{norm}.weight": (width,), f"{layer}.{norm}.bias": (width,)}
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=draw, dtype=torch.float64) * 0.1
        for name, shape in shapes.items()
    }


def channels(values):
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def dino_states(state, pixels, heads):
    """A second implementation of DINO's vision transformer, as published."""
    function = torch.nn.functional
    mean, std = channels(IMAGENET_MEAN), channels(IMAGENET_STD)
    kernel = state["patch_embed.proj.weight"]
    x = function.conv2d(
        (pixels - mean) / std, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1]
    )
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]

    def linear(x, name):
        return function.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return function.layer_norm(
            x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12
        )

    for number in range(len([name for name in state if name.endswith("attn.qkv.weight")])):
        layer = f"blocks.{number}"
        qkv = linear(norm(x, f"{layer}.norm1"), f"{layer}.attn.qkv")
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{layer}.attn.proj")
        inner = function.gelu(linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1"))
        x = x + linear(inner, f"{layer}.mlp.fc2")
    return norm(x, "norm")


def test_the_image_encoder_computes_the_same_as_dino():
    model = flava()
    state = dino(TINY)
    pixels = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    mean, std = channels(CLIP_MEAN), channels(CLIP_STD)
    mask = model.image.mask.clone()

    load_dino(model.image, state)

    ours = model.image.norm(model.image((pixels - mean) / std))
    expected = dino_states(state, pixels, TINY.image.heads)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-10)
    assert torch.equal(model.image.mask, mask)
    assert torch.equal(model.image.blocks[2].qkv.weight, state["blocks.2.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.bias"), "not the weights of a DINO ViT.*norm.bias"),
        (lambda state: state.update(head=torch.ones(1)), "not the weights of a DINO ViT.*head"),
        (
            lambda state: state.update(cls_token=torch.ones(1, 1, 3)),
            r"cls has the shape \(1, 1, 3\), not",
        ),
    ],
)
def test_weights_of_another_model_than_dino_are_refused_and_change_nothing(change, message):
    model = flava()
    state = dino(TINY)
    change(state)
    before = model.image.cls.clone()

    with pytest.raises(ValueError, match=message):
        load_dino(model.image, state)

    assert torch.equal(model.image.cls, before)
