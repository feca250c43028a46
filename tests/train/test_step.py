import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TINY, flava, gradients, images, max_difference, pairs, texts
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeCopyMode,
    FakeTensorMode,
)
from user_losses import with_user_losses

from flava_train.data.batches import ImageBatch, TextBatch, micro_batches, select_rows
from flava_train.data.masking import IGNORE, draw_uniforms
from flava_train.model.flava import Flava
from flava_train.objective.losses import LOSSES, masked_patches
from flava_train.objective.metrics import STEP_METRICS, MetricSums
from flava_train.objective.objective import Objective
from flava_train.objective.step import train_step, with_negatives

SIGLIP = replace(TINY, logit_bias=-10.0)
FULL = Objective()
WITH_USER_LOSSES = with_user_losses(FULL)


def cut(batch, *sizes):
    """Micro-batches of these sizes, in order."""
    return [select_rows(batch, rows) for rows in torch.arange(len(batch)).split(list(sizes))]


@pytest.mark.parametrize(
    ("objective", "config"),
    [
        (FULL, TINY),
        (Objective(contrastive_loss="clip_local"), TINY),
        (Objective(contrastive_loss="siglip"), SIGLIP),
        (Objective(contrastive=0.5, mmm_image=2.0, mmm_text=0.0, itm=3.0), TINY),
        (Objective(mmm_image=0.0, mmm_text=0.0, itm=0.0), TINY),
    ],
    ids=["flava", "local", "siglip", "weights", "contrastive alone"],
)
def test_micro_batches_give_the_gradient_of_the_whole_batch(objective, config):
    model = flava(config)
    batch = pairs(9, mismatched=(0, 5))

    losses = train_step(model, [batch], objective)
    whole = gradients(model)
    cached_losses = train_step(model, cut(batch, 4, 2, 3), objective)

    assert max_difference(losses, cached_losses) < 1e-10
    assert max_difference(whole, gradients(model)) < 1e-10


@pytest.mark.parametrize(
    ("make", "sizes", "passes"), [(pairs, [6], 2), (pairs, [4, 2], 6), (images, [6], 1)]
)
def test_only_gradient_caching_computes_an_encoder_twice(make, sizes, passes):
    model = flava()
    calls = []
    model.image.register_forward_hook(lambda *_: calls.append(1))

    train_step(model, cut(make(6), *sizes), FULL)

    assert len(calls) == passes


@pytest.mark.parametrize("make", [images, texts])
def test_micro_batches_of_images_or_texts_give_the_gradient_of_the_whole_batch(make):
    model, batch = flava(), make(9)

    losses = train_step(model, [batch], FULL)
    whole = gradients(model)
    more = train_step(model, cut(batch, 1, 5, 3), FULL)

    assert max_difference(losses, more) < 1e-12
    assert max_difference(whole, gradients(model)) < 1e-12


@pytest.mark.parametrize(
    ("make", "added"),
    [
        (pairs, {"masked_length", "plain_length", "distance"}),
        (images, {"rotation"}),
        (texts, {"text_length"}),
    ],
)
def test_micro_batches_of_a_users_loss_give_the_gradient_of_the_whole_batch(make, added):
    model = flava(heads=WITH_USER_LOSSES.heads)
    batch = make(8)

    losses = train_step(model, [batch], WITH_USER_LOSSES)
    whole = gradients(model)
    more = train_step(model, cut(batch, 4, 4), WITH_USER_LOSSES)

    assert max_difference(losses, more) < 1e-10
    assert max_difference(whole, gradients(model)) < 1e-10
    assert losses.keys() - train_step(model, [batch], FULL).keys() == added


def test_an_unmasked_loss_does_not_see_swapped_captions():
    plain = {"plain_length": WITH_USER_LOSSES.losses["plain_length"]}
    swapping = replace(FULL, itm_negatives="batch", itm_rate=1.0, losses=plain)
    model, batch = flava(heads=swapping.heads), pairs(6)

    losses = train_step(model, [batch], swapping)
    alone = train_step(model, [batch], replace(swapping, itm=0.0))

    assert losses["plain_length"] == pytest.approx(alone["plain_length"].item(), abs=1e-12)
    assert losses["mmm_text"] != alone["mmm_text"]


