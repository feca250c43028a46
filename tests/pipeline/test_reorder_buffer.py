"""The reorder buffer returns what was put, within its memory."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.image_format import JPEG
from pmd_pipeline.images.decode.processor import ImageResult
from pmd_pipeline.images.decode.stored_image import StoredImage
from pmd_pipeline.shards import reorder_buffer
from pmd_pipeline.shards.reorder_buffer import ReorderBuffer


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=20),
    st.integers(0, 500),
    st.integers(0, 99),
)
def test_every_use_of_a_result_gets_its_bytes_and_memory_stays_within_the_limit(
    sizes, max_bytes, seed
):
    rng = random.Random(seed)
    uses = [rng.randrange(1, 4) for _ in sizes]
    takes = [number for number, count in enumerate(uses) for _ in range(count)]
    rng.shuffle(takes)
    contents = [rng.randbytes(size) for size in sizes]

    with ReorderBuffer(dict(enumerate(uses)), None, max_bytes) as buffer:
        for number, content in enumerate(contents):
            buffer.put(number, ImageResult(StoredImage(content, JPEG, 1, 1)))
            assert buffer._num_bytes <= max_bytes
        for number in takes:
            assert buffer.take(number).image.content == contents[number]

        assert not buffer._results
        assert buffer._num_bytes == 0


def test_a_full_disk_is_a_mistake_of_the_user(monkeypatch, tmp_path):
    def full(*_args, **_keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reorder_buffer.tempfile, "TemporaryFile", full)
    with (
        ReorderBuffer({0: 1}, str(tmp_path), 0) as buffer,
        pytest.raises(PmdError, match="No space left"),
    ):
        buffer.put(0, ImageResult(StoredImage(b"a", JPEG, 1, 1)))
