import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_helpers import FIXTURES, SAMPLES, bad_rows, good_rows, needs_samples, read_all, texts

from pmd_pipeline.base.record import Candidate, Row
from pmd_pipeline.sources import find_annotations, load

CC12M = FIXTURES / "cc12m"


def test_the_address_comes_first_and_person_stays():
    first = read_all("cc12m", CC12M)[0]

    assert first == Row(
        id="http://images.example.org/a.jpg",
        url="http://images.example.org/a.jpg",
        candidates=[Candidate("A photo of <PERSON> by the sea", "caption")],
    )


def test_quotes_and_line_separators_do_not_join_rows():
    assert texts(read_all("cc12m", CC12M))[1:] == [
        '"Unbalanced quote in a caption',
        "One\u2028caption, no final newline",
    ]


def test_swapped_columns_and_missing_captions_count_as_bad():
    assert [row.detail for row in bad_rows(read_all("cc12m", CC12M))] == [
        "column 1 is no http address: 'a caption where the address should be'",
        "1 columns instead of 2",
    ]


def test_addresses_that_differ_in_case_of_the_host_have_one_id():
    assert good_rows(read_all("cc12m", CC12M))[-1].id == "http://images.example.org/b.jpg?w=1&h=2"


@settings(deadline=None)  # one byte a span opens files thousands of times
@given(size=st.integers(1, 400))
def test_spans_of_any_size_give_every_line_once(size):
    whole = read_all("cc12m", CC12M)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pmd_pipeline.sources.upstream.files.SPAN_BYTES", size)
        cut = read_all("cc12m", CC12M)

    assert cut == whole


def test_a_span_reads_the_same_twice():
    source = load("cc12m")
    [span] = find_annotations(source, str(CC12M)).spans

    assert list(source.read(span)) == list(source.read(span))


@needs_samples
def test_the_sample_has_five_rows_and_one_person():
    rows = read_all("cc12m", SAMPLES / "cc12m")

    assert len(good_rows(rows)) == len(rows) == 5
    assert sum("<PERSON>" in text for text in texts(rows)) == 1