def test_a_users_loss_changes_no_loss_of_the_package():
    model = flava(heads=WITH_USER_LOSSES.heads)
    batch = pairs(6, mismatched=(2,))

    ours = train_step(model, [batch], FULL)
    all_losses = train_step(model, [batch], WITH_USER_LOSSES)

    assert max_difference(ours, {name: all_losses[name] for name in ours}) < 1e-12


@pytest.mark.parametrize("make", [pairs, images, texts])
def test_metrics_do_not_depend_on_micro_batches_and_change_no_gradient(make):
    model, batch = flava(), make(9)
    whole, cut_up = (MetricSums(STEP_METRICS, torch.device("cpu")) for _ in range(2))

    train_step(model, [batch], FULL)
    expected = gradients(model)
    train_step(model, [batch], FULL, metrics=whole)
    measured = gradients(model)
    train_step(model, cut(batch, 4, 2, 3), FULL, metrics=cut_up)

    assert max_difference(expected, measured) == 0
    assert torch.equal(whole.sums, cut_up.sums)
    values = whole.values(whole.sums.tolist())
    stream = {pairs: "pairs", images: "images", texts: "texts"}[make]
    names = {name for name, loss in LOSSES.items() if loss.stream == stream}
    names |= {"contrastive"} if make is pairs else set()
    assert values.keys() == {f"{name}_accuracy" for name in names}
    assert all(0 <= value <= 1 for value in values.values())


def test_accuracies_are_those_of_the_logits():
    model, batch = flava(), pairs(6, mismatched=(2,))
    sums = MetricSums(STEP_METRICS, torch.device("cpu"))

    train_step(model, [batch], FULL, metrics=sums)

    with torch.no_grad():
        image = model.embed_images(batch.images.pixels)
        text = model.embed_texts(batch.texts.tokens, batch.texts.lengths)
    nearest = (image @ text.T).argmax(1) == torch.arange(6)
    values = sums.values(sums.sums.tolist())
    assert values["contrastive_accuracy"] == nearest[batch.matched].double().mean().item()
    assert values["mmm_image_accuracy"] == pytest.approx(code_accuracy(model, batch))


def code_accuracy(model, batch):
    """Share of masked codes of matched pairs that the model predicts, by a separate pass."""
    with torch.no_grad():
        patch_mask = masked_patches(batch.images, TINY.grid**2)
        image = model.image(batch.images.pixels, patch_mask)
        text = model.text(batch.texts.masked_tokens, batch.texts.lengths)
        states = model.multimodal.norm(model.multimodal(image, text, batch.texts.lengths))
    correct = []
    for row in batch.matched.nonzero().flatten().tolist():
        for patch, code in zip(
            batch.images.masked_positions[row], batch.images.codes[row], strict=True
        ):
            if code != IGNORE:
                guess = model.mmm_image_head(states[row, 2 + patch]).argmax()
                correct.append(bool(guess == code))
    return sum(correct) / len(correct)


def test_sorting_by_length_changes_no_gradient():
    model, batch = flava(), pairs(10)
    first = slice(0, 1)  # one masked token, which fits the narrowest width
    texts = replace(
        batch.texts,
        masked_positions=batch.texts.masked_positions[:, first],
        labels=batch.texts.labels[:, first],
    )
    batch = replace(batch, texts=texts)

    losses = train_step(model, [batch], FULL)
    whole = gradients(model)
    pieces = micro_batches(batch, 3, widths=(6, 8, 12, 16))
    more = train_step(model, pieces, FULL)

    assert len({piece.texts.tokens.shape for piece in pieces}) > 1
    assert max_difference(losses, more) < 1e-10
    assert max_difference(whole, gradients(model)) < 1e-10


