import csv
import gzip
import shutil
import tracemalloc
from pathlib import Path

import pytest

from pmd_pipeline.base.record import BadRow, Candidate, Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import find_annotations, load, wit

FIXTURES = Path(__file__).parents[1] / "fixtures" / "wit"
SAMPLES = Path(__file__).parents[3] / "shared" / "samples" / "wit"
NAME = "wit_v1.train.all-1percent_sample.tsv"
TRAIN = [f"wit_v1.train.all-{number:05}-of-00010.tsv" for number in range(10)]
VAL = "wit_v1.val.all-00000-of-00005.tsv"
COMMONS = "https://upload.wikimedia.org/wikipedia/commons/"
HOSTILE = 16_000
REFERENCE, ATTRIBUTION, ALT = (
    f"caption_{name}_description" for name in ("reference", "attribution", "alt_text")
)


def rows(folder, **options):
    source = load("wit")
    return [
        row
        for span in find_annotations(source, str(folder)).spans
        for row in source.read(span, **options)
    ]


def texts(row):
    return [(one.field, one.text, one.refused) for one in row.candidates]


def train_file(folder, *lines, header=True):
    """Write a file of lines in which `|` stands for a tab; `fill` makes such lines."""
    first = ["|".join(wit._COLUMNS)] if header else []
    text = "\n".join([*first, *lines, ""])
    (folder / NAME).write_text(text.replace("|", "\t"), encoding="utf-8", newline="")
    return folder


def fill(**columns):
    given = {"language": "en", "image_url": COMMONS + "a.jpg", "is_main_image": "true", **columns}
    return "|".join(given.get(name, "") for name in wit._COLUMNS)


def only(folder, **columns):
    (row,) = rows(train_file(folder, fill(**columns)))
    return row


def test_the_texts_come_in_the_order_of_pmd_with_what_its_rule_refuses():
    heron, mill, *_ = rows(FIXTURES)

    assert texts(heron) == [
        (REFERENCE, "A grey heron by the canal", None),
        (ATTRIBUTION, "English: Grey heron Deutsch: Graureiher", "rule"),
        (ALT, "bird", "rule"),
    ]
    assert texts(mill)[0] == (REFERENCE, "Mill", "rule")
    assert texts(mill)[1] == (ATTRIBUTION, "The old mill at night", None)


def test_a_row_has_the_facts_of_its_image():
    heron = rows(FIXTURES)[0]

    assert heron.id == heron.url == COMMONS + "a/a1/Grey_heron.jpg"
    assert (heron.width, heron.height) == (800, 600)
    assert heron.meta == {
        "page_url": "https://en.wikipedia.org/wiki/Heron",
        "mime_type": "image/jpeg",
        "is_main_image": True,
        "attribution_passes_lang_id": True,
    }


def test_false_is_not_true():
    mill = rows(FIXTURES)[1]

    assert mill.meta["is_main_image"] is False


def test_rows_of_other_pages_are_refused_apart_from_the_image_of_the_english_page():
    all_rows = rows(FIXTURES)

    refused = [row for row in all_rows if row.refused == "page_language"]
    taken = {row.id for row in all_rows if not row.refused}

    assert len(refused) == 2
    assert all(row.id not in taken and not row.meta and not row.candidates for row in refused)


def test_the_page_language_is_an_option():
    all_rows = rows(FIXTURES, language="de", rule="none")

    assert [texts(row)[0][1] for row in all_rows if not row.refused] == ["Die alte Mühle bei Nacht"]


def with_validation(folder):
    """The fixture as a training file, and a validation file of one row."""
    shutil.copy(FIXTURES / NAME, folder / TRAIN[0])
    header = (FIXTURES / NAME).read_text(encoding="utf-8").partition("\n")[0]
    weir = fill(caption_reference_description="Water falls over the weir").replace("|", "\t")
    (folder / VAL).write_text(f"{header}\n{weir}\n")
    return folder


