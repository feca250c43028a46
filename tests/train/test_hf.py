import json
from dataclasses import replace
from shutil import copyfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, flava, max_difference
from user_losses import USER_LOSSES

from flava_train.model.flava import PUBLISHED_HEADS, Flava, TowerConfig
from flava_train.model.hf import WEIGHTS, export_hf, load_hf, untrained_heads
from pmd_pipeline.contract.errors import PmdError

TOKENS = ["[PAD]", *(f"[unused{n}]" for n in range(1, 95)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*TOKENS, "dog", "##s"]


def weights(model):
    return dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_survive_a_round_trip_bit_for_bit(tmp_path, dtype):
    model = flava(replace(TINY, mm_pad_mask=False), dtype=dtype)

    export_hf(model, tmp_path / "model")
    back = load_hf(tmp_path / "model").to(dtype)

    assert back.config == model.config
    if dtype != torch.float64:  # loaded in float32
        assert max_difference(weights(model), weights(back)) == 0
    again = load_file(tmp_path / "model" / WEIGHTS)
    assert {tensor.dtype for tensor in again.values()} == {dtype}


def some_heads():
    """Two published heads, and one of a user's loss."""
    names = ("mlm", "itm")
    return {name: PUBLISHED_HEADS[name] for name in names} | {
        "rotation": USER_LOSSES["rotation"].entry.head
    }


def test_a_model_without_some_heads_survives_a_round_trip_with_untrained_ones(tmp_path):
    model = flava(dtype=torch.float32, heads=some_heads())

    export_hf(model, tmp_path / "model")
    back = load_hf(tmp_path / "model")

    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["untrained_heads"] == untrained_heads(back) == ["mim", "mmm_image", "mmm_text"]
    expected = {name: one for name, one in weights(model).items() if "rotation" not in name}
    assert max_difference(expected, weights(back)) == 0


def test_transformers_loads_an_export_with_untrained_heads(tmp_path):
    transformers = pytest.importorskip("transformers")
    export_hf(flava(dtype=torch.float32, heads=some_heads()), tmp_path / "model")

    theirs, loading_info = transformers.FlavaForPreTraining.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )

    assert {name: list(names) for name, names in loading_info.items() if names} == {}
    assert theirs.mim_head.decoder.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (theirs.mim_head.transform.LayerNorm.weight == 1).all()


def test_an_export_of_a_full_model_lists_no_untrained_heads(tmp_path):
    export_hf(flava(dtype=torch.float32), tmp_path / "model")

    assert "untrained_heads" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_siglips_bias_survives_in_the_configuration(tmp_path):
    model = flava(replace(TINY, logit_bias=-10.0), dtype=torch.float32)

    export_hf(model, tmp_path / "model")

    assert torch.equal(load_hf(tmp_path / "model").logit_bias, model.logit_bias)


def test_transformers_loads_an_export_without_missing_or_unexpected_tensors(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = flava(dtype=torch.float32)
    export_hf(model, tmp_path / "model")

    theirs, loading_info = transformers.FlavaForPreTraining.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )

    assert {name: list(names) for name, names in loading_info.items() if names} == {}
    ours = load_file(tmp_path / "model" / WEIGHTS)
    loaded = theirs.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in ours.items())
    assert theirs.image_codebook is None


def test_a_model_saved_by_transformers_has_the_same_bits(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = flava(dtype=torch.float32)
    export_hf(model, tmp_path / "ours")
    theirs = transformers.FlavaForPreTraining.from_pretrained(tmp_path / "ours")

    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    back = load_hf(tmp_path / "theirs")

    assert (tmp_path / "theirs" / f"{WEIGHTS}.index.json").is_file()
    assert max_difference(weights(model), weights(back)) == 0


def test_the_processor_of_an_export_encodes_images_and_captions(tmp_path):
    transformers = pytest.importorskip("transformers")
    image = pytest.importorskip("PIL.Image").new("RGB", (50, 40), (255, 0, 0))
    export_hf(flava(dtype=torch.float32), tmp_path / "model", vocabulary=VOCABULARY)

    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "model")
    inputs = processor(
        text=["Dogs dog"], images=[image], return_codebook_pixels=True, return_tensors="pt"
    )

    assert type(processor).__name__ == "FlavaProcessor"
    # [CLS] dog ##s dog [SEP]
    assert inputs["input_ids"].tolist() == [[96, 99, 100, 99, 97]]
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert inputs["codebook_pixel_values"].shape == (1, 3, 16, 16)
    red = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, -0.40821073 / 0.27577711]
    assert inputs["pixel_values"][0, :, 5, 5].tolist() == pytest.approx(red, abs=1e-4)


