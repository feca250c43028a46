"""Small runs: a dataset of three streams, a FLAVA that fits on a page, and what a run said."""

import json
import subprocess
import sys
from pathlib import Path

import tiny_datasets

from flava_train.config import as_toml, validate_config

TOWER = {"layers": 2, "width": 32, "heads": 4, "hidden": 48}


def write_world(folder):
    """A vocabulary, and manifests of pairs, images, texts and held-out pairs."""
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


def told(world, out, changes=None):
    """The configuration of a small run; `changes` are by dotted key."""
    content = {
        "steps": 8,
        "batch": 8,
        "micro_batch_size": 4,
        "out": str(out),
        "data": {
            "pairs": str(world / "pairs.json"),
            "images": str(world / "images.json"),
            "texts": [str(world / "texts.json")],
            "tokenizer": str(world / "vocab.txt"),
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


def said(run):
    """What every step of a run found, without what a clock said."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if name not in {"pairs_per_second", "data_wait_seconds"}
        }
        for line in lines
    ]


def losses(run):
    """The losses of every step of a run."""
    return [line["losses"] for line in said(run) if "step" in line]


def command(config, *words):
    """The words of a process that trains."""
    path = Path(f"{config.out}.toml")
    path.write_text(as_toml(config), encoding="utf-8")
    trainer = [sys.executable, "-m", "flava_train.cli", "--quiet", "--config", path]
    return [str(word) for word in (*trainer, *words)]


def run(config, *words, **options):
    """A process that trains, to its end."""
    return subprocess.run(
        command(config, *words), check=False, capture_output=True, text=True, **options
    )
