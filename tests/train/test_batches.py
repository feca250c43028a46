import pytest
import torch
from tiny import pairs

from flava_train.data.batches import WIDTHS, micro_batches, pad_to_width, select_rows, to_device
from flava_train.data.masking import IGNORE, max_masked_tokens


def test_cutting_keeps_every_pair_once_with_all_that_belongs_to_it():
    batch = pairs(11)

    pieces = micro_batches(batch, 4, widths=(8, 16))

    assert [len(piece) for piece in pieces] == [4, 4, 3]
    rows = torch.cat([piece.image_ids for piece in pieces])
    assert rows.sort().values.tolist() == list(range(11))
    for piece in pieces:
        whole = select_rows(batch, piece.image_ids)
        width = piece.texts.tokens.shape[1]
        assert (piece.texts.tokens == whole.texts.tokens[:, :width]).all()
        assert (whole.texts.tokens[:, width:] == 0).all()
        assert (piece.images.pixels == whole.images.pixels).all()
        assert (piece.uniforms == whole.uniforms).all()


def test_captions_are_sorted_so_that_short_ones_meet_short_ones():
    batch = pairs(6, lengths=[3, 16, 4, 12, 5, 8])

    pieces = micro_batches(batch, 2, widths=(4, 8, 16))

    assert [piece.texts.lengths.tolist() for piece in pieces] == [[16, 12], [8, 5], [4, 3]]
    assert [piece.texts.tokens.shape[1] for piece in pieces] == [16, 8, 4]


def test_a_caption_longer_than_every_width_is_an_error():
    with pytest.raises(ValueError, match="a caption of 9 tokens fits none of the widths"):
        micro_batches(pairs(2, lengths=[9, 3]), 2, widths=(8,))


def test_fitting_drops_only_padding():
    texts = pairs(4, lengths=[5, 4, 3, 12]).texts
    texts.labels[:, 2:] = IGNORE  # as many as 15 % of 12 tokens may be

    short = pad_to_width(texts, 12)
    wide = pad_to_width(short, 16)

    assert short.labels.shape == (4, max_masked_tokens(12))
    assert (short.labels != IGNORE).sum() == (texts.labels != IGNORE).sum()
    assert (wide.tokens == texts.tokens).all()


def test_the_last_width_holds_the_captions_of_the_paper():
    assert WIDTHS[-1] >= 77
    assert all(width % 8 == 0 for width in WIDTHS)


def test_everything_moves_to_the_device():
    moved = to_device(pairs(2), "meta")

    assert moved.images.pixels.is_meta
    assert moved.texts.lengths.is_meta
    assert moved.matched.is_meta
