import bz2
import gzip
import io
import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path
from urllib.parse import quote_plus, unquote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmd_pipeline.base.record import BadRow, Candidate, Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import find_annotations, load, yfcc100m
from pmd_pipeline.sources.upstream import files as upstream

FIXTURES = Path(__file__).parents[1] / "fixtures" / "yfcc100m"
SAMPLES = Path(__file__).parents[3] / "shared" / "samples" / "yfcc100m"
TSV = FIXTURES / "tsv" / "yfcc100m_dataset"
PARTS = FIXTURES / "parts" / "yfcc100m_dataset-3"
SUBSET = FIXTURES / "subset" / "yfcc100m_subset.jsonl"
BUCKET = "https://multimedia-commons.s3-us-west-2.amazonaws.com/"
COLUMNS = (
    "photoid uid unickname datetaken dateuploaded capturedevice title description usertags "
    "machinetags longitude latitude accuracy pageurl downloadurl licensename licenseurl serverid "
    "farmid secret secretoriginal ext marker"
)
NUMBERS = {"photoid", "marker"}


def rows(folder, **options):
    source = load("yfcc100m")
    return [
        row
        for span in find_annotations(source, str(folder)).spans
        for row in source.read(span, **options)
    ]


def database(folder, content=PARTS, columns=COLUMNS):
    """The SQLite form of a file of 23 columns; empty fields become NULL."""
    names = columns.split()
    table = [line.split("\t") for line in content.read_text(encoding="utf-8").split("\n")[:-1]]
    types = ", ".join(f"{name} {'INTEGER' if name in NUMBERS else 'TEXT'}" for name in names)
    with closing(sqlite3.connect(folder / "yfcc100m_dataset.sql")) as connection, connection:
        connection.execute(f"CREATE TABLE yfcc100m_dataset ({types})")
        connection.executemany(
            f"INSERT INTO yfcc100m_dataset VALUES ({', '.join('?' * len(names))})",  # noqa: S608 - ours
            [[field or None for field in fields[: len(names)]] for fields in table],
        )
    return folder


def changed(number, value, *, line=0):
    """The fixture's line with the column `number` changed."""
    fields = TSV.read_bytes().split(b"\n")[line].split(b"\t")
    fields[number] = value
    return b"\t".join(fields) + b"\n"


def written(folder, *lines):
    (folder / "yfcc100m_dataset").write_bytes(b"".join(lines))
    return folder


def test_description_comes_before_title_and_empty_texts_are_left_out():
    heron, camera, _, _, untitled, _ = rows(TSV.parent)

    assert heron.candidates == [
        Candidate("A heron waits, as herons do.\n\nNobody knows why.", "description"),
        Candidate("The heron", "title"),
    ]
    assert camera.candidates == [Candidate("IMG_1234", "title")]
    assert untitled.candidates == []


def test_texts_are_decoded_once_and_broken_bytes_are_marked():
    _, _, cafe, _, _, tokyo = rows(TSV.parent)

    assert cafe.candidates[0].text == "café + 2 %25"
    assert tokyo.candidates[1].text == "東京 �end"


@given(st.text())
def test_decoding_undoes_the_encoding(text):
    whole = text.encode("utf-8", "replace").decode()

    assert yfcc100m.decode_form(quote_plus(whole).encode()) == whole


@given(st.text(alphabet="a+%0AeE9é日 "))
def test_decoding_is_that_of_the_standard_library(text):
    assert yfcc100m.decode_form(text.encode()) == unquote_plus(text, errors="replace")


def test_a_row_has_the_facts_of_its_photo_and_no_user():
    heron, *_ = rows(TSV.parent)

    assert heron.id == "1001"
    assert heron.url == "http://farm7.staticflickr.com/6167/1001_5d22abd711.jpg"
    assert heron.file == "data/images/457/f3e/457f3e6b82f9de7cc87b769be8bb3d62.jpg"
    assert heron.licence == "http://creativecommons.org/licenses/by/2.0/"
    assert heron.meta == {"flickr_id": "1001", "datetaken": "2011-09-10 21:13:32.0"}
    assert "1234@N00" not in repr(rows(TSV.parent) + rows(PARTS.parent) + rows(SUBSET.parent))


def test_an_unknown_date_is_left_out():
    _, _, cafe, _, untitled, _ = rows(TSV.parent)

    assert "datetaken" not in cafe.meta
    assert "datetaken" not in untitled.meta


def test_a_video_is_refused():
    assert rows(TSV.parent)[3] == Row(id="1004", refused="video")


