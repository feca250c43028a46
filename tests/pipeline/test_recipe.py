import tomllib

import pytest

from pmd_pipeline import sources
from pmd_pipeline.filters import caption
from pmd_pipeline.recipe import (
    Recipe,
    RecipeError,
    load_recipe,
    predicate,
    recipe_folder,
    recipe_names,
)


@pytest.fixture
def write(tmp_path):
    """Writes a recipe file; its path."""

    def write_file(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def refusal(path):
    """What the recipe at `path` is refused with, without the path."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("part_record = 5", "unknown key 'part_record'; did you mean 'part_records'?"),
        ("[image]\nsize = 5", "unknown key 'image'; did you mean 'images'?"),
        ("[images]\nsise = 5", "unknown key 'images.sise'; did you mean 'size'?"),
        ("[captions.clean]\nurl = true", "unknown key 'captions.clean.url'; did you mean 'urls'?"),
        (
            "[fetch]\nxyz = 5",
            "unknown key 'fetch.xyz'; there are concurrency, connect_to, contact, ",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(text, sentence, write):
    assert refusal(write(f'source = "coco"\n{text}')).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[images]\nsize = 15", "images.size = 15: input should be greater than or equal to 16"),
        ("[images]\nquality = 101", "images.quality = 101: input should be less than or equal to"),
        ('[images]\nsize = "256"', 'images.size = "256": input should be a valid integer'),
        ("[images]\nquality = 95.0", "images.quality = 95.0: input should be a valid integer"),
        ("[fetch]\ntimeout = inf", "fetch.timeout = Infinity: input should be a finite number"),
        ("[fetch]\ntimeout = 0", "fetch.timeout = 0: input should be greater than 0"),
        (
            '[captions]\ndrop_repeats = "no"',
            'captions.drop_repeats = "no": input should be a valid',
        ),
        (
            '[captions]\nchoose = "best"',
            "captions.choose = \"best\": input should be 'all' or 'first'",
        ),
        ("images = 5", "images = 5: input should be a valid dictionary"),
        ("[captions.filters]\nhas_words = 3", "captions.filters.has_words = 3: input should be a"),
        ("part_records = 1979-05-27", 'part_records = "1979-05-27": input should be a valid int'),
    ],
)
def test_an_error_about_a_value_names_its_key(text, sentence, write):
    assert refusal(write(f'source = "coco"\n{text}')).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[captions.filters.has_word]",
            "no filter 'has_word' in pmd_pipeline.filters.caption; did you mean 'has_words'?",
        ),
        (
            "[captions.filters.identify]",
            "no filter 'identify' in pmd_pipeline.filters.caption; there are has_words, is_lang",
        ),
        (
            "[images.filters.is_larg]",
            "no filter 'is_larg' in pmd_pipeline.filters.image; did you mean 'is_large'?",
        ),
        (
            "[captions.filters.has_words]\nleats = 3",
            "filter has_words: unknown key 'leats'; did you mean 'least'?",
        ),
        (
            '[captions.filters.has_words]\nleast = "3"',
            'filter has_words: least = "3": input should be a valid integer',
        ),
        ("[images.filters.is_large]", "filter is_large: least is missing"),
        (
            "[captions.filters.is_language]\nthreshold = 50",
            "filter is_language: threshold = 50: input should be less than or equal to 1",
        ),
        (
            '[captions.filters.is_language]\nlanguage = "English"',
            'filter is_language: language = "English": string should match pattern',
        ),
    ],
)
def test_an_invalid_filter_is_refused_with_a_suggestion(text, sentence, write):
    assert refusal(write(f'source = "coco"\n{text}')).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('splitt = "val"', "[options]: unknown key 'splitt'; did you mean 'splits'?"),
        ('splits = ["val"]', "[options]: splits.0 = \"val\": input should be 'train' or 'restval'"),
        ('splits = "train"', "[options]: splits = \"train\": 'str' instances are not allowed"),
    ],
)
def test_an_unknown_option_of_a_source_is_refused(text, sentence, write):
    path = write(f'source = "coco"\n[options]\n{text}')

    assert refusal(path).removeprefix(f"{path} ").startswith(sentence)


def test_a_source_without_options_refuses_any(write):
    path = write('source = "cc3m"\n[options]\nsplits = ["train"]')

    assert refusal(path) == f"{path} [options]: unknown key 'splits'; there are none"


def test_an_unknown_source_form_or_recipe_is_refused_with_a_suggestion(write):
    assert refusal(write('source = "coc"')) == "there is no source 'coc'; did you mean 'coco'?"
    assert refusal(write('source = "sbu"\nform = "txt"')) == (
        "sbu has no form 'txt'; did you mean 'text'?"
    )
    assert refusal("coc") == "there is no source or recipe 'coc'; did you mean 'coco'?"
    assert refusal("../recipes/coco").startswith("there is no source or recipe '../recipes/coco'")
    assert refusal("nowhere/coco.toml") == "there is no such recipe file"
    assert refusal(write("part_records = 5")) == "source is missing"


def test_invalid_toml_is_one_sentence(write, tmp_path):
    assert refusal(write('source = "coco')).startswith("this is not TOML: ")
    (tmp_path / "latin.toml").write_bytes(b'source = "caf\xe9"')
    assert refusal(str(tmp_path / "latin.toml")).startswith("this is not TOML: ")


def test_include_gives_the_named_recipes_each_changed_by_the_rest(write):
    write('source = "sbu"\n[images]\nsize = 64', "own.toml")
    path = write('include = ["coco", "own.toml"]\n[images]\nquality = 50\n[fetch]\ncontact = "me"')

    coco, sbu = load_recipe(path, {"fetch": {"contact": "you"}, "part_records": 7})

    assert (coco.source, sbu.source) == ("coco", "sbu")
    assert (coco.images.size, sbu.images.size) == (256, 64)
    assert {recipe.images.quality for recipe in (coco, sbu)} == {50}
    assert {recipe.fetch.contact for recipe in (coco, sbu)} == {"you"}
    assert {recipe.part_records for recipe in (coco, sbu)} == {7}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("include = []", "include must be a list of recipe names"),
        ('include = "coco"', "include must be a list of recipe names"),
        ("include = [5]", "include must be a list of recipe names"),
        (
            'include = ["coco"]\nsource = "sbu"',
            "include and source exclude each other; the included have one",
        ),
        (
            'include = ["coco", "sbu", "coco"]',
            "include gives two recipes for coco; leave one out",
        ),
        ('include = ["coc"]', "there is no source or recipe 'coc'; did you mean 'coco'?"),
        ('include = ["coco"]\nimage = 5', "unknown key 'image'; did you mean 'images'?"),
    ],
)
def test_an_invalid_include_is_one_sentence(text, sentence, write):
    assert refusal(write(text)) == sentence


def test_filters_are_replaced_and_other_tables_are_merged(write):
    path = write(
        'source = "coco"\n[captions]\ndrop_repeats = true\n[captions.filters.has_words]\nleast = 3'
    )

    [recipe] = load_recipe(path, {"captions": {"filters": {"is_language": {}}}})

    assert recipe.captions.drop_repeats
    assert recipe.captions.filters == {"is_language": {}}


def test_every_source_has_a_recipe_of_its_name_and_every_recipe_loads():
    assert set(sources.names()) == {*recipe_names()} - {"pmd"}
    for name in sources.names():
        [recipe] = load_recipe(name)
        assert recipe.source == name


def test_pmd_is_all_nine_in_the_order_of_the_papers_table():
    assert [recipe.source for recipe in load_recipe("pmd")] == [
        "coco",
        "sbu",
        "localized_narratives",
        "cc3m",
        "visual_genome",
        "wit",
        "cc12m",
        "redcaps",
        "yfcc100m",
    ]


def test_only_yfcc100m_is_filtered_and_by_the_papers_two_rules():
    """Law 4: FLAVA, section 3.5."""
    recipes = {recipe.source: recipe for recipe in load_recipe("pmd")}

    yfcc = recipes.pop("yfcc100m")
    [words, language] = [
        predicate(caption, name, given) for name, given in yfcc.captions.filters.items()
    ]

    assert (words("two words"), words("three words here")) == (False, True)
    assert (language("a dog on a beach"), language("ein Hund am Strand")) == (True, False)
    assert yfcc.captions.choose == "first"
    for recipe in recipes.values():
        assert recipe.captions.filters == {}
    for recipe in (yfcc, *recipes.values()):
        assert recipe.images.filters == {}
        assert not recipe.captions.drop_repeats
        assert not any(recipe.captions.clean.model_dump().values())


def test_options_are_stored_with_the_defaults_of_the_source():
    [recipe] = load_recipe("coco")

    assert recipe.options == {"splits": ["train", "restval"]}


@pytest.mark.parametrize(
    "change",
    [
        {"form": "karpathy"},
        {"options": {"splits": ["train"]}},
        {"part_records": 7},
        {"captions": {"choose": "first"}},
        {"captions": {"filters": {"has_words": {}}}},
        {"captions": {"clean": {"urls": True}}},
        {"captions": {"drop_repeats": True}},
        {"images": {"size": 16}},
        {"images": {"mode": "none"}},
        {"images": {"quality": 1}},
        {"images": {"max_bytes": 1}},
        {"images": {"max_pixels": 1}},
        {"images": {"respect": ["robots", "tdm"]}},
        {"images": {"filters": {"is_large": {"least": 1}}}},
    ],
)
def test_rules_change_with_all_that_shapes_data(change):
    assert load_recipe("coco", change)[0].rules() != load_recipe("coco")[0].rules()


def test_respected_signals_are_a_set():
    one, other, default = (
        load_recipe("coco", change)[0].rules()
        for change in (
            {"images": {"respect": ["x-robots-tag", "tdm", "robots", "tdm"]}},
            {"images": {"respect": ["robots", "tdm", "x-robots-tag"]}},
            {},
        )
    )

    assert one == other == default


@pytest.mark.parametrize("name", ["contact", "concurrency", "per_host", "timeout", "retries"])
def test_rules_do_not_change_with_fetch_settings(name):
    other = {"contact": "me", "timeout": 9.5}.get(name, 1)

    [recipe] = load_recipe("coco", {"fetch": {name: other}})

    assert recipe.fetch != load_recipe("coco")[0].fetch
    assert recipe.rules() == load_recipe("coco")[0].rules()


def test_a_recipe_can_be_made_from_its_rules():
    [recipe] = load_recipe("yfcc100m")

    assert Recipe.model_validate(recipe.rules()).rules() == recipe.rules()


def test_every_recipe_begins_with_a_comment():
    for path in recipe_folder().glob("*.toml"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert tomllib.loads(text)
