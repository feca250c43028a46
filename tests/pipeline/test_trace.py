import bz2
import json
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import (
    QUIET,
    index_of,
    toy_build,
    toy_recipe,
    toy_rows,
    toy_source_build,
    write_pictures,
    write_rows,
)

from pmd_pipeline.base.parallel import open_pool
from pmd_pipeline.base.record import key_of
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.dataset.build import build_source
from pmd_pipeline.dataset.source_build import SourceBuild
from pmd_pipeline.inspect.shard_contents import shard_contents
from pmd_pipeline.inspect.trace import find_traces, stored_image
from pmd_pipeline.inspect.trace_text import as_facts, outcome, trace_lines, verdicts
from pmd_pipeline.recipe import load_recipe


def traces_of(data, query, source=None):
    with open_pool("local", 1, None) as pool:
        return find_traces(str(data), query, pool, source)


@pytest.fixture
def data(tmp_path):
    """Twelve pictures, of which two are absent, in three parts, and a bad row."""
    write_rows(tmp_path / "raw", [*toy_rows(12), ("no address here", "nowhere")])
    write_pictures(tmp_path / "pictures", [f"{number}.jpg" for number in range(10)])
    toy_build(
        toy_source_build(tmp_path, toy_recipe(part_records=4), pictures=tmp_path / "pictures")
    )
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
    [trace] = traces_of(data, spelling)

    assert (trace.id, trace.built) == ("http://a.test/4.jpg", True)
    assert outcome(trace) == f"kept: 1 pair in {data}/shards/cc3m/0000{trace.part}.tar"
    assert stored_image(trace).startswith(b"\xff\xd8")


def overwrite_end(path):
    """Damage a file without a change of its size."""
    content = bytearray(path.read_bytes())
    content[-20:] = bytes(20)
    path.write_bytes(content)


def test_a_damaged_ledger_is_one_sentence(data):
    [trace] = traces_of(data, "http://a.test/4.jpg")
    ledger = Path(trace.shard).with_suffix(".parquet")
    overwrite_end(ledger)

    sentence = (
        f"^{re.escape(str(ledger))} is no whole Parquet file: delete the .json beside it, and"
    )
    with pytest.raises(PmdError, match=sentence):
        traces_of(data, "http://a.test/4.jpg")
    with pytest.raises(PmdError, match=sentence):
        shard_contents(trace.shard)


@pytest.mark.parametrize("query", ["http://a.test/4.jpg", "https://a.test/4.jpg"])
@pytest.mark.parametrize("file", ["kept", "dropped"])
def test_a_damaged_index_is_one_sentence_and_its_advice_helps(data, query, file):
    [trace] = traces_of(data, query)
    damaged = next((data / "index" / "cc3m").glob(f"{file}-{trace.part:05d}*.parquet"))
    whole = damaged.read_bytes()
    overwrite_end(damaged)

    with pytest.raises(
        PmdError, match=r"is no whole Parquet file: delete index\.json beside it, and"
    ):
        traces_of(data, query)

    (data / "index" / "cc3m" / "index.json").unlink()
    folder = data.parent
    toy_build(toy_source_build(folder, toy_recipe(part_records=4), pictures=folder / "pictures"))
    assert damaged.read_bytes() == whole
    assert traces_of(data, query) == [trace]


def test_a_bad_row_is_found_by_its_location(data):
    [trace] = traces_of(data, "GCC-training.tsv:0:16")

    assert outcome(trace) == ("dropped by the index: bad_row, the upstream row cannot be parsed")
    with pytest.raises(PmdError, match=f"run pmd why {trace.key} for the reason"):
        stored_image(trace)


def test_the_trace_of_a_failed_image_has_its_reason(data):
    [trace] = traces_of(data, "http://a.test/11.jpg")

    lines = list(trace_lines(trace))
    assert lines[1] == ("  not fetched: not_in_archive, no local image has this name")
    assert "not fetched: http://a.test/11.jpg" in lines


def test_a_trace_names_a_limit_or_a_part_that_is_not_built(tmp_path, data):
    keys = sorted(key_of("cc3m", f"http://a.test/{number}.jpg") for number in range(12))
    toy_build(
        toy_source_build(
            tmp_path, toy_recipe(part_records=4), pictures=tmp_path / "pictures", limit=1
        )
    )
    (data / "shards" / "cc3m" / "00002.json").unlink()

    assert outcome(traces_of(data, keys[0])[0]).startswith(("kept", "not fetched"))
    assert "beyond --limit" in outcome(traces_of(data, keys[1])[0])
    assert outcome(traces_of(data, keys[-1])[0]) == "not built yet: its part is 00002"


def test_a_trace_goes_on_without_upstream_files(tmp_path, data):
    raw = tmp_path / "raw" / "GCC-training.tsv"
    raw.write_text("other\thttp://b.test/1.jpg\n" * 20)
    changed = "\n".join(trace_lines(traces_of(data, "http://a.test/0.jpg")[0]))
    raw.unlink()
    gone = "\n".join(trace_lines(traces_of(data, "http://a.test/0.jpg")[0]))

    assert "the file has changed: it no longer has this row" in changed
    assert "cannot read" in gone
    assert "kept: 2 pairs" in gone