def test_the_address_of_the_copy_on_s3_is_an_option():
    heron, *_ = rows(TSV.parent, address="s3")

    assert heron.url == BUCKET + heron.file


def test_rows_of_23_columns_are_those_of_25():
    assert rows(PARTS.parent) == rows(TSV.parent)


def test_one_file_may_contain_rows_of_both_widths(tmp_path):
    written(tmp_path, TSV.read_bytes(), PARTS.read_bytes())

    assert rows(tmp_path) == rows(TSV.parent) * 2


@pytest.mark.parametrize("rows_per_span", [1, 2, 500_000])
def test_the_database_gives_the_rows_of_the_lines(tmp_path, monkeypatch, rows_per_span):
    monkeypatch.setattr(yfcc100m, "ROWS_PER_SPAN", rows_per_span)

    assert rows(database(tmp_path)) == rows(TSV.parent)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_packed_and_plain_files_give_the_same_rows(tmp_path, suffix, pack):
    (tmp_path / f"{TSV.name}{suffix}").write_bytes(pack(TSV.read_bytes()))

    assert rows(tmp_path) == rows(TSV.parent)


def test_the_archive_gives_the_same_rows(tmp_path):
    with tarfile.open(tmp_path / "yfcc100m_dataset.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("yfcc100m_dataset")
        member.size = TSV.stat().st_size
        tar.addfile(member, io.BytesIO(TSV.read_bytes()))

    assert rows(tmp_path) == rows(TSV.parent)


@given(st.integers(1, 3000))
def test_spans_of_any_size_give_each_line_once(size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "SPAN_BYTES", size)
        read_rows = rows(TSV.parent)

    assert read_rows == rows(TSV.parent)


def test_separators_of_other_alphabets_do_not_end_a_line(tmp_path):
    written(tmp_path, changed(8, "a\u2028b\u0085c".encode()))

    (row,) = rows(tmp_path)

    assert row.candidates[1].text == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    "bad",
    [
        b"\n",
        b"\xff\xfe\n",
        TSV.read_bytes().split(b"\n")[0] + b"\tone more\n",
        changed(1, b""),
        changed(1, b"12a"),
        changed(2, b"../../../../etc/passwd"),
        changed(16, b"javascript:alert(1)"),
        changed(24, b"2"),
        changed(24, b""),
    ],
)
def test_a_bad_row_is_counted_and_the_next_row_is_read(tmp_path, bad):
    first, second = rows(written(tmp_path, bad, TSV.read_bytes().split(b"\n")[0]))

    assert isinstance(first, BadRow)
    assert second == rows(TSV.parent)[0]


@given(st.lists(st.binary(max_size=12), min_size=23, max_size=25))
def test_no_line_is_fatal(tmp_path_factory, fields):
    folder = written(tmp_path_factory.mktemp("lines"), b"\t".join(fields))

    assert all(isinstance(row, Row | BadRow) for row in rows(folder))


def test_a_file_cut_short_is_refused_in_a_sentence(tmp_path):
    (tmp_path / f"{TSV.name}.gz").write_bytes(gzip.compress(TSV.read_bytes())[:-9])

    with pytest.raises(PmdError, match="cut short or damaged"):
        rows(tmp_path)


def test_a_file_that_is_not_a_database_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "yfcc100m_dataset.sql").write_text("CREATE TABLE yfcc100m_dataset (photoid);\n")

    with pytest.raises(PmdError, match="not the SQLite form of YFCC100M"):
        rows(tmp_path)


def test_a_packed_database_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "yfcc100m_dataset.sql.gz").write_bytes(gzip.compress(b"SQLite format 3\0"))

    with pytest.raises(PmdError, match="unpack it first"):
        rows(tmp_path)


def test_a_database_without_a_column_is_refused_in_a_sentence(tmp_path):
    database(tmp_path, columns=COLUMNS.removesuffix(" marker"))

    with pytest.raises(PmdError, match="no such column: marker"):
        rows(tmp_path)


def test_an_empty_database_has_no_rows(tmp_path):
    (tmp_path / "none").write_text("")

    assert rows(database(tmp_path, tmp_path / "none")) == []


def test_a_database_on_a_full_or_shared_disk_can_be_read_without_writing_beside_it(tmp_path):
    path = database(tmp_path) / "yfcc100m_dataset.sql"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    source = load("yfcc100m")
    (span,) = find_annotations(source, str(tmp_path)).spans

    read_rows = source.read(span)
    next(read_rows)

    assert list(tmp_path.iterdir()) == [path]
    assert len(list(read_rows)) == 5