@pytest.mark.parametrize("kind", ["batch", "hard"])
def test_drawn_negatives_give_the_gradient_of_the_whole_batch(kind):
    objective = Objective(itm_negatives=kind, itm_rate=0.5)
    model, batch = flava(), pairs(10)
    pieces = cut(batch, 4, 6)

    losses = train_step(model, pieces, objective)
    cached = gradients(model)
    swapped = concatenated(
        [with_negatives(piece, similarity(model, piece), objective) for piece in pieces]
    )
    contrastive = train_step(model, [batch], Objective(mmm_image=0.0, mmm_text=0.0, itm=0.0))
    expected = gradients(model)
    masked = train_step(model, [swapped], Objective(contrastive=0.0))
    for name, gradient in gradients(model).items():
        expected[name] = expected.get(name, 0) + gradient

    assert 0 < swapped.matched.sum() < 10
    assert max_difference(losses, contrastive | masked) < 1e-10
    assert max_difference(cached, expected) < 1e-10


def similarity(model, piece):
    image = model.embed_images(piece.images.pixels)
    text = model.embed_texts(piece.texts.tokens, piece.texts.lengths)
    return (model.logit_scale.exp() * image @ text.T).detach()


def concatenated(pieces):
    def cat(rows):
        if isinstance(rows[0], torch.Tensor):
            return torch.cat(rows)
        names = rows[0].__dataclass_fields__
        return type(rows[0])(*(cat([getattr(row, name) for row in rows]) for name in names))

    return cat(pieces)


