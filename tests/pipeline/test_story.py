import bz2
import json
import re
from pathlib import Path

import pytest
from toy import QUIET, toy_build, toy_order, toy_recipe, toy_rows, write_pictures, write_rows

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.base.record import key_of
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.dataset.build import SourceBuild, build_source
from pmd_pipeline.inspect.trace import find_traces, holdings, stored_image
from pmd_pipeline.inspect.trace_text import as_facts, outcome, trace_lines, verdicts
from pmd_pipeline.recipe import load_recipe


def ask(data, asked, source=None):
    with open_pool("local", 1, None) as pool:
        return find_traces(str(data), asked, pool, source)


@pytest.fixture
def data(tmp_path):
    """Twelve pictures, of which two are absent, in three parts, and a bad row."""
    write_rows(tmp_path / "raw", [*toy_rows(12), ("no address here", "nowhere")])
    write_pictures(tmp_path / "pictures", [f"{number}.jpg" for number in range(10)])
    toy_build(toy_order(tmp_path, toy_recipe(part_records=4), pictures=tmp_path / "pictures"))
    return tmp_path / "data"


def yfcc_row(number, title, description):
    """A row of yfcc100m_dataset: 23 columns, of which the reader takes a few."""
    columns = [""] * 25
    columns[0], columns[1] = str(number), str(5_000_000_000 + number)
    columns[8], columns[9] = title, description
    columns[16] = f"http://farm1.staticflickr.com/2/{5_000_000_000 + number}_0a1b2c3d4e.jpg"
    columns[17], columns[22] = "Attribution License", "jpg"
    columns[23], columns[24] = "jpg", "0"
    return columns


@pytest.mark.parametrize(
    "spelling",
    [
        "http://a.test/4.jpg",
        "HTTP://A.test:80/4.jpg#top",
        "https://a.test/4.jpg",  # no id: found by reading the addresses of the index
        key_of("cc3m", "http://a.test/4.jpg"),
    ],
)
def test_a_record_is_found_by_each_of_its_names(data, spelling):
    [story] = ask(data, spelling)

    assert (story.id, story.built) == ("http://a.test/4.jpg", True)
    assert outcome(story) == f"kept: 1 pair in {data}/shards/cc3m/0000{story.part}.tar"
    assert stored_image(story).startswith(b"\xff\xd8")


def cut(path):
    """Spoil the end of a file, which has the same size then."""
    content = bytearray(path.read_bytes())
    content[-20:] = bytes(20)
    path.write_bytes(content)


def test_a_damaged_ledger_is_one_sentence(data):
    [story] = ask(data, "http://a.test/4.jpg")
    ledger = Path(story.shard).with_suffix(".parquet")
    cut(ledger)

    trace_lines = (
        f"^{re.escape(str(ledger))} is no whole Parquet file: delete the .json beside it, and"
    )
    with pytest.raises(PmdError, match=trace_lines):
        ask(data, "http://a.test/4.jpg")
    with pytest.raises(PmdError, match=trace_lines):
        holdings(story.shard)


@pytest.mark.parametrize("asked", ["http://a.test/4.jpg", "https://a.test/4.jpg"])
@pytest.mark.parametrize("file", ["kept", "dropped"])
def test_a_damaged_index_is_one_sentence_which_helps(data, asked, file):
    [story] = ask(data, asked)
    damaged = next((data / "index" / "cc3m").glob(f"{file}-{story.part:05d}*.parquet"))
    whole = damaged.read_bytes()
    cut(damaged)

    with pytest.raises(
        PmdError, match=r"is no whole Parquet file: delete index\.json beside it, and"
    ):
        ask(data, asked)

    (data / "index" / "cc3m" / "index.json").unlink()
    folder = data.parent
    toy_build(toy_order(folder, toy_recipe(part_records=4), pictures=folder / "pictures"))
    assert damaged.read_bytes() == whole
    assert ask(data, asked) == [story]


def test_a_bad_row_is_found_by_its_place(data):
    [story] = ask(data, "GCC-training.tsv:0:16")

    assert outcome(story) == ("dropped by the index: bad_row, the upstream row cannot be parsed")
    with pytest.raises(PmdError, match=f"pmd why {story.key} says why"):
        stored_image(story)


