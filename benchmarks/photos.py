"""Train on real photographs, and measure retrieval recall on held-out ones.

    python benchmarks/photos.py ../shared/samples/photos

The folder has `photos.zip`, and `captions_train.json` and `captions_heldout.json` in COCO's format.
The script runs `pmd build`, `pmd codes`, `pmd tokenizer` and `flava-train`. It prints the losses of
the first and the last tenth of the steps, and recall beside that of random guessing. A thousand
photographs are too few for good recall, so it fails only if a loss has not fallen.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

CHANGES = {
    "data.caption_tokens": 40,
    "data.renormalise": "true",
    "objective.streams.images": 0.0,
    "objective.streams.texts": 0.0,
    "evaluation.every": 0,
}
"""Changes to flava_tiny: pairs only, since there are no other images or texts."""


def main() -> None:
    """Build, train and evaluate in a folder, which is kept if --out is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, help="keep the results in this folder")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    if options.out:
        run(options.photos, options.out, options.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(options.photos, Path(folder), options.steps)


def run(photos: Path, out: Path, steps: int) -> None:
    """Build, train, and report."""
    started = time.monotonic()
    manifests = {split: build(photos, out, split) for split in ("train", "heldout")}
    grid = ["--grid", "4", "--vocabulary", "256", "--runner", "local"]
    command("pmd_pipeline.cli", "codes", "make", manifests["train"], *grid)
    vocabulary = out / "vocab.txt"
    size = ["--size", "3000", "--out", vocabulary]
    command("pmd_pipeline.cli", "tokenizer", manifests["train"], *size)
    print(f"built in {time.monotonic() - started:.0f} s")
    settings = {
        **CHANGES,
        "steps": steps,
        "data.tokenizer": vocabulary,
        "evaluation.retrieval": manifests["heldout"],
    }
    changes = [f"--set={key}={value}" for key, value in settings.items()]
    started = time.monotonic()
    arguments = ["--config", "flava_tiny", "--shards", manifests["train"], "--out", out / "run"]
    command("flava_train.cli", *arguments, *changes)
    print(f"{steps} steps in {time.monotonic() - started:.0f} s")
    report(out / "run" / "metrics.jsonl")


def build(photos: Path, out: Path, split: str) -> Path:
    """The manifest of the photographs of one split."""
    raw = out / split / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    shutil.copy(photos / f"captions_{split}.json", raw / "captions_train2017.json")
    folders = ["--raw", raw, "--out", out / split / "data", "--manifests", out / split]
    images = ["--images", photos / "photos.zip", "--runner", "local"]
    command("pmd_pipeline.cli", "build", "--source", "coco", *folders, *images)
    return out / split / "coco.json"


def report(metrics: Path) -> None:
    """Print first and last losses, and recall beside chance; fail if a loss has not fallen."""
    losses, evaluation = defaultdict(list), {}
    for line in metrics.read_text().splitlines():
        metrics_row = json.loads(line)
        for name, loss in metrics_row.get("losses", {}).items():
            losses[name].append(loss)
        if "after" in metrics_row:
            evaluation = metrics_row
    for name, values in losses.items():
        tenth = max(1, len(values) // 10)
        first, last = statistics.mean(values[:tenth]), statistics.mean(values[-tenth:])
        print(f"  {name:<14}{first:8.4f} -> {last:8.4f}")
        if last >= first:
            sys.exit(f"the loss {name} has not fallen")
    for name, chance in evaluation["chance"].items():
        print(f"  {name:<20}{evaluation[name]:7.2%}   chance {chance:7.2%}")


def command(module: str, *arguments: object) -> None:
    """Run one command of this project and wait for it."""
    subprocess.run([sys.executable, "-m", module, *map(str, arguments), "--quiet"], check=True)


if __name__ == "__main__":
    main()