def test_drawn_negatives_are_other_captions_of_other_images():
    batch = pairs(64)
    twice = replace(batch, image_ids=torch.arange(64) // 2)  # two captions for each image
    tokens = batch.texts.tokens.clone()
    tokens[7] = tokens[20]  # two images with the same caption
    twice = replace(twice, texts=replace(batch.texts, tokens=tokens))
    objective = Objective(itm_negatives="batch", itm_rate=1.0)
    sources = [set() for _ in range(64)]

    for number in range(200):
        drawn = replace(twice, uniforms=torch.from_numpy(draw_uniforms(number, np.arange(64))))
        swapped = with_negatives(drawn, None, objective)
        assert not swapped.matched.any()
        for row in range(64):
            same = (batch.texts.masked_tokens == swapped.texts.masked_tokens[row]).all(1)
            sources[row].add(same.nonzero()[0].item())

    for row in range(64):
        assert not sources[row] & {row, row ^ 1}
        assert len(sources[row]) > 50  # of 62, in 200 draws
    assert 20 not in sources[7]
    assert 7 not in sources[20]


@pytest.mark.parametrize("kind", ["batch", "hard"])
def test_without_itm_no_caption_is_swapped(kind):
    objective = Objective(itm=0.0, itm_negatives=kind, itm_rate=1.0)
    drawn = pairs(8)

    assert with_negatives(drawn, None, objective) is drawn


def test_hard_negatives_are_similar():
    batch = pairs(3)
    similarity = torch.tensor([[9.0, 5.0, -5.0], [5.0, 9.0, -5.0], [0.0, 50.0, 60.0]])
    objective = Objective(itm_negatives="hard", itm_rate=1.0)

    swapped = with_negatives(batch, similarity, objective)

    source = [1, 0, 1]
    assert torch.equal(swapped.texts.masked_tokens, batch.texts.masked_tokens[source])
    assert torch.equal(swapped.texts.lengths, batch.texts.lengths[source])
    assert torch.equal(swapped.texts.tokens, batch.texts.tokens)


def test_the_rate_of_mismatched_pairs_is_the_configured_one():
    batch = pairs(4096)
    batch = replace(batch, uniforms=torch.from_numpy(draw_uniforms(0, np.arange(4096))))

    swapped = with_negatives(batch, None, Objective(itm_negatives="batch"))

    assert (~swapped.matched).float().mean().item() == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("kind", ["batch", "hard"])
def test_a_pair_without_another_caption_keeps_its_own(kind):
    batch = replace(pairs(3), image_ids=torch.zeros(3, dtype=torch.int64))

    swapped = with_negatives(batch, torch.zeros(3, 3), Objective(itm_negatives=kind, itm_rate=1.0))

    assert swapped.matched.all()
    assert torch.equal(swapped.texts.masked_tokens, batch.texts.masked_tokens)


def without_targets(batch):
    if isinstance(batch, ImageBatch):
        return replace(batch, codes=torch.full_like(batch.codes, IGNORE))
    if isinstance(batch, TextBatch):
        return replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    return replace(batch, images=without_targets(batch.images), texts=without_targets(batch.texts))


@pytest.mark.parametrize("negatives", ["dataset", "batch", "hard"])
@pytest.mark.parametrize("contrastive", ["clip_global", "clip_local", "siglip"])
@pytest.mark.parametrize(
    "batch",
    [
        pairs(4, mismatched=range(4)),
        without_targets(pairs(4)),
        pairs(1),
        pairs(1, mismatched=[0]),
        pairs(2, lengths=[1, 1]),
    ],
    ids=["no positives", "no targets", "one pair", "one mismatched pair", "one token"],
)
def test_a_degenerate_batch_of_pairs_has_finite_gradients(batch, contrastive, negatives):
    model = flava(SIGLIP)
    objective = Objective(contrastive_loss=contrastive, itm_negatives=negatives)

    losses = train_step(model, [batch], objective)

    assert all(loss.isfinite() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize(
    "batch", [without_targets(images(3)), without_targets(texts(3))], ids=["mim", "mlm"]
)
def test_a_batch_without_targets_has_a_loss_of_0(batch):
    model = flava()

    losses = train_step(model, [batch], FULL)

    assert [loss.item() for loss in losses.values()] == [0]
    assert all((gradient == 0).all() for gradient in gradients(model).values())


@pytest.mark.parametrize("sizes", [[6], [4, 2]])
def test_the_loss_scale_scales_every_gradient_and_no_loss(sizes):
    model, batch = flava(), pairs(6)

    losses = train_step(model, cut(batch, *sizes), FULL)
    plain = gradients(model)
    same = train_step(model, cut(batch, *sizes), FULL, loss_scale=torch.tensor(1024.0))

    assert max_difference(losses, same) == 0
    scaled = {name: gradient / 1024 for name, gradient in gradients(model).items()}
    assert max_difference(plain, scaled) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_about_the_same_gradient(dtype):
    model, batch = flava(dtype=torch.float32), pairs(8, dtype=torch.float32)

    train_step(model, [batch], FULL)
    full = gradients(model)
    scale = torch.tensor(1024.0)
    train_step(model, cut(batch, 5, 3), FULL, autocast=dtype, loss_scale=scale)
    half = gradients(model)

    assert {gradient.dtype for gradient in half.values()} == {torch.float32}
    ours, theirs = (torch.cat([grads[name].flatten() for name in full]) for grads in (half, full))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.999


@pytest.mark.parametrize("negatives", ["dataset", "batch", "hard"])
@pytest.mark.parametrize("make", [pairs, images, texts])
def test_a_step_never_waits_for_the_device(make, negatives):
    """Fake tensors have no values, so code that reads one fails."""
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model, batch = deepcopy((flava(), make(6)))

    with mode:
        metrics = MetricSums(STEP_METRICS, torch.device("cpu"))
        objective = Objective(itm_negatives=negatives)
        losses = train_step(model, cut(batch, 4, 2), objective, metrics=metrics)

    assert losses
    with pytest.raises(DataDependentOutputException):
        losses.popitem()[1].item()


def test_the_temperature_stays_in_its_range():
    model = flava()

    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    train_step(model, [pairs(2)], FULL)

    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_gradients_of_earlier_steps_are_discarded():
    model, batch = flava(), pairs(3)

    train_step(model, [batch], FULL)
    first = gradients(model)
    train_step(model, [images(3)], FULL)
    train_step(model, [batch], FULL)

    assert max_difference(first, gradients(model)) == 0


def test_a_batch_of_two_kinds_is_an_error():
    with pytest.raises(TypeError, match="begins with ImageBatch"):
        train_step(flava(), [images(2), texts(2)], FULL)


def test_64_pairs_can_be_overfitted():
    torch.manual_seed(0)
    model = Flava(TINY)
    batch = pairs(64, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for _ in range(60):
        losses = train_step(model, [batch], FULL)
        optimizer.step()

    with torch.no_grad():
        image = model.embed_images(batch.images.pixels)
        text = model.embed_texts(batch.texts.tokens, batch.texts.lengths)
    own = torch.arange(64)
    assert ((image @ text.T).argmax(1) == own).all()
    assert ((text @ image.T).argmax(1) == own).all()
    assert losses["contrastive"] < 0.05
