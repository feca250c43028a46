"""The dVAE gives the codes of transformers; pickles are read without executing them."""

import hashlib
import importlib
import os
import pickle
import random
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from pmd_pipeline.codes.pickles import read_pickle
from pmd_pipeline.codes.tokenizers import Tokenizer, open_tokenizer, tokenizer_names
from pmd_pipeline.codes.tokenizers.dalle import convert_weights, dalle_tokenizer, dalle_weights
from pmd_pipeline.codes.weights import find_weights, read_tensors
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.models import CodeRules

flava = pytest.importorskip("transformers.models.flava")

DALL_E = """
from torch import nn

class Conv2d(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.w, self.b = nn.Parameter(weight), nn.Parameter(bias)
        self.use_float16, self.device = True, weight.device

class EncoderBlock(nn.Module):
    pass

class Encoder(nn.Module):
    pass
"""
"""Modules under the names of OpenAI's, which a pickle of theirs asks for."""


def codebook(width=8, vocabulary=40):
    """Transformers' codebook with random weights that give many different codes."""
    torch.manual_seed(0)
    model = flava.FlavaImageCodebook(
        flava.FlavaImageCodebookConfig(hidden_size=width, vocab_size=vocabulary)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 2 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.normal_(0, spread)
    return model


def arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def pictures(count, side=32):
    """Tiles of random colours, which give more different codes than noise does."""
    tiles = np.random.default_rng(5).integers(
        0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8
    )
    return tiles.repeat(8, axis=1).repeat(8, axis=2)


def codes_of_transformers(model, images):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        return model.get_codebook_indices(0.8 * pixels + 0.1).numpy()


@pytest.fixture
def openai(tmp_path, monkeypatch):
    """The codebook as OpenAI's own modules, so that `torch.save` writes what they wrote."""
    folder = tmp_path / "modules" / "dall_e"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "encoder.py").write_text(DALL_E)
    (folder / "utils.py").write_text(DALL_E)
    monkeypatch.syspath_prepend(str(folder.parent))
    encoder, utils = map(importlib.import_module, ("dall_e.encoder", "dall_e.utils"))

    def module(state, at):
        names = list(dict.fromkeys(name.split(".")[0] for name in state))
        if names == ["weight", "bias"]:
            return utils.Conv2d(state["weight"], state["bias"])
        made = encoder.EncoderBlock() if at.startswith("block_") else torch.nn.Sequential()
        for name in names:
            below = {
                key.partition(".")[2]: value
                for key, value in state.items()
                if key.split(".")[0] == name
            }
            made.add_module(name, module(below, name))
        for plain in (torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Identity()):
            made.add_module(type(plain).__name__.lower(), plain)
        return made

    model = codebook()
    state = {
        name.replace(".group.block_", ".block_").replace(".path.conv", ".conv"): tensor
        for name, tensor in model.state_dict().items()
    }
    whole = encoder.Encoder()
    whole.add_module("blocks", module(state, "").get_submodule("blocks"))
    whole.device, whole.seen = torch.device("cpu"), {1, 2}
    yield model, whole
    for name in [name for name in sys.modules if name.startswith("dall_e")]:
        del sys.modules[name]


def write(path, thing, *, new):
    with warnings.catch_warnings(action="ignore"):  # torch cannot find the source of some classes
        torch.save(thing, path, _use_new_zipfile_serialization=new)
    return str(path)


def test_codes_are_those_of_transformers():
    model, images = codebook(), pictures(11)

    ours = dalle_tokenizer(dalle_weights(arrays(model), "")).codes(images)

    assert ours.dtype == np.uint16
    assert ours.shape == (11, 4, 4)
    assert len(np.unique(ours)) > 5
    np.testing.assert_array_equal(ours, codes_of_transformers(model, images))


@pytest.mark.slow
def test_codes_of_the_full_encoder_are_those_of_transformers():
    model, images = codebook(256, 8192), pictures(2, 112)

    ours = dalle_tokenizer(dalle_weights(arrays(model), "")).codes(images)

    assert ours.shape == (2, 14, 14)
    assert len(np.unique(ours)) > 20
    np.testing.assert_array_equal(ours, codes_of_transformers(model, images))


