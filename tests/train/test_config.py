import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trials import told

from flava_train.config import as_toml, checked, config_names, load_config
from flava_train.model.flava import TowerConfig
from flava_train.objective.losses import ABLATIONS, Objective
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.recipe import recipe_names


@pytest.fixture
def write(tmp_path):
    """Writes a configuration file; its path."""

    def write_file(text, name="mine.toml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


def refusal(*words, **more):
    """What a configuration is refused with."""
    with pytest.raises(PmdError) as caught:
        load_config(*words, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("flava_pmd", "flava"),
        ("flava_without_init", "flava_without_init"),
        ("flava_mm", "flava_mm"),
        ("flava_c", "flava_c"),
        ("flava_mim", "mim"),
        ("flava_mlm", "mlm"),
    ],
)
def test_every_row_of_the_papers_ablation_has_its_configuration(name, row):
    assert load_config(name).objective == ABLATIONS[row]


def test_the_full_model_is_trained_as_in_the_paper():
    config = load_config("flava_pmd")

    assert (config.steps, config.batch) == (150_000, 8192)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.warmup, optimizer.schedule) == (1e-3, 10_000, "cosine")
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.1)
    assert config.model.image == config.model.text == TowerConfig(12, 768, 12, 3072)
    assert config.evaluation.every == 8000


def test_the_text_encoder_is_trained_before_as_roberta():
    config = load_config("flava_text_mlm")

    assert (config.steps, config.batch, config.optimizer.lr) == (125_000, 2048, 5e-4)
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.98), 0.01)
    assert config.out == load_config("flava_pmd").model.init_text


def test_training_configurations_and_data_recipes_do_not_meet():
    assert not set(config_names()) & set(recipe_names())
    assert "flava_tiny" in config_names()


@pytest.mark.parametrize("name", config_names())
def test_a_resolved_configuration_can_be_loaded_again(name, write):
    config = load_config(name)

    assert load_config(write(as_toml(config))) == config


@given(
    st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1e300), st.integers(0, 2**62)
)
def test_any_value_survives_toml(text, number, seed):
    config = told(Path("world"), "run", {"data.cache": text, "seed": seed})
    config = replace(config, optimizer=replace(config.optimizer, lr=number))

    assert checked(tomllib.loads(as_toml(config)), where="again") == config


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz = 5", "unknown key 'stepz'; did you mean 'steps'?"),
        ("[optimiser]\nlr = 1e-3", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("[optimizer]\nlrr = 1e-3", "unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        ("[model.image]\nlayer = 3", "unknown key 'model.image.layer'; did you mean 'layers'?"),
        ("[objective.streams]\npair = 1.0", "unknown key 'objective.streams.pair'; did you mean"),
        ('[optimizer]\nlr = "fast"', 'optimizer.lr = "fast": should be a valid number'),
        ("seed = 1.0", "seed = 1.0: should be a valid integer"),
        ("seed = true", "seed = true: should be a valid integer"),
        ("[optimizer]\nlr = nan", "optimizer.lr = NaN: should be a finite number"),
        ("[optimizer]\nbetas = [0.9, 1.5]", "optimizer.betas.1 = 1.5: should be less than 1"),
        ('[compute]\nprecision = "int8"', "compute.precision = \"int8\": should be 'bf16'"),
        ("optimizer = 5", "optimizer is a section, not a value"),
        ("[model]\nimage_size = 65", "model: an image of 65 pixels cannot be cut"),
        ("[optimizer]\nwarmup = 10", "optimizer.warmup = 10 leaves nothing of the 10 steps"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(text, sentence, write):
    write("steps = 10\nbatch = 4\nmicro = 4\n[optimizer]\nwarmup = 0\n", "below.toml")
    path = write(f'base = "below.toml"\n{text}\n')

    assert refusal(path).startswith(f"{path}: {sentence}")


def test_a_missing_key_is_named(write):
    path = write("steps = 10\nbatch = 4\n")

    assert refusal(path) == f"{path}: micro is missing"


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("optimizer.lrr=3e-4", "--set: unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        ("data.text.vocabulary=a", "--set: unknown key 'data.text'; did you mean 'texts'?"),
        ("optimizer.lr=quick", '--set: optimizer.lr = "quick": should be a valid number'),
        ("optimizer=3", "--set: optimizer is a section, not a value"),
        ("steps.more=3", "--set steps.more: steps is a value, so nothing stands below it"),
        ("steps", "--set steps: write it as key=value, as in optimizer.lr=3e-4"),
        ("=3", "--set =3: write it as key=value, as in optimizer.lr=3e-4"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(setting, sentence):
    assert refusal("flava_pmd", settings=[setting]) == sentence


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("optimizer.lr=3e-4", 3e-4),
        ("optimizer.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("data.texts=['a.json', \"b.json\"]", ("a.json", "b.json")),
        ("data.pairs=manifests/coco.json", "manifests/coco.json"),
        ("data.pairs='007'", "007"),
        ("compute.compile=false", False),
        ("model.image.layers=6", 6),
        (" evaluation.metric = zero_shot_top5 ", "zero_shot_top5"),
    ],
)
def test_a_value_can_be_set_by_its_dotted_key(setting, value):
    found = load_config("flava_pmd", settings=[setting])

    for key in setting.partition("=")[0].strip().split("."):
        found = getattr(found, key)
    assert found == value


def test_the_last_word_has_the_command_line(write):
    path = write('base = "flava_pmd"\nmicro = 16\n[optimizer]\nlr = 0.5\n')

    config = load_config(path, {"data.pairs": "mine.json"}, settings=["optimizer.lr=0.25"])

    assert (config.steps, config.micro, config.optimizer.lr) == (150_000, 16, 0.25)
    assert config.data.pairs == "mine.json"
    assert config.out == "runs/mine"


def test_a_base_is_looked_for_beside_its_file(write):
    write("steps = 5\nbatch = 4\nmicro = 2\n[optimizer]\nwarmup = 1\n", "below.toml")
    path = write('base = "below.toml"\nbatch = 8\n')

    assert (load_config(path).steps, load_config(path).batch) == (5, 8)


def test_bases_in_a_circle_are_refused(write):
    write('base = "mine.toml"\n', "other.toml")

    assert "is based on it" in refusal(write('base = "other.toml"\n'))


def test_what_is_no_configuration_is_refused(write, tmp_path):
    assert refusal("flava_pdm") == (
        "there is no configuration 'flava_pdm'; did you mean 'flava_pmd'?"
    )
    assert refusal("no.toml") == "no.toml: there is no such configuration file"
    assert "this is no TOML" in refusal(write("steps ="))
    assert "should be a name or a file" in refusal(write("base = 5"))


def test_defaults_of_the_objective_are_those_of_the_full_model():
    assert Objective() == ABLATIONS["flava"]