def test_an_export_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("flava_train.model.hf._write_json", fail)

    with pytest.raises(OSError, match="disk full"):
        export_hf(flava(dtype=torch.float32), tmp_path / "model")

    assert list(tmp_path.iterdir()) == []


def changed(tmp_path, change):
    folder = tmp_path / "model"
    export_hf(flava(dtype=torch.float32), folder)
    state, config = load_file(folder / WEIGHTS), json.loads((folder / "config.json").read_text())
    change(state, config)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, _: state.pop("flava.logit_scale"), "flava.logit_scale is missing"),
        (lambda state, _: state.update(extra=torch.ones(1)), r"also has \['extra'\]"),
        (
            lambda state, _: state.update({"flava.image_model.layernorm.bias": torch.ones(3)}),
            "image.norm.bias has 3 numbers",
        ),
        (
            lambda _, config: config["text_config"].update(hidden_act="relu"),
            "text_config.hidden_act is 'relu'; only 'gelu' is supported",
        ),
        (
            lambda _, config: config["image_config"].update(layer_norm_eps=1e-6),
            "layer_norm_eps differs",
        ),
        (
            lambda _, config: config["image_config"].update(image_size=[32, 64]),
            r"images of \[32, 64\] pixels are not square",
        ),
    ],
)
def test_a_folder_of_another_model_is_refused_with_a_reason(tmp_path, change, message):
    folder = changed(tmp_path, change)

    with pytest.raises(PmdError, match=message):
        load_hf(folder)


def test_either_name_of_a_tied_bias_is_read_and_unused_tensors_are_skipped(tmp_path):
    def older(state, _):
        state["mim_head.bias"] = state.pop("mim_head.decoder.bias")
        state["image_codebook.blocks.input.weight"] = torch.ones(1)
        state["flava.text_model.embeddings.position_ids"] = torch.ones(1)

    model = load_hf(changed(tmp_path, older))

    assert max_difference(weights(flava(dtype=torch.float32)), weights(model)) == 0


def test_a_folder_without_safetensors_is_refused(tmp_path):
    export_hf(flava(dtype=torch.float32), tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).rename(tmp_path / "model" / "pytorch_model.bin")

    with pytest.raises(PmdError, match="save the model as safetensors"):
        load_hf(tmp_path / "model")


def test_an_index_of_shards_cannot_name_files_outside_the_folder(tmp_path):
    export_hf(flava(dtype=torch.float32), tmp_path / "model")
    index = {"weight_map": {"x": "../model.safetensors"}}
    (tmp_path / "model" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    copyfile(tmp_path / "model" / WEIGHTS, tmp_path / WEIGHTS)

    with pytest.raises(PmdError, match=r"no \.\./model.safetensors"):
        load_hf(tmp_path / "model")


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_model_of_the_hub_needs_a_commit(revision):
    with pytest.raises(PmdError, match="also give its commit"):
        load_hf("facebook/flava-full", revision=revision)


def test_only_weights_and_configuration_are_downloaded_from_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    export_hf(flava(dtype=torch.float32), tmp_path / "model")
    downloads = []

    def snapshot_download(name, *, revision, allow_patterns):
        downloads.append((name, revision, allow_patterns))
        return str(tmp_path / "model")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)

    load_hf("facebook/flava-full", revision="a" * 40)

    ((name, revision, patterns),) = downloads
    assert (name, revision) == ("facebook/flava-full", "a" * 40)
    assert all(pattern.split("*")[-1].endswith(("json", ".safetensors")) for pattern in patterns)


def test_an_export_does_not_overwrite_a_folder(tmp_path):
    with pytest.raises(PmdError, match="exists; remove it"):
        export_hf(flava(dtype=torch.float32), tmp_path)


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    with pytest.raises(PmdError, match="has 3 WordPieces, the model 101"):
        export_hf(flava(dtype=torch.float32), tmp_path / "model", vocabulary=["a", "b", "c"])


def test_encoders_of_different_widths_cannot_be_exported(tmp_path):
    model = Flava(replace(TINY, text=TowerConfig(1, 16, 4, 16)))

    with pytest.raises(PmdError, match="one width for all"):
        export_hf(model, tmp_path / "model")