def test_only_the_splits_of_the_option_are_taken(tmp_path):
    train = rows(with_validation(tmp_path))
    both = rows(tmp_path, splits=["train", "val"])

    assert train[:-1] == both[:-1] == rows(FIXTURES)
    assert train[-1].refused == "split"
    assert texts(both[-1]) == [(REFERENCE, "Water falls over the weir", None)]


def test_an_interrupted_download_is_an_incomplete_form(tmp_path):
    downloads = [entry for entry in load("wit").info.files if entry.form == "main" and entry.url]
    for entry in downloads[:-1]:
        shutil.copy(FIXTURES / NAME, tmp_path / entry.pattern)

    with pytest.raises(PmdError, match=f"has no {TRAIN[0]}, nor "):
        rows(tmp_path)

    shutil.copy(FIXTURES / NAME, tmp_path / downloads[-1].pattern)
    assert len(rows(tmp_path)) == 10 * len(rows(FIXTURES))


def test_without_the_rule_each_text_is_as_upstream_has_it():
    heron = rows(FIXTURES, rule="none")[0]

    assert texts(heron)[1:] == [
        (ATTRIBUTION, "English: Grey heron Deutsch: Graureiher", None),
        (ALT, "bird", None),
    ]


def test_ascii_breaks_names_with_accents_as_in_the_port():
    kept = rows(FIXTURES)[3].candidates[1].text
    broken = rows(FIXTURES, ascii=True)[3].candidates[1].text

    assert kept == "Café Zoë in winter\nwith snow"
    assert broken == "Caf Zo in winter\nwith snow"


def test_two_words_are_enough_for_a_reference_and_three_for_the_others(tmp_path):
    columns = {REFERENCE: "Two words", ATTRIBUTION: "English: Two words", ALT: "Two words"}

    row = only(tmp_path, **columns)

    assert [one.refused for one in row.candidates] == [None, "rule", "rule"]


def test_empty_texts_are_no_candidates(tmp_path):
    row = only(tmp_path, caption_reference_description="  ")

    assert isinstance(row, Row)
    assert row.candidates == []


@pytest.mark.parametrize(
    ("attribution", "english"),
    [
        ("English: A dog on a beach", "A dog on a beach"),
        ("ENGLISH: A dog on a beach", "A dog on a beach"),
        ("Galego: Un can English: A dog on a beach Deutsch: Ein Hund", "A dog on a beach"),
        ("Deutsch: Ein Hund am Strand", None),
        ("In plain English: ", ""),
        ("A dog on a beach", None),
        ("English:A dog on a beach", None),
        ("English", None),
        ("", None),
    ],
)
def test_of_an_attribution_only_the_english_part_counts(attribution, english):
    assert wit.english_part(attribution) == english


def test_quoted_newlines_and_quotes_stay_inside_their_row(tmp_path):
    text = '"A dog on ""the"" beach\r\nand\ta cat"'

    row = only(tmp_path, caption_reference_description=text)

    assert row.candidates == [Candidate('A dog on "the" beach\r\nand\ta cat', REFERENCE)]


@pytest.mark.parametrize(
    "bad",
    [
        "en|https://en.wikipedia.org|too short",
        fill(image_url="no address"),
        fill(is_main_image="True"),
        fill(original_width="8OO"),
        fill(original_height="9" * 5000),
        fill() + "|one more",
    ],
)
def test_a_bad_row_is_counted_and_the_next_row_is_read(tmp_path, bad):
    train_file(tmp_path, bad, fill(caption_reference_description="A good row"))

    first, second = rows(tmp_path)

    assert isinstance(first, BadRow)
    assert texts(second) == [(REFERENCE, "A good row", None)]


def test_a_file_that_ends_in_an_open_quote_gives_the_rows_before_it(tmp_path):
    good = fill(caption_reference_description="A good row")
    train_file(tmp_path, good, fill(context_section_description='"Once upon a time'))

    first, last = rows(tmp_path)

    assert isinstance(first, Row)
    assert isinstance(last, BadRow)


