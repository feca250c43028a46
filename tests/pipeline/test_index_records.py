"""Lines become records: boxes, repeats, held-out images, and bounds of parts."""

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmd_pipeline.index.external_sort import SCHEMA
from pmd_pipeline.index.records import part_bounds, part_of, read_part, write_parts


def line(row, text, **changes):
    """One line of a record of 200 x 100 pixels."""
    known = {"key": 1, "span": 0, "row": row, "id": "7", "url": "http://a.test/7.jpg"}
    pair = {"pair": True, "text": text, "field": "caption", "heldout": False}
    return {**dict.fromkeys(SCHEMA.names), **known, "width": 200, "height": 100, **pair, **changes}


def sides(x0, y0, x1, y1):
    return {"x0": x0, "y0": y0, "x1": x1, "y1": y1}


def records_and_reasons(folder, *lines, drop_repeats=False):
    table = pa.Table.from_pylist(list(lines), schema=SCHEMA)
    [part] = write_parts(table, str(folder), range(1), 1, drop_repeats=drop_repeats)
    dropped = pl.read_parquet(folder / part.dropped.name)
    return list(read_part(str(folder), part)), dropped["reason"].to_list()


@pytest.mark.parametrize(
    ("box", "stored"),
    [
        ((50, 25, 100, 50), [0.25, 0.25, 0.5, 0.5]),
        ((-10, -10, 400, 400), [0, 0, 1, 1]),
        ((150, 50, 250, 120), [0.75, 0.5, 1, 1]),
        ((10, 99, 20, 100), pytest.approx([0.05, 0.99, 0.1, 1])),
    ],
)
def test_a_box_is_clipped_to_the_image_and_stored_as_fractions(tmp_path, box, stored):
    [record], reasons = records_and_reasons(tmp_path, line(0, "a dog", **sides(*box)))

    assert record.boxes == [stored]
    assert reasons == []


@pytest.mark.parametrize(
    "box",
    [(200, 0, 300, 50), (50, 50, 50, 90), (10, 99.5, 20, 130), (90, 20, 10, 40)],
    ids=["outside", "no width", "half a pixel", "reversed"],
)
def test_a_box_without_a_pixel_of_the_image_is_bad(tmp_path, box):
    records, reasons = records_and_reasons(tmp_path, line(0, "a dog", **sides(*box)))

    assert (records, reasons) == ([], ["bad_box"])


def test_one_text_of_two_regions_is_no_repeat(tmp_path):
    first, second = sides(0, 0, 50, 50), sides(50, 0, 100, 50)
    texts = ("a dog", first), ("a dog", second), ("a dog", first)
    lines = [line(row, text, **box) for row, (text, box) in enumerate(texts)]

    [record], reasons = records_and_reasons(tmp_path, *lines, drop_repeats=True)

    assert record.captions == ["a dog", "a dog"]
    assert reasons == ["repeat"]


@pytest.mark.parametrize("marked", [0, 1])
def test_one_row_that_marks_the_image_as_held_out_is_enough(tmp_path, marked):
    lines = [line(row, f"caption {row}", heldout=row == marked) for row in range(2)]

    records, reasons = records_and_reasons(tmp_path, *lines)

    assert (records, reasons) == ([], ["heldout", "heldout"])


@given(st.integers(1, 100_000), st.data())
def test_a_part_begins_at_its_bound(num_parts, data):
    part = data.draw(st.integers(0, num_parts - 1))
    bounds = part_bounds(num_parts)

    assert part_of(f"{bounds[part]:016x}", num_parts) == part
    assert part_of(f"{bounds[part + 1] - 1:016x}", num_parts) == part
