import hashlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmd_pipeline.base.record import Candidate, Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.filters.caption import (
    LID_MODEL_VARIABLE,
    LID_MODELS,
    has_words,
    identify,
    is_language,
    lid_model,
)
from pmd_pipeline.filters.image import is_compact, is_large
from pmd_pipeline.index.choose import Chooser, FilterVerdict, Pair
from pmd_pipeline.recipe import Captions, load_recipe

YFCC = load_recipe("yfcc100m")[0].captions
"""The paper's rules: the first of description and title with three words or more, in English."""


def row(*texts, **known):
    fields = ("description", "title", "alt")
    candidates = [Candidate(text, field) for text, field in zip(texts, fields, strict=False)]
    return Row(id="1", candidates=candidates, **known)


def reasons(chooser, given_row):
    return [pair.reason for pair in chooser.pairs(given_row)]


def test_all_makes_each_candidate_a_pair_with_its_own_reason():
    chooser = Chooser(Captions(filters={"has_words": {"least": 2}}))
    box = (1.0, 2.0, 3.0, 4.0)
    two = Row(
        id="1",
        candidates=[
            Candidate("a  dog\n", "raw", box),
            Candidate("dog", "raw"),
            Candidate(" ", "x"),
        ],
    )

    assert chooser.pairs(two) == [
        Pair("a dog", "raw", box, None, (FilterVerdict("has_words", passes=True),)),
        Pair("dog", "raw", None, "has_words", (FilterVerdict("has_words", passes=False),)),
        Pair("", "x", None, "no_text"),
    ]


@pytest.mark.parametrize(
    ("texts", "kept"),
    [
        (["A dog on the beach", "Dog at sea today"], ("A dog on the beach", "description")),
        (["Ein Hund am Strand", "The dog and the sea"], ("The dog and the sea", "title")),
        (["", "The dog and the sea"], ("The dog and the sea", "title")),
        (["two words", "The dog and the sea"], ("The dog and the sea", "title")),
    ],
)
def test_first_makes_one_pair_of_the_first_candidate_that_passes(texts, kept):
    [pair] = Chooser(YFCC).pairs(row(*texts))

    assert (pair.text, pair.field, pair.reason) == (*kept, None)


@pytest.mark.parametrize(
    ("texts", "dropped"),
    [
        (["Ein Hund am Strand", "two words"], ("two words", "title", "has_words")),
        (["two words", "Ein Hund am Strand"], ("Ein Hund am Strand", "title", "is_language")),
        (["Ein Hund am Strand", " \n"], ("Ein Hund am Strand", "description", "is_language")),
        (["", "\u00a0"], ("", "description", "no_text")),
    ],
)
def test_a_row_without_a_passing_candidate_is_dropped_for_its_last_text(texts, dropped):
    [pair] = Chooser(YFCC).pairs(row(*texts))

    assert (pair.text, pair.field, pair.reason) == dropped


@pytest.mark.parametrize("choose", ["all", "first"])
def test_a_row_that_states_only_the_image_gives_no_pair(choose):
    """The index counts the record as `no_caption` if no other row has its captions."""
    chooser = Chooser(Captions(choose=choose))

    assert chooser.pairs(row(url="http://a.test/1.jpg")) == []


@pytest.mark.parametrize(("choose", "count"), [("all", 2), ("first", 1)])
def test_a_refused_row_drops_its_pairs_unexamined(choose, count):
    chooser = Chooser(Captions(choose=choose, filters={"has_words": {"least": 9}}))

    assert reasons(chooser, row("one", "two", refused="heldout")) == ["heldout"] * count
    assert reasons(chooser, row(refused="video")) == ["video"]
    assert not chooser.fields


def test_a_filtered_row_is_not_filtered_again_but_must_have_text():
    chooser = Chooser(YFCC)

    assert reasons(chooser, row("zwei Wörter", filtered=True)) == [None]
    assert reasons(chooser, row(" ", filtered=True)) == ["no_text"]


def test_no_filter_runs_on_candidates_that_the_source_refuses():
    chooser = Chooser(Captions(filters={"has_words": {"least": 9}}))
    given_row = Row(id="1", candidates=[Candidate("one", "phrase", refused="bad_box")])

    assert reasons(chooser, given_row) == ["bad_box"]


def test_fields_count_each_examined_candidate():
    chooser = Chooser(YFCC)

    for texts in (["A dog on the beach", "never seen"], ["two words", "The dog and the sea"], [""]):
        chooser.pairs(row(*texts))

    assert chooser.fields == {
        ("description", "kept"): 1,
        ("description", "has_words"): 1,
        ("title", "kept"): 1,
        ("description", "no_text"): 1,
    }


def test_decisions_end_with_the_candidate_that_is_chosen():
    chooser = Chooser(YFCC)

    choice = chooser.choose(row("two words", "The dog and the sea", "never read"))
    refused = chooser.choose(row("one", "two", refused="video"))

    assert [pair.reason for pair in choice.decisions] == ["has_words", None]
    assert choice.pairs == choice.decisions[1:]
    assert choice.pairs[0].verdicts == (("has_words", True), ("is_language", True))
    assert refused.pairs == refused.decisions == [Pair("one", "description", None, "video")]


