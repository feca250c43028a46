import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from ablations import ABLATIONS
from hypothesis import given
from hypothesis import strategies as st
from trials import small_config
from user_losses import USER_LOSSES

from flava_train.config import (
    as_toml,
    config_names,
    load_config,
    load_objective,
    load_step_metrics,
    validate_config,
)
from flava_train.model.flava import TowerConfig
from flava_train.objective.losses import LOSSES
from flava_train.objective.metrics import STEP_METRICS
from flava_train.objective.objective import ExtraLoss, Objective
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.recipe import recipe_names


@pytest.fixture
def write(tmp_path):
    """Writes a configuration file, and returns its path."""

    def write_file(text, name="mine.toml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


def error_of(*args, **kwargs):
    """The message of `load_config`, which must fail."""
    with pytest.raises(PmdError) as caught:
        load_config(*args, **kwargs)
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
def test_every_row_of_the_papers_ablation_has_a_configuration(name, row):
    assert load_config(name).objective == ABLATIONS[row]


def test_the_full_model_is_trained_as_in_the_paper():
    config = load_config("flava_pmd")

    assert (config.steps, config.batch) == (150_000, 8192)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.warmup, optimizer.schedule) == (1e-3, 10_000, "cosine")
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.1)
    assert config.model.image == config.model.text == TowerConfig(12, 768, 12, 3072)
    assert config.evaluation.every == 8000


def test_the_text_encoder_is_trained_as_roberta():
    config = load_config("flava_text_mlm")

    assert (config.steps, config.batch, config.optimizer.lr) == (125_000, 2048, 5e-4)
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.98), 0.01)
    assert config.out == load_config("flava_pmd").model.init_text


