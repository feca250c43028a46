"""The command `pmd codes`: its output, its help and its errors."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_shards import HandmadeRecord, tiles, write_manifest, write_shard

from pmd_pipeline import cli
from pmd_pipeline.cli.codes import codes
from pmd_pipeline.codes.tokenizers.dalle import tensor_shapes
from pmd_pipeline.codes.weights import tensor_bytes
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.contract.models import CodesReport

COMMANDS = ["", *(command.callback.__name__ for command in codes.registered_commands)]
HERE = ["--runner", "local", "--workers", "1"]


@pytest.fixture
def pmd(monkeypatch, capsys, tmp_path):
    """Runs `pmd codes`; its exit code, and what it printed on stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pmd", "codes", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        printed = capsys.readouterr()
        return left.value.code, printed.out, printed.err

    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def manifest(tmp_path):
    """A manifest of two shards of pictures."""
    random = np.random.default_rng(0)
    shards = [
        write_shard(
            tmp_path / "data",
            "toy",
            part,
            [
                HandmadeRecord(f"{part * 100 + n:016x}", tiles(random.integers(0, 256, (3, 3, 3))))
                for n in range(8)
            ],
        )
        for part in (0, 1)
    ]
    return write_manifest(tmp_path / "manifests" / "toy.json", shards)


@pytest.fixture
def encoder(tmp_path):
    """Random weights of a small encoder, as a pickled mapping."""
    torch.manual_seed(0)
    start = {
        "blocks.input.weight": np.empty((8, 1)),
        "blocks.output.conv.weight": np.empty((50, 1)),
        **{f"blocks.group_1.block_{n}.res_path.conv_1.weight": np.empty((2, 1)) for n in (1, 2)},
    }
    state = {
        name: torch.randn(shape) * (1.5 * np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1)
        for name, shape in tensor_shapes(start)
    }
    torch.save(state, tmp_path / "encoder.pkl")
    return tmp_path / "encoder.pkl"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_sentence_and_one_example(command, pmd):
    code, out, err = pmd(*command.split(), "--help")

    assert (code, err) == (0, "")
    usage, sentence, example, *_ = (" ".join(block.split()) for block in out.split("\n\n"))
    assert usage.startswith("Usage: pmd codes")
    assert re.fullmatch(r"[A-Z][^.]*\.", sentence)
    assert example.startswith(f"Example: pmd codes {command}".rstrip())


@pytest.mark.parametrize("arguments", [["codes", "--help"], ["codes", "make", "--help"]])
def test_help_loads_neither_torch_nor_numpy(arguments):
    code = (
        "import sys; sys.argv = ['pmd', *sys.argv[1:]]\n"
        "from pmd_pipeline.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'ray', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )

    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True
    )

    assert found.stderr.strip() == "set()"


def test_codes_by_kmeans_are_reported_as_a_stand_in(pmd, manifest):
    code, out, err = pmd(manifest, *HERE, "--vocabulary", 12, "--grid", 3)

    made = load_manifest(manifest)
    assert (code, out) == (0, f"{manifest}  {made.digest}\n")
    assert "3 x 3 of 12 codes by kmeans, from " in err
    assert "toy.kmeans.safetensors" in err
    assert "k-means is a stand-in" in err
    assert "16 of 16 images" in err
    assert made.codes.tokenizer == "kmeans"


def test_make_is_optional(pmd, manifest):
    options = [*HERE, "--vocabulary", 12, "--grid", 3, "--quiet"]

    assert pmd("make", manifest, *options) == pmd(*options, manifest)


def test_a_pickle_is_converted_and_then_makes_codes(pmd, manifest, encoder):
    code, out, err = pmd("convert", encoder, "dvae.safetensors")
    sha256 = hashlib.sha256(Path("dvae.safetensors").read_bytes()).hexdigest()
    assert (code, out, err) == (0, f"dvae.safetensors  {sha256}\n", "")

    code, out, err = pmd(
        *(manifest, "--weights", "dvae.safetensors", "--grid", 2, "--views", 2),
        *("--dtype", "bfloat16", *HERE),
    )

    made = load_manifest(manifest)
    assert (code, out) == (0, f"{manifest}  {made.digest}\n")
    assert (made.codes.tokenizer, made.codes.sha256) == ("dalle", sha256)
    assert (made.codes.dtype, made.codes.vocabulary) == ("bfloat16", 50)
    assert "of the codes of a sample are the same in float32" in err
    assert "stand-in" not in err
    report = CodesReport.model_validate_json(Path("data/00000.codes.json").read_text())
    assert 0.5 < report.agreement <= 1
    assert report.versions["torch"] == torch.__version__
    assert report.versions["device"] == "cpu"


