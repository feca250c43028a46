"""Small runs: data of three streams, the configuration of a small FLAVA, and logged metrics."""

import json
import subprocess
import sys
from pathlib import Path

import tiny_datasets

from flava_train.config import as_toml, validate_config

TOWER = {"layers": 2, "width": 32, "heads": 4, "hidden": 48}


def write_datasets(folder):
    """Write a vocabulary, and manifests of pairs, images, texts and held-out pairs."""
    tiny_datasets.write_vocabulary(folder / "vocab.txt")
    shards = [tiny_datasets.samples(16, captions=2, start=start) for start in (0, 16)]
    tiny_datasets.write_pairs(folder / "pairs.json", shards)
    images = [tiny_datasets.sample(number, []) for number in range(200, 230)]
    tiny_datasets.write_pairs(folder / "images.json", [images], kind="images")
    texts = [f"a dog {number} b cat\n\nsep {number}" for number in range(30)]
    tiny_datasets.write_texts(folder / "texts.json", [texts])
    held_out = tiny_datasets.samples(12, captions=2, start=100)
    tiny_datasets.write_pairs(folder / "held-out.json", [held_out], rules=None)
    return folder


def small_config(datasets, out, changes=None):
    """The configuration of a small run; `changes` are by dotted key."""
    content = {
        "steps": 8,
        "batch": 8,
        "micro_batch_size": 4,
        "out": str(out),
        "data": {
            "pairs": str(datasets / "pairs.json"),
            "images": str(datasets / "images.json"),
            "texts": [str(datasets / "texts.json")],
            "tokenizer": str(datasets / "vocab.txt"),
            "caption_tokens": 16,
            "text_tokens": 20,
            "workers": 0,
        },
        "model": {
            "image": TOWER,
            "text": TOWER,
            "multimodal": TOWER | {"layers": 1},
            "image_size": 32,
            "patch_size": 8,
            "text_positions": 20,
            "projection_dim": 24,
        },
        "objective": {
            "unimodal_init": False,
            "streams": {"pairs": 0.6, "images": 0.2, "texts": 0.2},
        },
        "optimizer": {"warmup": 2},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
        "checkpoint": {"every": 3},
    }
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        inner = content
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return validate_config(content, source="a test")


def logged_steps(run):
    """The metrics of every step and evaluation of a run, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if name not in {"pairs_per_second", "data_wait_seconds"}
        }
        for line in lines
    ]


def logged_losses(run):
    """The losses of every step of a run."""
    return [line["losses"] for line in logged_steps(run) if "step" in line]


def train_command(config, *options):
    """The command line that trains with a configuration."""
    path = Path(f"{config.out}.toml")
    path.write_text(as_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "flava_train.cli", "--quiet", "--config", path]
    return [str(word) for word in (*command, *options)]


def run_train(config, *options, **more):
    """Run this command line to its end."""
    return subprocess.run(
        train_command(config, *options), check=False, capture_output=True, text=True, **more
    )