def test_codes_do_not_depend_on_threads():
    tokenizer = dalle_tokenizer(dalle_weights(arrays(codebook()), ""))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(tokenizer.codes(pictures(8)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)

    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_half_precision_agrees_mostly():
    weights, images = dalle_weights(arrays(codebook()), ""), pictures(40)

    exact = dalle_tokenizer(weights).codes(images)
    half = dalle_tokenizer(weights, dtype="bfloat16").codes(images)

    assert 0.8 < (exact == half).mean() < 1


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_the_pickle_of_openai_gives_the_same_weights_as_transformers(openai, tmp_path, new):
    model, module = openai

    tensors = read_pickle(write(tmp_path / "encoder.pkl", module, new=new))

    assert len(tensors) == 74
    assert dalle_weights(tensors, "").sha256 == dalle_weights(arrays(model), "").sha256


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pickled_mapping_of_tensors_is_read_too(tmp_path, new):
    model = codebook()

    tensors = read_pickle(write(tmp_path / "model.bin", model.state_dict(), new=new))

    assert dalle_weights(tensors, "").sha256 == dalle_weights(arrays(model), "").sha256


class Call:
    """A pickle of this calls `function`."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def evil(mark):
    """Pickles that would touch `mark`, each by another way."""
    touch = f"touch {mark}"
    module = torch.nn.Sequential()
    module.payload = Call(os.system, touch)
    return {
        "at once": Call(os.system, touch),
        "in a module": module,
        "in a mapping": OrderedDict(weight=torch.zeros(2), other=[Call(os.system, touch)]),
        "by getattr": Call(getattr, Call(__import__, "os"), "system"),
        "by eval": Call(eval, f"__import__('os').system('{touch}')"),
        "by torch": Call(torch.load, str(mark)),
        "by a hook": Call(torch._tensor._rebuild_from_type_v2, Call, dict, (), {}),
        "by numpy": np.arange(3),
        "as a name": os.system,
    }


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("way", list(evil("")))
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, way, new):
    mark = tmp_path / "mark"
    path = write(tmp_path / "encoder.pkl", evil(mark)[way], new=new)

    with pytest.raises(PmdError) as caught:
        read_pickle(path)

    assert "is refused: it asks for " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


class _Asks(pickle.Pickler):
    def persistent_id(self, thing):
        return thing if isinstance(thing, tuple) and thing[:1] == ("storage",) else None


@pytest.mark.parametrize(
    "pid",
    [("storage", os.system, "0", "cpu", 1), ("storage", "FloatStorage", "0", "cpu", 1)],
    ids=["a function", "a word"],
)
def test_a_persistent_id_of_another_kind_is_refused(tmp_path, pid):
    content = BytesIO()
    _Asks(content, protocol=2).dump({"weight": pid})
    with zipfile.ZipFile(tmp_path / "encoder.pkl", "w") as archive:
        archive.writestr("archive/data.pkl", content.getvalue())

    with pytest.raises(PmdError, match="is refused: it asks for"):
        read_pickle(str(tmp_path / "encoder.pkl"))


def lying_tensor(shape, strides, offset=0, count=4):
    """A zip whose tensor says of itself what is not true."""

    class Tensor:
        def __reduce__(self):
            storage = ("storage", torch.FloatStorage, "0", "cpu", count)
            return torch._utils._rebuild_tensor_v2, (storage, offset, shape, strides, False, None)

    content = BytesIO()
    _Asks(content, protocol=2).dump({"weight": Tensor()})
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", content.getvalue())
        archive.writestr("archive/data/0", np.arange(4, dtype="<f4").tobytes())
    return out.getvalue()


def locked(content):
    """The zip with every member marked as encrypted."""
    changed = bytearray(content)
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := changed.find(mark, place + 1)) >= 0:
            changed[place + flags] |= 1
    return bytes(changed)


def bomb(many):
    """A row of pickles that asks for room for `many` numbered things."""
    head = b"".join(pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {}))
    return head + b"\x80\x02}r" + struct.pack("<I", many) + b"."


@pytest.mark.timeout(20)
def test_a_pickle_that_would_allocate_billions_of_entries_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(bomb(3_000_000_000))

    with pytest.raises(PmdError, match="it numbers more objects than it has bytes for"):
        read_pickle(str(tmp_path / "a.pkl"))


@pytest.mark.timeout(20)
def test_a_shared_object_is_visited_once(tmp_path):
    nested = {"weight": torch.ones(2)}
    for _ in range(15):
        nested = dict.fromkeys("abcdefghij", nested)
    path = write(tmp_path / "a.pkl", nested, new=True)

    assert [array.tolist() for array in read_pickle(path).values()] == [[1, 1]]


def test_a_tensor_of_a_pickle_has_the_right_numbers(tmp_path):
    (tmp_path / "a.pkl").write_bytes(lying_tensor((2, 2), (1, 2)))

    assert read_pickle(str(tmp_path / "a.pkl"))["weight"].tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 not a zip",
        b"\x80\x02]q\x00.",
        pickle.dumps({"weight": 1})[:-4],
        lying_tensor((5,), (1,)),
        lying_tensor((2,), (1,), offset=3),
        lying_tensor((4, 4), (1, 0)),
        lying_tensor((1 << 40,), (0,)),
        lying_tensor((-1,), (1,)),
        lying_tensor((2,), (-1,), offset=1),
        lying_tensor((2, 2), (1,)),
        lying_tensor(("a",), (1,)),
        lying_tensor((2,), (1,), count=9),
        locked(lying_tensor((2,), (1,))),
    ],
    ids=range(14),  # the content of a zip has the time in it
)
def test_an_incomplete_pickle_is_one_sentence(tmp_path, content):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(content)

    with pytest.raises(PmdError, match="is not a pickle that PyTorch writes"):
        read_pickle(str(path))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_every_cut_of_a_pickle_is_one_sentence(openai, tmp_path, new):
    whole = (tmp_path / "w.pkl", write(tmp_path / "w.pkl", openai[1], new=new))[0].read_bytes()
    cut = tmp_path / "cut.pkl"
    for length in np.linspace(0, len(whole) - 1, 50, dtype=int).tolist():
        cut.write_bytes(whole[:length])

        with pytest.raises(PmdError):
            read_pickle(str(cut))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_changed_bytes_is_read_or_one_sentence(tmp_path, new):
    path = tmp_path / "w.pkl"
    content = Path(write(path, codebook().state_dict(), new=new)).read_bytes()
    for seed in range(150):
        generator, changed = random.Random(seed), bytearray(content)
        for _ in range(3):
            changed[generator.randrange(min(len(changed), 4000))] = generator.randrange(256)
        path.write_bytes(changed)

        with suppress(PmdError):
            read_pickle(str(path))


def test_weights_have_the_sha256_of_our_file_wherever_they_come_from(tmp_path):
    model = codebook()
    model.save_pretrained(tmp_path / "hub")
    hub, ours = find_weights(str(tmp_path / "hub"), None), tmp_path / "dvae.safetensors"

    convert_weights(hub, str(ours))
    first, second = open_tokenizer("dalle", hub), open_tokenizer("dalle", str(ours))

    sha256 = hashlib.sha256(ours.read_bytes()).hexdigest()
    assert first.weights_sha256 == second.weights_sha256 == sha256
    assert (first.patch_size, first.vocabulary) == (8, 40)


def test_the_codebook_inside_a_whole_model_is_found(tmp_path):
    state = {f"image_codebook.{n}": t for n, t in codebook().state_dict().items()}
    save_file({**state, "flava.cls": torch.zeros(3)}, tmp_path / "model.safetensors")

    opened = open_tokenizer("dalle", find_weights(str(tmp_path), None))

    assert opened.weights_sha256 == dalle_weights(arrays(codebook()), "").sha256


def changed(name, change):
    state = arrays(codebook())
    change(state, name)
    return state


@pytest.mark.parametrize(
    "change",
    [
        lambda state, name: state.pop(name),
        lambda state, name: state.update({name: state[name][..., :1]}),
        lambda state, name: state.update({name + "x": state[name]}),
    ],
    ids=["missing", "shape", "unknown"],
)
def test_weights_of_another_network_are_refused_by_the_name_of_a_tensor(change):
    name = "blocks.group_2.group.block_1.res_path.path.conv_2.weight"

    with pytest.raises(PmdError, match=r"w\.st does not .*: blocks\.group_2\.block_1\.res_path"):
        dalle_weights(changed(name, change), "w.st")


def test_weights_that_are_not_finite_are_refused():
    state = changed("blocks.input.bias", lambda state, name: state[name].fill(np.nan))

    with pytest.raises(PmdError, match=r"blocks\.input\.bias has values"):
        dalle_weights(state, "w.st")


@pytest.mark.parametrize(
    ("name", "revision", "words"),
    [
        ("nowhere.safetensors", None, "there is no such file or folder"),
        ("facebook/flava-image-codebook", None, "also give --revision"),
        ("facebook/flava-image-codebook", "main", "also give --revision"),
    ],
)
def test_missing_weights_are_one_sentence(name, revision, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PmdError, match=words):
        find_weights(name, revision)


def test_an_unreachable_hub_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(PmdError, match="cannot be had from the hub"):
        find_weights("facebook/flava-image-codebook", "0" * 40)


@pytest.mark.parametrize("name", ["encoder.pkl", "pytorch_model.bin"])
def test_a_pickle_must_be_converted_first(name):
    with pytest.raises(PmdError, match="pmd codes convert"):
        read_tensors(name)


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{}"])
def test_a_file_that_is_not_safetensors_is_one_sentence(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)

    with pytest.raises(PmdError):
        open_tokenizer("dalle", str(tmp_path / "w.safetensors"))


def test_without_torch_the_error_names_what_to_install(monkeypatch):
    weights = dalle_weights(arrays(codebook()), "")
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "pmd_pipeline.codes.dvae", raising=False)

    with pytest.raises(PmdError, match=r"pip install 'pmd-flava\[train\]'"):
        dalle_tokenizer(weights)


def test_an_unknown_tokenizer_is_one_sentence_with_a_suggestion():
    with pytest.raises(PmdError, match=r"--tokenizer dale: .* did you mean 'dalle'"):
        open_tokenizer("dale", None)


@pytest.mark.parametrize("name", tokenizer_names())
def test_every_tokenizer_of_the_package_refuses_to_open_without_weights(name):
    with pytest.raises(PmdError, match="--weights"):
        open_tokenizer(name, None)


@pytest.mark.parametrize(
    "changes", [{"vocabulary": 0}, {"vocabulary": 65_537}, {"patch_size": 0}, {"batch": 0}]
)
def test_a_tokenizer_that_cannot_be_is_refused(changes):
    with pytest.raises(ValueError, match=r"at least 1|1 to 65,536"):
        Tokenizer(**{"patch_size": 8, "vocabulary": 2, "codes": len} | changes)


RULES = {"tokenizer": "kmeans", "sha256": "0" * 64, "vocabulary": 16, "size": 16, "grid": 2}


def test_rules_without_a_source_file_have_the_json_and_digest_of_older_ones():
    stored = {**RULES, "views": 1, "seed": 0, "dtype": "float32"}

    assert CodeRules(**RULES).model_dump(mode="json") == stored
    assert list(CodeRules(**RULES).model_dump()) == list(stored)
    with_source = CodeRules(**RULES, source_sha256="1" * 64)
    assert CodeRules.model_validate_json(with_source.model_dump_json()) == with_source


@pytest.mark.parametrize("name", ["", "Dalle", "a/b", "../x", "a:b:c", "a.b", "a b", ":f", "m:"])
def test_a_stored_name_that_is_no_tokenizer_is_refused(name):
    with pytest.raises(ValidationError, match="no name of an image tokenizer"):
        CodeRules(**RULES | {"tokenizer": name})