def test_an_image_that_failed_tells_what_the_world_did(data):
    [story] = ask(data, "http://a.test/11.jpg")

    lines = list(trace_lines(story))
    assert lines[1] == ("  not fetched: not_in_archive, no local image has this name")
    assert "not fetched: http://a.test/11.jpg" in lines


def test_a_record_beyond_the_limit_or_not_built_says_so(tmp_path, data):
    keys = sorted(key_of("cc3m", f"http://a.test/{number}.jpg") for number in range(12))
    toy_build(
        toy_order(tmp_path, toy_recipe(part_records=4), pictures=tmp_path / "pictures", limit=1)
    )
    (data / "shards" / "cc3m" / "00002.json").unlink()

    assert outcome(ask(data, keys[0])[0]).startswith(("kept", "not fetched"))
    assert "beyond --limit" in outcome(ask(data, keys[1])[0])
    assert outcome(ask(data, keys[-1])[0]) == "not built yet: its part is 00002"


def test_the_rest_of_a_story_stands_where_upstream_files_have_changed_or_gone(tmp_path, data):
    raw = tmp_path / "raw" / "GCC-training.tsv"
    raw.write_text("other\thttp://b.test/1.jpg\n" * 20)
    changed = "\n".join(trace_lines(ask(data, "http://a.test/0.jpg")[0]))
    raw.unlink()
    gone = "\n".join(trace_lines(ask(data, "http://a.test/0.jpg")[0]))

    assert "the file has changed: it has no such row any more" in changed
    assert "cannot read" in gone
    assert "kept: 2 pairs" in gone


@pytest.mark.parametrize("asked", ["none", "0" * 16, "http://a.test/99.jpg", ""])
def test_what_no_index_has_is_one_sentence(data, asked):
    with pytest.raises(PmdError, match="is no key, id or address in the index of cc3m"):
        ask(data, asked)


def test_a_source_without_an_index_is_one_sentence(data):
    with pytest.raises(PmdError, match="there is no index of coco under"):
        ask(data, "391895", source="coco")


def test_filters_are_asked_again_and_say_what_they_measured(tmp_path):
    rows = [
        yfcc_row(1, "a fine title of five words", "IMG 1"),
        yfcc_row(3, "a title that nobody looks at", "a dog lies on a warm beach"),
        yfcc_row(2, "two words", "ein Hund liegt am Strand und schläft in der warmen Sonne"),
    ]
    (tmp_path / "raw").mkdir()
    text = "".join("\t".join(row) + "\n" for row in rows)
    (tmp_path / "raw" / "yfcc100m_dataset.bz2").write_bytes(bz2.compress(text.encode()))
    write_pictures(tmp_path / "pictures", ["5000000001_0a1b2c3d4e.jpg"])
    order = SourceBuild(
        recipe=load_recipe("yfcc100m")[0],
        raw=str(tmp_path / "raw"),
        data=str(tmp_path / "data"),
        manifest=str(tmp_path / "m.json"),
        places=(str(tmp_path / "pictures"),),
    )
    with open_pool("local", 1, None) as pool:
        build_source(order, pool, QUIET)
        [kept], [dropped], [early] = (
            find_traces(order.data, f"500000000{number}", pool) for number in (1, 2, 3)
        )

    first, second = verdicts(kept, kept.rows[0].row)
    assert (first["verdict"], first["filters"][0]["measured"]) == ("has_words", "2 words")
    assert second["verdict"] == "passes"
    assert second["filters"][1]["measured"].startswith("en at 0.")
    one, two = verdicts(dropped, dropped.rows[0].row)
    assert (one["verdict"], one["filters"][1]["measured"][:5]) == ("is_language", "de at")
    assert (two["verdict"], two["filters"][0]["passes"]) == ("has_words", False)
    found = [one["verdict"] for one in verdicts(early, early.rows[0].row)]
    assert found == ["passes", "not looked at"]
    assert "has_words refuses: 2 words" in "\n".join(trace_lines(dropped))
    facts = json.loads(json.dumps(as_facts(dropped), default=str))
    assert facts["rows"][0]["verdicts"] == [one, two]