def test_cleaning_runs_before_the_filters_if_the_recipe_asks_for_it():
    html = row("<b>two&amp;</b> words http://a.test/b")
    switches = {"entities": True, "html": True, "urls": True}
    filters = {"has_words": {"most": 2}}

    [cleaned] = Chooser(Captions(clean=switches, filters=filters)).pairs(html)
    [plain] = Chooser(Captions(filters=filters)).pairs(html)
    [camera] = Chooser(Captions(clean={"camera_names": True})).pairs(row("IMG_1234.JPG"))

    assert cleaned[0] == "two& words"
    assert cleaned.reason is None
    assert plain[0] == "<b>two&amp;</b> words http://a.test/b"
    assert plain.reason == "has_words"
    assert camera.reason == "no_text"


@given(
    texts=st.lists(st.text(alphabet="ab \n\u2003é", max_size=8), max_size=4),
    least=st.integers(0, 3),
    choose=st.sampled_from(["all", "first"]),
)
def test_each_pair_of_a_row_is_kept_or_has_a_reason(texts, least, choose):
    chooser = Chooser(Captions(choose=choose, filters={"has_words": {"least": least}}))
    candidates = [Candidate(text, "raw") for text in texts]

    pairs = chooser.pairs(Row(id="1", candidates=candidates))

    assert len(pairs) == (len(texts) if choose == "all" else min(1, len(texts)))
    passing = [
        " ".join(text.split()) for text in texts if text.split() and len(text.split()) >= least
    ]
    kept = [pair.text for pair in pairs if pair.reason is None]
    assert kept == (passing if choose == "all" else passing[:1])


@given(
    caption=st.text(alphabet="ab \t\n\u00a0\u2003\u3000犬", max_size=20),
    least=st.integers(0, 5),
    most=st.integers(0, 5),
)
def test_has_words_counts_like_split_with_both_bounds_included(caption, least, most):
    count = len(caption.split())

    assert has_words(caption, least=least, most=most) == (count in range(least, most + 1))


def test_a_script_without_spaces_counts_as_one_word():
    assert has_words("犬が浜辺にいる", least=1, most=1)


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("a dog runs on the beach", "en"),
        ("Ein Hund läuft am Strand", "de"),
        ("un chien court sur la plage", "fr"),
        ("собака бежит по пляжу", "ru"),
        ("犬が浜辺を走っている", "ja"),
        ("كلب يركض على الشاطئ", "ar"),
    ],
)
def test_the_language_of_captions_is_identified(caption, language):
    assert identify(caption)[0] == language
    assert is_language(caption, language=language)
    assert is_language(caption) == (language == "en")


def test_the_threshold_is_the_least_probability_that_passes():
    _, score = identify("three word caption")

    assert is_language("three word caption", threshold=score)
    assert not is_language("three word caption", threshold=score + 1e-6)


@pytest.mark.parametrize("caption", ["", "\ud800 half a character", "a\0b", "x" * 100_000])
def test_any_text_has_a_language(caption):
    label, score = identify(caption)

    assert isinstance(label, str)
    assert 0 <= score <= 1.001


@pytest.fixture
def named_model(monkeypatch):
    """Names a language model; the packaged one is in use again afterwards."""

    def name(path):
        monkeypatch.setenv(LID_MODEL_VARIABLE, str(path))
        lid_model.cache_clear()

    yield name
    lid_model.cache_clear()


def test_the_packaged_model_is_one_of_the_published_two():
    path, sha256 = lid_model()

    assert path.name == LID_MODELS[sha256] == "lid.176.ftz"


def test_a_wrong_language_model_is_one_sentence(named_model, tmp_path):
    (tmp_path / "lid.bin").write_bytes(b"something else")

    named_model(tmp_path / "lid.bin")
    with pytest.raises(PmdError) as other:
        lid_model()
    named_model(tmp_path / "none.bin")
    with pytest.raises(PmdError) as absent:
        lid_model()

    assert str(other.value) == (
        f"{tmp_path}/lid.bin has sha256 {hashlib.sha256(b'something else').hexdigest()}, which is "
        "none of lid.176.ftz, lid.176.bin: download it again from fasttext.cc"
    )
    assert str(absent.value).startswith(f"{tmp_path}/none.bin: there is no such language model;")


def test_recipes_without_a_language_filter_load_no_model():
    code = (
        "import sys; from pmd_pipeline.index.choose import Chooser; "
        "from pmd_pipeline.recipe import load_recipe; "
        "[Chooser(recipe.captions) for recipe in load_recipe('pmd')]; "
        "print('fasttext' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout == "False\n"


def test_image_filters_compare_shorter_and_longer_sides():
    assert is_large((200, 640), least=200)
    assert not is_large((640, 199), least=200)
    assert is_compact((100, 300), most=3.0)
    assert not is_compact((301, 100), most=3.0)