@pytest.mark.parametrize("query", ["none", "0" * 16, "http://a.test/99.jpg", ""])
def test_an_unknown_record_is_one_sentence(data, query):
    with pytest.raises(PmdError, match="is no key, id or address in the index of cc3m"):
        traces_of(data, query)


def test_a_source_without_an_index_is_one_sentence(data):
    with pytest.raises(PmdError, match="there is no index of coco under"):
        traces_of(data, "391895", source="coco")


def test_verdicts_have_the_measurements_of_the_filters(tmp_path):
    rows = [
        yfcc_row(1, "a fine title of five words", "IMG 1"),
        yfcc_row(3, "a title that is not looked at", "a dog lies on a warm beach"),
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
        images=(str(tmp_path / "pictures"),),
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
    decisions = [one["verdict"] for one in verdicts(early, early.rows[0].row)]
    assert decisions == ["passes", "not looked at"]
    assert "has_words refuses: 2 words" in "\n".join(trace_lines(dropped))
    facts = json.loads(json.dumps(as_facts(dropped), default=str))
    assert facts["rows"][0]["verdicts"] == [one, two]


texts = st.lists(
    st.sampled_from(
        ["dog", "café", "\ud55c", "<b>", "<br>", "&amp;", "www.a.test", "IMG_1.JPG", "\n"]
    ),
    max_size=5,
).map(" ".join)
recipes = st.fixed_dictionaries(
    {
        "choose": st.sampled_from(["all", "first"]),
        "filters": st.sampled_from(
            [
                {},
                {"has_words": {"least": 2}},
                {"has_words": {"least": 2, "most": 3}, "is_language": {"threshold": 0.3}},
            ]
        ),
        "clean": st.fixed_dictionaries(
            dict.fromkeys(("entities", "html", "urls", "camera_names"), st.booleans())
        ),
        "drop_repeats": st.booleans(),
    }
)


def indexed_pairs(trace):
    """Each pair that the index has of a record, as `field`, `text` and reason or `passes`."""
    pairs = [(one.field, one.text, one.reason) for one in trace.dropped]
    if trace.kept:
        fields, captions = trace.kept.fields, trace.kept.captions
        pairs += [(*pair, "passes") for pair in zip(fields, captions, strict=True)]
    chosen = {"repeat": "passes"}  # the index decides on repeats when all rows of a record are read
    return sorted((field, text, chosen.get(end, end)) for field, text, end in pairs if field)


@given(st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=3), recipes)
@settings(max_examples=25)
def test_verdicts_are_the_decisions_of_the_index(tmp_path_factory, rows, captions):
    folder = tmp_path_factory.mktemp("any")
    lines = [yfcc_row(n, quote(title), quote(told)) for n, (title, told, _) in enumerate(rows)]
    for line, (_, _, is_video) in zip(lines, rows, strict=True):
        line[-1] = str(int(is_video))
    (folder / "raw").mkdir()
    content = "".join("\t".join(line) + "\n" for line in lines).encode()
    (folder / "raw" / "yfcc100m_dataset").write_bytes(content)
    [recipe] = load_recipe("yfcc100m", {"captions": captions})
    with open_pool("local", 1, None) as pool:
        index_of(recipe, folder / "raw", folder / "index" / "yfcc100m", pool)
        traces = [trace for line in lines for trace in find_traces(str(folder), line[1], pool)]

    for trace in traces:
        decisions = [
            (one["field"], one["text"], one["verdict"])
            for one in as_facts(trace)["rows"][0]["verdicts"]
        ]
        printed = "\n".join(trace_lines(trace))
        assert all(f"{field} {text!r}: {end}" in printed for field, text, end in decisions)
        examined = [one for one in decisions if one[2] != "not looked at"]
        if captions["choose"] == "first":
            with_text = [one for one in examined if one[2] != "no_text"]
            examined = with_text[-1:] or examined[:1]
        assert sorted(examined) == indexed_pairs(trace)


def test_a_trace_goes_on_where_a_filter_of_the_users_own_has_changed(data, monkeypatch):
    monkeypatch.chdir(data)
    (data / "own_words.py").write_text(
        "def is_short(text: str) -> bool:\n    return len(text) < 99\n"
    )
    [trace] = traces_of(data, "http://a.test/4.jpg")
    own = {
        "filters": {"own_words:is_short": {}},
        "filters_sha256": {"own_words:is_short": "0" * 64},
    }
    other = replace(trace, rules={**trace.rules, "captions": own})

    printed = "\n".join(trace_lines(other))

    assert "  the filters cannot run again: own_words:is_short: its file has another SHA" in printed
    assert "stored: " in printed
    [facts] = as_facts(other)["rows"]
    assert facts["trouble"].startswith("the filters cannot run again")
    assert facts["verdicts"] == []