def test_codes_in_float32_report_no_agreement(pmd, manifest, encoder):
    pmd("convert", encoder, "dvae.safetensors")

    code, _, err = pmd(manifest, "--weights", "dvae.safetensors", "--grid", 2, *HERE)

    assert code == 0
    assert "float32" not in err
    report = CodesReport.model_validate_json(Path("data/00000.codes.json").read_text())
    assert report.agreement is None


def test_a_second_conversion_gives_the_same_file(pmd, encoder):
    first = pmd("convert", encoder, "a.safetensors")[1].split()[1]

    assert pmd("convert", "a.safetensors", "b.safetensors")[1].split()[1] == first
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


class Call:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_one_sentence(pmd, tmp_path, new):
    torch.save({"w": Call(tmp_path / "mark")}, "evil.pkl", _use_new_zipfile_serialization=new)

    code, out, err = pmd("convert", "evil.pkl", "dvae.safetensors")

    assert (code, out) == (2, "")
    assert err == (
        "pmd: evil.pkl is refused: it asks for posix.system, which an image tokenizer does not "
        "need; nothing in it was executed\n"
    )
    assert not (tmp_path / "mark").exists()
    assert not Path("dvae.safetensors").exists()


def kmeans_file():
    Path("k.safetensors").write_bytes(
        tensor_bytes({"centroids": np.zeros((2, 8, 8, 3), np.uint8)}, {})
    )


MISTAKES = {
    "no manifest": (["none.json"], ["none.json", "no such file"]),
    "a tar": (["data/00000.tar"], ["data/00000.tar", "no manifest"]),
    "no weights there": (["M", "--weights", "none.st"], ["none.st", "no such file or folder"]),
    "a pickle": (["M", "--weights", "encoder.pkl"], ["pmd codes convert encoder.pkl"]),
    "a hub id alone": (["M", "--weights", "facebook/flava-image-codebook"], ["--revision"]),
    "dalle without weights": (["M", "--tokenizer", "dalle"], ["--weights"]),
    "dalle of k-means": (
        ["M", "--tokenizer", "dalle", "--weights", "k.safetensors"],
        ["k.safetensors", "weights of kmeans, not dalle"],
    ),
    "a dtype of k-means": (["M", "--dtype", "float16", "--vocabulary", "8"], ["--dtype"]),
    "too many codes": (["M", "--vocabulary", "9000"], ["give a smaller --vocabulary"]),
    "an export of nothing": (["export", "M", "--out", "x"], ["has no image codes", "pmd codes M"]),
    "a conversion of k-means": (
        ["convert", "k.safetensors", "x.safetensors"],
        ["need no conversion"],
    ),
    "a conversion onto itself": (
        ["convert", "encoder.pkl", "encoder.pkl"],
        ["end the name in .safetensors"],
    ),
    "a conversion of nothing": (
        ["convert", "none.pkl", "x.safetensors"],
        ["none.pkl", "no such file"],
    ),
    "a conversion of a manifest": (
        ["convert", "M", "x.safetensors"],
        ["not a pickle that PyTorch writes"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_with_a_remedy(pmd, manifest, encoder, mistake):
    arguments, words = MISTAKES[mistake]
    kmeans_file()
    local = [] if arguments[0] == "convert" else HERE

    code, out, err = pmd(*[manifest if one == "M" else one for one in arguments], *local)

    assert (code, out) == (2, "")
    *_, last = err.splitlines()
    assert last.startswith("pmd: ")
    for word in words:
        assert word.replace(" M", f" {manifest}") in last
    assert not list(Path().rglob("*.codes.*"))
    assert not Path("x").exists()


def test_a_missing_cuda_device_is_one_sentence(pmd, manifest, encoder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pmd("convert", encoder, "dvae.safetensors")

    code, _, err = pmd(manifest, "--weights", "dvae.safetensors", "--device", "cuda", *HERE)

    assert code == 2
    assert "there is no CUDA device here" in err


def test_the_same_tokenizer_may_code_another_dataset(pmd, manifest, tmp_path):
    pmd(manifest, *HERE, "--vocabulary", 12, "--grid", 3)
    first = load_manifest(manifest).codes
    image = tiles(np.random.default_rng(9).integers(0, 256, (3, 3, 3)))
    shard = write_shard(tmp_path / "held", "toy", 0, [HandmadeRecord("1" * 16, image)])
    other = write_manifest(tmp_path / "manifests" / "held.json", [shard])

    code, _, _ = pmd(other, *HERE, "--weights", "manifests/toy.kmeans.safetensors", "--grid", 3)

    assert code == 0
    assert load_manifest(other).codes == first
