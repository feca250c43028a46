"""Train on real photographs, from the files as given to recall on those that were held out.

    python benchmarks/photos.py ../shared/samples/photos

The folder has `photos.zip`, and `captions_train.json` and `captions_heldout.json` in COCO's form.
The commands are those of a user: `pmd build`, `pmd codes`, `pmd tokenizer`, `flava-train`. Printed
are the losses of the first and the last tenth of the steps, and recall beside what guessing gives.
A thousand photographs teach little: nothing is asserted but that losses fall.
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
"""Laid over flava_tiny: pairs alone, since these photographs come with nothing else."""


def main() -> None:
    """Build, train and evaluate in a folder, which is kept if it was named."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("photos", type=Path)
    words.add_argument("--steps", type=int, default=400)
    words.add_argument("--out", type=Path, help="go on in this folder")
    options = words.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    if options.out:
        run(options.photos, options.out, options.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(options.photos, Path(folder), options.steps)


def run(photos: Path, out: Path, steps: int) -> None:
    """From photographs to recall."""
    began = time.monotonic()
    manifests = {part: build(photos, out, part) for part in ("train", "heldout")}
    grid = ["--grid", "4", "--vocabulary", "256", "--runner", "local"]
    command("pmd_pipeline.cli", "codes", "make", manifests["train"], *grid)
    vocabulary = out / "vocab.txt"
    size = ["--size", "3000", "--out", vocabulary]
    command("pmd_pipeline.cli", "tokenizer", manifests["train"], *size)
    print(f"built in {time.monotonic() - began:.0f} s")
    settings = {
        **CHANGES,
        "steps": steps,
        "data.tokenizer": vocabulary,
        "evaluation.retrieval": manifests["heldout"],
    }
    said = [f"--set={key}={value}" for key, value in settings.items()]
    began = time.monotonic()
    trained = ["--config", "flava_tiny", "--shards", manifests["train"], "--out", out / "run"]
    command("flava_train.cli", *trained, *said)
    print(f"{steps} steps in {time.monotonic() - began:.0f} s")
    report(out / "run" / "metrics.jsonl")


def build(photos: Path, out: Path, part: str) -> Path:
    """The manifest of the photographs of one part."""
    raw = out / part / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    shutil.copy(photos / f"captions_{part}.json", raw / "captions_train2017.json")
    places = ["--raw", raw, "--out", out / part / "data", "--manifests", out / part]
    images = ["--images", photos / "photos.zip", "--runner", "local"]
    command("pmd_pipeline.cli", "build", "--source", "coco", *places, *images)
    return out / part / "coco.json"


def report(metrics: Path) -> None:
    """Print losses, first and last, and recall beside chance; fail where a loss has not fallen."""
    losses, found = defaultdict(list), {}
    for line in metrics.read_text().splitlines():
        figures = json.loads(line)
        for name, loss in figures.get("losses", {}).items():
            losses[name].append(loss)
        if "after" in figures:
            found = figures
    for name, values in losses.items():
        tenth = max(1, len(values) // 10)
        first, last = statistics.mean(values[:tenth]), statistics.mean(values[-tenth:])
        print(f"  {name:<14}{first:8.4f} -> {last:8.4f}")
        if last >= first:
            sys.exit(f"the loss {name} has not fallen")
    for name, chance in found["chance"].items():
        print(f"  {name:<20}{found[name]:7.2%}   chance {chance:7.2%}")


def command(module: str, *arguments: object) -> None:
    """Run one of our commands, to its end."""
    subprocess.run([sys.executable, "-m", module, *map(str, arguments), "--quiet"], check=True)


if __name__ == "__main__":
    main()