def read_and_peak(folder):
    """The types of the rows in order, and the peak memory of reading, in bytes."""
    source = load("wit")
    (span,) = find_annotations(source, str(folder)).spans
    tracemalloc.start()
    types = [type(row) for row in source.read(span)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return types, peak


@pytest.mark.parametrize(
    "hostile",
    [
        fill(page_title='"' + "\n".join(["x" * 999] * HOSTILE)),
        fill(page_title=f'"{"x" * 999}\n"|' * HOSTILE),
        "x" * (1000 * HOSTILE),
    ],
    ids=["a quote without end", "a row without end", "a line without end"],
)
def test_hostile_rows_do_not_exhaust_memory(tmp_path, hostile):
    types, peak = read_and_peak(train_file(tmp_path, hostile))

    assert set(types) == {BadRow}
    assert peak < 12 * wit._MAX_ROW_CHARS < len(hostile)


def test_an_unclosed_quote_does_not_end_the_file(tmp_path):
    open_quote = fill(page_title='"' + "\n".join(["x" * 999] * 2000))

    types, _ = read_and_peak(train_file(tmp_path, open_quote, fill()))

    assert types[-1] is Row


def test_a_long_text_is_not_an_unclosed_quote(tmp_path):
    row = only(tmp_path, context_section_description="x" * 200_000)

    assert isinstance(row, Row)


def test_packed_and_plain_files_give_the_same_rows(tmp_path):
    packed = gzip.compress((FIXTURES / NAME).read_bytes())
    (tmp_path / f"{NAME}.gz").write_bytes(packed)

    assert rows(tmp_path) == rows(FIXTURES)


def test_reading_again_gives_the_same_rows():
    assert rows(FIXTURES) == rows(FIXTURES)


def test_columns_are_found_by_name(tmp_path):
    with (FIXTURES / NAME).open(newline="", encoding="utf-8") as file:
        table = [fields[::-1] for fields in csv.reader(file, delimiter="\t")]
    with (tmp_path / NAME).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows(table)

    assert rows(tmp_path) == rows(FIXTURES)


def test_a_missing_column_is_named(tmp_path):
    shutil.copy(FIXTURES / NAME, tmp_path / NAME)
    text = (tmp_path / NAME).read_text(encoding="utf-8").replace("mime_type", "mime", 1)
    (tmp_path / NAME).write_text(text, encoding="utf-8")

    with pytest.raises(PmdError, match="no column 'mime_type' in its first line"):
        rows(tmp_path)


@pytest.mark.parametrize("content", ["", "a caption\thttps://example.org/a.jpg\n", '"'])
def test_another_file_is_refused_in_a_sentence(tmp_path, content):
    (tmp_path / NAME).write_text(content)

    with pytest.raises(PmdError, match="is it a TSV file of WIT"):
        rows(tmp_path)


def test_a_file_cut_short_is_refused_in_a_sentence(tmp_path):
    (tmp_path / f"{NAME}.gz").write_bytes(gzip.compress((FIXTURES / NAME).read_bytes())[:-9])

    with pytest.raises(PmdError, match="cut short or damaged"):
        rows(tmp_path)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the samples beside the checkout")
def test_real_rows_are_read(tmp_path):
    shutil.copy(SAMPLES / "tfds_train-00000-of-00009.tsv", tmp_path / NAME)

    spanish, german, russian = rows(tmp_path)
    bat = rows(tmp_path, language="de")[1]
    coin = rows(tmp_path, language="ru")[2]

    assert {spanish.refused, german.refused, russian.refused} == {"page_language"}
    assert texts(bat) == [(ATTRIBUTION, "Lesser bulldog bat (Noctilio albiventris)", None)]
    assert (bat.width, bat.height, bat.meta["is_main_image"]) == (2000, 1636, True)
    assert texts(coin) == [(ATTRIBUTION, "Coin of Ukraine", None)]


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the samples beside the checkout")
def test_a_real_row_that_ends_in_an_open_quote_is_bad(tmp_path):
    shutil.copy(SAMPLES / "tfds_test-00000-of-00005.tsv", tmp_path / NAME)

    assert [type(row) for row in rows(tmp_path)] == [BadRow]