def test_training_configurations_and_data_recipes_have_different_names():
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
    config = small_config(Path("datasets"), "run", {"data.cache": text, "seed": seed})
    config = replace(config, optimizer=replace(config.optimizer, lr=number))

    assert validate_config(tomllib.loads(as_toml(config)), source="again") == config


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
        (
            "[objective.losses.mine]\nfunctoin = 'a:b'",
            "unknown key 'objective.losses.mine.functoin'; did you mean 'function'?",
        ),
        ("[objective.losses]\nmine = 'a:b'", "objective.losses.mine is a section, not a value"),
        (
            "[objective]\ncontrastive_loss = 'siglip'",
            "objective.contrastive_loss = siglip needs a bias: set model.logit_bias = -10.0",
        ),
        (
            "[objective]\ncontrastive_loss = 'global'",
            'objective.contrastive_loss = "global": should',
        ),
        ("[optimizer]\nwarmup = 10", "optimizer.warmup = 10 must be less than the 10 steps"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(text, sentence, write):
    write("steps = 10\nbatch = 4\nmicro_batch_size = 4\n[optimizer]\nwarmup = 0\n", "below.toml")
    path = write(f'base = "below.toml"\n{text}\n')

    assert error_of(path).startswith(f"{path}: {sentence}")


def test_a_missing_key_is_named(write):
    path = write("steps = 10\nbatch = 4\n")

    assert error_of(path) == f"{path}: micro_batch_size is missing"


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("optimizer.lrr=3e-4", "--set: unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        ("data.text.vocabulary=a", "--set: unknown key 'data.text'; did you mean 'texts'?"),
        ("optimizer.lr=quick", '--set: optimizer.lr = "quick": should be a valid number'),
        ("optimizer=3", "--set: optimizer is a section, not a value"),
        ("steps.more=3", "--set steps.more: steps is a value, so it has no keys"),
        ("steps", "--set steps: write it as key=value, as in optimizer.lr=3e-4"),
        ("=3", "--set =3: write it as key=value, as in optimizer.lr=3e-4"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(setting, sentence):
    assert error_of("flava_pmd", settings=[setting]) == sentence


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
    node = load_config("flava_pmd", settings=[setting])

    for key in setting.partition("=")[0].strip().split("."):
        node = getattr(node, key)
    assert node == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("micro = 4", "unknown key 'micro'; did you mean 'micro_batch_size'?"),
        ("skip = [4]", "unknown key 'skip'; did you mean 'skip_steps'?"),
        ("[optimizer]\nclip = 1.0", "unknown key 'optimizer.clip'; did you mean 'grad_clip_norm'?"),
        (
            "[checkpoint]\nkeep = 1",
            "unknown key 'checkpoint.keep'; did you mean 'keep_checkpoints'?",
        ),
        ("[objective]\ncontrast = 'local'", "unknown key 'objective.contrast'; did you mean"),
    ],
)
def test_a_key_of_an_earlier_version_suggests_its_successor(text, sentence, write):
    path = write(f'base = "flava_pmd"\n{text}\n')

    assert error_of(path).startswith(f"{path}: {sentence}")


def test_the_command_line_overrides_the_file(write):
    path = write('base = "flava_pmd"\nmicro_batch_size = 16\n[optimizer]\nlr = 0.5\n')

    config = load_config(path, {"data.pairs": "mine.json"}, settings=["optimizer.lr=0.25"])

    assert (config.steps, config.micro_batch_size, config.optimizer.lr) == (150_000, 16, 0.25)
    assert config.data.pairs == "mine.json"
    assert config.out == "runs/mine"


def test_a_base_is_found_beside_its_file(write):
    write("steps = 5\nbatch = 4\nmicro_batch_size = 2\n[optimizer]\nwarmup = 1\n", "below.toml")
    path = write('base = "below.toml"\nbatch = 8\n')

    assert (load_config(path).steps, load_config(path).batch) == (5, 8)


def test_bases_in_a_circle_are_refused(write):
    write('base = "mine.toml"\n', "other.toml")

    assert "is based on it" in error_of(write('base = "other.toml"\n'))


def test_an_unknown_or_invalid_configuration_is_refused(write, tmp_path):
    assert error_of("flava_pdm") == (
        "there is no configuration 'flava_pdm'; did you mean 'flava_pmd'?"
    )
    assert error_of("no.toml") == "no.toml: there is no such configuration file"
    assert "this is no TOML" in error_of(write("steps ="))
    assert "should be a name or a file" in error_of(write("base = 5"))


def test_defaults_of_the_objective_are_those_of_the_full_model():
    assert Objective() == ABLATIONS["flava"]


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Writes a module of the user's own, and returns its name, which no other test uses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")

    def write_module(code):
        name = f"mine_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write_module


LOSS = """
from flava_train.objective.losses import LOSSES

def loss(scale=1):
    if scale > 9:
        raise ValueError("a scale of 9 at most")
    return LOSSES["mim"]

def nothing():
    return 5

measure = 5
"""


def test_a_users_loss_is_loaded_with_its_arguments(user_module):
    name = user_module(LOSS)
    losses = {"mine": ExtraLoss(f"{name}:loss", 0.5, {"scale": 2})}

    objective = load_objective(Objective(mim=0.0, losses=losses))

    last = objective.active_losses[-1]
    assert (last.name, last.weight, last.entry.stream) == ("mine", 0.5, "images")
    assert "mine" in objective.heads


@pytest.mark.parametrize(
    ("name", "function", "arguments", "sentence"),
    [
        ("mine", "absent:loss", {}, "absent:loss: there is no module 'absent'"),
        ("mine", "{}:lass", {}, "defines no 'lass'; did you mean 'loss'?"),
        (
            "mine",
            "{}:loss",
            {"scale": 10},
            "{}:loss for objective.losses.mine fails: ValueError: a scale of 9 at most",
        ),
        ("mine", "{}:loss", {"size": 1}, "unexpected keyword argument 'size'"),
        ("mine", "{}:nothing", {}, "{}:nothing returns int; it must return a Loss"),
        ("mim", "{}:loss", {}, "objective.losses.mim: 'mim' cannot be the name of a loss"),
        ("my loss", "{}:loss", {}, "'my loss' cannot be the name of a loss"),
        ("mine", "loss", {}, "objective.losses.mine: 'loss' is neither module:function nor a loss"),
        ("mine", "", {}, "'mine' is neither module:function nor a loss; there are itm, mim,"),
        ("mine", "mim", {"scale": 1}, "objective.losses.mine: the loss mim has no arguments"),
    ],
)
def test_a_users_loss_that_cannot_be_loaded_is_one_sentence(
    user_module, name, function, arguments, sentence
):
    module = user_module(LOSS)
    loss = ExtraLoss(function.format(module), 1.0, arguments)

    with pytest.raises(PmdError) as caught:
        load_objective(Objective(losses={name: loss}))

    assert sentence.format(module) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loss_of_the_package_needs_one_entry(monkeypatch):
    monkeypatch.setitem(LOSSES, "rotation", USER_LOSSES["rotation"].entry)
    losses = {"rotation": ExtraLoss(weight=0.5), "again": ExtraLoss("rotation")}

    objective = load_objective(Objective(mim=0.0, losses=losses))

    added = [(loss.name, loss.weight) for loss in objective.active_losses[-2:]]
    assert added == [("rotation", 0.5), ("again", 1.0)]
    assert {"rotation", "again"} <= objective.heads.keys()
    assert "rotation" not in load_objective(Objective()).heads


def test_a_users_loss_survives_toml(write):
    path = write(
        'base = "flava_tiny"\n[objective.losses.mine]\nfunction = "a:b"\nweight = 0.5\n'
        "arguments = { words = [1, 2], deep = { x = 1.5 } }\n"
    )

    config = load_config(path)

    assert config.objective.losses["mine"].arguments == {"words": [1, 2], "deep": {"x": 1.5}}
    assert validate_config(tomllib.loads(as_toml(config)), source="again") == config


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["itm_accurcy"], "there is no metric 'itm_accurcy'; did you mean 'itm_accuracy'?"),
        (["itm_accuracy", "itm_accuracy"], "two metrics have the name itm_accuracy"),
        (["{}:measure"], "{}:measure is no function"),
        (["{}:mesure"], "defines no 'mesure'; did you mean 'measure'?"),
    ],
)
def test_a_metric_that_cannot_be_loaded_is_one_sentence(user_module, names, sentence):
    module = user_module(LOSS)

    with pytest.raises(PmdError) as caught:
        load_step_metrics([name.format(module) for name in names])

    assert sentence.format(module) in str(caught.value)


def test_every_metric_of_the_package_is_found_by_name():
    assert load_step_metrics(list(STEP_METRICS)) == STEP_METRICS