def test_broken_bytes_in_the_database_are_marked(tmp_path):
    path = database(tmp_path) / "yfcc100m_dataset.sql"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE yfcc100m_dataset SET title = CAST(X'41FF42' AS TEXT)")

    assert rows(tmp_path)[1].candidates == [Candidate("A\ufffdB", "title")]


def test_an_error_about_missing_files_says_what_to_do(tmp_path):
    with pytest.raises(PmdError, match=r"yfcc100m_subset\.jsonl there"):
        rows(tmp_path)


def test_the_subset_is_filtered_and_gives_its_first_text():
    heron, two = rows(SUBSET.parent)

    assert heron.candidates == [Candidate("A heron waits, as herons do.", "texts")]
    assert heron.filtered
    assert heron.id == "1001"
    assert heron.url == "http://farm7.staticflickr.com/6167/1001_5d22abd711.jpg"
    assert heron.file == rows(TSV.parent)[0].file
    assert (two.id, two.file) == ("1002", rows(TSV.parent)[1].file)


def test_the_subset_can_have_addresses_on_s3():
    heron, two = rows(SUBSET.parent, address="s3")

    assert (heron.url, two.url) == (BUCKET + heron.file, BUCKET + two.file)


def test_a_pair_of_the_subset_whose_address_is_the_bucket_has_that_key(tmp_path):
    pair = {**PAIR, "image_url": BUCKET + "data/images/abc/def/abcdef.jpg"}
    (tmp_path / SUBSET.name).write_text(json.dumps(pair))

    (row,) = rows(tmp_path)

    assert row.file == "data/images/abc/def/abcdef.jpg"
    assert row.id == row.url == pair["image_url"]


PAIR = {"image_url": "https://example.org/a.jpg", "texts": ["A heron"], "meta": "{}"}


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "no json",
        "[" * 100_000,
        "[]",
        "7",
        json.dumps({**PAIR, "meta": "no json"}),
        json.dumps({**PAIR, "meta": {"a": 1}}),
        json.dumps({**PAIR, "meta": "[1]"}),
        json.dumps({**PAIR, "texts": "A heron"}),
        json.dumps({**PAIR, "texts": [None]}),
        json.dumps({**PAIR, "image_url": None}),
        json.dumps({**PAIR, "image_url": ["https://example.org/a.jpg"]}),
    ],
)
def test_a_bad_line_of_the_subset_is_counted_and_the_next_line_is_read(tmp_path, bad):
    (tmp_path / SUBSET.name).write_text(f"{bad}\n{json.dumps(PAIR)}\n")

    first, second = rows(tmp_path)

    assert isinstance(first, BadRow)
    assert second.id == "https://example.org/a.jpg"


def test_a_lone_surrogate_does_not_enter_a_row(tmp_path):
    (tmp_path / SUBSET.name).write_text(json.dumps({**PAIR, "texts": ["A \ud800 heron"]}))

    (row,) = rows(tmp_path)

    assert row.candidates[0].text == "A ? heron"


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the samples beside the checkout")
def test_a_real_row_of_25_columns_has_upstreams_key(tmp_path):
    line = (SAMPLES / "yfcc100m_dataset_row6639.tsv").read_bytes()
    without_hash = b"\t".join(line.split(b"\t")[1:2] + line.split(b"\t")[3:])
    written(tmp_path, line, without_hash)

    stated, computed = rows(tmp_path)

    assert stated.file == "data/images/4cc/b23/4ccb23d8746b8d9d76ffd603fc7988.jpg"
    assert stated == computed
    assert stated.candidates == [Candidate("Around the waterpipe", "title")]


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the samples beside the checkout")
def test_real_rows_of_23_columns_are_read(tmp_path):
    written(tmp_path, (SAMPLES / "yfcc100m_dataset_23col.tsv").read_bytes())

    gnome, muppets, fog, album = rows(tmp_path)

    assert [Path(row.file).stem for row in (gnome, muppets, fog, album)] == [
        "fe4f6abc6b66599d9db946ca15cb466b",
        "626a245df15cab2cba4959cd81c8e2d2",
        "bd54c95793f88ce7c8dbfb2e4bb967d9",
        "db55c17e1b482f75c301831f69e9136",
    ]
    assert gnome.candidates[0].text == (
        "This gnome just appeared three stories up at school one day."
    )
    assert muppets.candidates == [Candidate("Team Muppet Show", "title")]
    assert "converted to B&W. The image" in fog.candidates[0].text.replace("\n", " ")
    assert album.candidates[0].text.startswith("Photographer: Johnstone O'Shannessy, 3 Bourke St")
    assert album.meta == {"flickr_id": "10642543105"}
