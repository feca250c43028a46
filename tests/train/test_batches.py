import pytest
import torch
from tiny import pairs

from flava_train.data.batches import WIDTHS, micro_batches, pad_to_width, select_rows, to_device
from flava_train.data.masking import IGNORE, max_masked_tokens


def test_micro_batches_have_every_pair_once_with_its_own_values():
    batch = pairs(11)

    cut = micro_batches(batch, 4, widths=(8, 16))

    assert [len(one) for one in cut] == [4, 4, 3]
    rows = torch.cat([one.image_ids for one in cut])
    assert rows.sort().values.tolist() == list(range(11))
    for one in cut:
        whole = select_rows(batch, one.image_ids)
        width = one.texts.tokens.shape[1]
        assert (one.texts.tokens == whole.texts.tokens[:, :width]).all()
        assert (whole.texts.tokens[:, width:] == 0).all()
        assert (one.images.pixels == whole.images.pixels).all()
        assert (one.uniforms == whole.uniforms).all()


def test_micro_batches_have_captions_of_similar_length():
    batch = pairs(6, lengths=[3, 16, 4, 12, 5, 8])

    cut = micro_batches(batch, 2, widths=(4, 8, 16))

    assert [one.texts.lengths.tolist() for one in cut] == [[16, 12], [8, 5], [4, 3]]
    assert [one.texts.tokens.shape[1] for one in cut] == [16, 8, 4]


def test_a_caption_longer_than_every_width_is_an_error():
    with pytest.raises(ValueError, match="a caption of 9 tokens fits none of the widths"):
        micro_batches(pairs(2, lengths=[9, 3]), 2, widths=(8,))


def test_padding_to_a_width_drops_only_padding():
    texts = pairs(4, lengths=[5, 4, 3, 12]).texts
    texts.labels[:, 2:] = IGNORE  # 15 % of 12 tokens, rounded

    short = pad_to_width(texts, 12)
    wide = pad_to_width(short, 16)

    assert short.labels.shape == (4, max_masked_tokens(12))
    assert (short.labels != IGNORE).sum() == (texts.labels != IGNORE).sum()
    assert (wide.tokens == texts.tokens).all()


def test_the_last_width_holds_77_tokens():
    assert WIDTHS[-1] >= 77
    assert all(width % 8 == 0 for width in WIDTHS)


def test_every_tensor_is_copied_to_the_device():
    moved = to_device(pairs(2), "meta")

    assert moved.images.pixels.is_meta
    assert moved.texts.lengths.is_meta
    assert moved.matched.is_meta
