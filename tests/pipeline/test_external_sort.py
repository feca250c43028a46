"""Lines of the index come back sorted, whatever the order in which they were added."""

from pmd_pipeline.base.record import Row
from pmd_pipeline.index.choose import Pair
from pmd_pipeline.index.external_sort import RunWriter, batch_ranges, read_range

BITS = 4


def sorted_lines(folder, added, low, high):
    """What a range of keys holds after `(key, span, row, texts)` were added, as tuples."""
    writer = RunWriter(str(folder / "run"), BITS)
    for key, span, row, texts in added:
        pairs = [Pair(text, "caption", None, None) for text in texts]
        writer.add(key, (span, row), Row(id=f"{key}"), pairs, heldout=False)
    ranges = batch_ranges(writer.close(), low, high, BITS)
    lines = read_range(ranges, low, high).select(["key", "span", "row", "text"]).to_pylist()
    return [tuple(line.values()) for line in lines]


def test_lines_of_one_key_are_ordered_by_span_before_row(tmp_path):
    added = [(7, 1, 0, ["second"]), (7, 0, 5, ["first"]), (6, 2, 0, ["key before"])]

    lines = sorted_lines(tmp_path, added, 0, 1 << 60)

    assert [line[3] for line in lines] == ["key before", "first", "second"]


def test_a_range_holds_its_first_key_and_ends_before_its_last(tmp_path):
    low, high = 1 << 60, 1 << 61
    added = [(key, 0, n, ["text"]) for n, key in enumerate((low - 1, low, high - 1, high))]

    lines = sorted_lines(tmp_path, added, low, high)

    assert [line[0] for line in lines] == [low, high - 1]


def test_many_pairs_of_one_row_keep_their_order(tmp_path):
    texts = [f"region {number}" for number in range(300)]
    others = [(key, 1, key, ["other"]) for key in range(100)]

    lines = sorted_lines(tmp_path, [*others[50:], (50, 0, 0, texts), *others[:50]], 50, 51)

    assert [line[3] for line in lines] == [*texts, "other"]
