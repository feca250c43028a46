import pytest

from pmd_pipeline.contract.sample_json import SampleCaptions, captions_of, parse_captions


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"captions": ["a", "b"]}', SampleCaptions(["a", "b"], None)),
        (b'{"captions": [], "boxes": null}', SampleCaptions([], None)),
        (
            b'{"boxes": [[0, 0.25, 1, 1]], "captions": ["a"]}',
            SampleCaptions(["a"], [(0.0, 0.25, 1.0, 1.0)]),
        ),
    ],
)
def test_captions_and_boxes_are_read(content, expected):
    assert parse_captions(content) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"7", "has no list of captions"),
        (b'{"captions": "a"}', "has no list of captions"),
        (b'{"captions": ["a", 7]}', "has no list of captions"),
        (b'{"captions": ["a"], "boxes": 7}', "boxes that are no list"),
        (b'{"captions": ["a"], "boxes": []}', "has 0 boxes for 1 captions"),
        (b'{"captions": ["a"], "boxes": [[0, 0, 1]]}', "a box that is not inside the image"),
        (b'{"captions": ["a"], "boxes": [[0, 0, 1, NaN]]}', "a box that is not inside the image"),
    ],
)
def test_a_wrong_json_is_a_value_error(content, message):
    with pytest.raises(ValueError, match=message):
        parse_captions(content)


def test_integers_become_floats():
    [box] = captions_of({"captions": ["a"], "boxes": [[0, 0, 1, 1]]}).boxes

    assert all(isinstance(side, float) for side in box)
