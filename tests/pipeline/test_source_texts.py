"""CC-News and BookCorpus in their usual files, valid and hostile."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import article, built, order_of, write_lines, write_table
from source_helpers import bad_rows, good_rows, read_all, texts

from pmd_pipeline import sources
from pmd_pipeline.base.record import full_text
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources.upstream import documents
from pmd_pipeline.sources.upstream.files import Span, UpstreamFile

ARTICLES = [article(number) for number in range(250)]
SENTENCES = [f"sentence {number} of the book ." for number in range(2500)]


def reasons(rows):
    return [row.reason for row in bad_rows(rows)]


def test_the_hubs_table_of_articles_is_read(tmp_path):
    """Columns of vblagoje/cc_news: title, text, domain, date, description, url, image_url."""
    others = ("title", "domain", "date", "description", "url", "image_url")
    columns = {name: [name] * len(ARTICLES) for name in others}
    write_table(tmp_path / "plain_text" / "train-00000-of-00005.parquet", ARTICLES, **columns)

    rows = read_all("ccnews", tmp_path)

    assert texts(rows) == [full_text(text) for text in ARTICLES]
    assert bad_rows(rows) == []


@pytest.mark.parametrize("name", ["2016_part_00.jsonl", "2016_part_00.jsonl.gz"])
def test_lines_of_json_are_read_packed_or_not(tmp_path, name):
    write_lines(tmp_path / name, ARTICLES)

    assert texts(read_all("ccnews", tmp_path)) == [full_text(text) for text in ARTICLES]


def test_a_text_file_is_one_article(tmp_path):
    for number, text in enumerate(ARTICLES[:9]):
        (tmp_path / f"{number}.txt").write_text(text)

    assert texts(read_all("ccnews", tmp_path)) == [full_text(text) for text in ARTICLES[:9]]


def test_row_groups_are_cut_into_spans_that_give_each_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "SPAN_BYTES", 1)
    path = write_table(tmp_path / "a.parquet", ARTICLES)

    spans = sources.find_annotations(sources.load("ccnews"), str(tmp_path)).spans

    assert [(span.start, span.stop) for span in spans] == [(0, 1), (1, 2), (2, 3)]
    assert {span.file for span in spans} == {UpstreamFile(str(path))}
    assert texts(read_all("ccnews", tmp_path)) == [full_text(text) for text in ARTICLES]


@pytest.mark.parametrize("step", [7, 100, 5000])
def test_spans_give_each_line_once_though_some_are_too_long(tmp_path, step):
    lines = [b"a" * (n * 13 % 90) for n in range(200)]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n".join(lines))
    size = path.stat().st_size
    file = UpstreamFile(str(path))

    read_lines = [
        line
        for start in range(0, size, step)
        for line in documents.bounded_lines(Span(file, start, min(start + step, size)), 60)
    ]

    assert read_lines == [line if len(line) < 60 else None for line in lines]


def test_sentences_stay_in_their_order(tmp_path):
    write_table(tmp_path / "plain_text" / "train-00000-of-00010.parquet", SENTENCES)

    rows = read_all("bookcorpus", tmp_path)

    assert [len(text.split("\n")) for text in texts(rows)] == [1000, 1000, 500]
    assert "\n".join(texts(rows)).split("\n") == SENTENCES


def test_files_of_sentences_and_whole_books_are_read_alike(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "books_large_p1.txt").write_text("\n".join(SENTENCES) + "\n\n")
    write_table(tmp_path / "b" / "epubtxt.parquet", ["\n\n".join(SENTENCES[:30]), "one\ntwo"])

    lines = read_all("bookcorpus", tmp_path / "a", lines=600)
    books = read_all("bookcorpus", tmp_path / "b")

    assert "\n".join(texts(lines)).split("\n") == SENTENCES
    assert texts(books) == ["\n".join(SENTENCES[:30]), "one\ntwo"]


def test_a_document_of_lines_ends_before_it_is_too_long(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(["x" * 900_000, "y" * 200_000, "z"]))

    assert [len(text) for text in texts(read_all("bookcorpus", tmp_path))] == [900_000, 200_002]


def test_hostile_lines_are_counted_with_reasons(tmp_path):
    lines = [
        json.dumps({"text": "sound"}).encode(),
        b"not json",
        b"",
        b"[1]",
        json.dumps({"title": "no text"}).encode(),
        json.dumps({"text": 3}).encode(),
        b'{"text": "caf\xe9"}',
        json.dumps({"text": "a\0b"}).encode(),
        json.dumps({"text": "x" * 2_000_000}).encode(),
        b'{"text": "' + b"x" * 8_000_000 + b'"}',
        b"[" * 100_000,
        json.dumps({"text": "lone \ud800 half"}).encode(),
        json.dumps({"text": ""}).encode(),
    ]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))

    rows = read_all("ccnews", tmp_path)

    assert reasons(rows) == [*["bad_row"] * 5, *["not_text"] * 2, *["too_long"] * 2, "bad_row"]
    assert texts(rows) == ["sound", "lone \ud800 half", ""]


def test_hostile_cells_and_files_are_counted_with_reasons(tmp_path):
    cells = pa.array([b"sound", None, b"caf\xe9", b"a\0", b"x" * 5_000_000, b""], pa.binary())
    column = pa.StringArray.from_buffers(6, *cells.buffers()[1:], cells.buffers()[0])
    (tmp_path / "t").mkdir()
    pq.write_table(pa.table({"text": column}), tmp_path / "t" / "a.parquet")
    contents = [b"\xff\xfe\0binary", b"sound", b"x" * 5_000_000, b""]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_bytes(content)

    table = read_all("ccnews", tmp_path / "t")
    files = read_all("ccnews", tmp_path, form="text")

    assert reasons(table) == ["bad_row", "not_text", "not_text", "too_long"]
    assert texts(table) == ["sound", ""]
    assert reasons(files) == ["not_text", "too_long"]
    assert texts(files) == ["sound", ""]


def test_a_hostile_line_between_sentences_is_counted_and_later_lines_are_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n" + b"x" * 5_000_000 + b"\ncaf\xe9\n\ntwo")

    rows = read_all("bookcorpus", tmp_path)

    assert reasons(rows) == ["too_long", "not_text"]
    assert texts(rows) == ["one\ntwo"]


@pytest.mark.parametrize("source", ["ccnews", "bookcorpus"])
def test_an_error_about_a_missing_column_lists_the_columns(tmp_path, source):
    write_table(tmp_path / "raw" / "a.parquet", ARTICLES)

    with pytest.raises(PmdError, match=r"no column 'body' of texts, only text"):
        built(order_of(tmp_path, source, options={"column": "body"}))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.parquet", b"PAR1 and no more", "is not a whole Parquet file"),
        ("a.parquet.gz", b"", "unpack it"),
        ("a.csv", b"a,b", "has no \\*.parquet, nor \\*.jsonl, nor \\*.txt"),
        ("a.jsonl.gz", b"\x1f\x8b\x08 torn", "cut short or damaged"),
    ],
)
def test_another_file_is_refused_in_a_sentence(tmp_path, name, content, words):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(content)

    with pytest.raises(PmdError, match=words):
        built(order_of(tmp_path))


def test_equal_documents_of_different_files_have_one_key(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["a dog\n\n runs", "other"])
    write_table(tmp_path / "b" / "b.parquet", ["a dog\nruns "])

    first = good_rows(read_all("ccnews", tmp_path, form="jsonl"))
    second = good_rows(read_all("ccnews", tmp_path, form="parquet"))

    assert first[0].id == second[0].id != first[1].id
