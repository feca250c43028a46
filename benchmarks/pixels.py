"""Images per CPU-second of our decoder and of img2dataset's Resizer, and their PSNR.

Both process the same photographs alternately, each on one core. CPU time is measured, since the
machine may be shared; only the ratio is comparable between machines. PSNR is that of the stored
JPEG against a Lanczos resize of the full decode. Needs `make bench-env` for img2dataset.

    python benchmarks/pixels.py --photographs ../shared/samples/coco/mini/train2017
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from pmd_pipeline.images.decode.decoder import open_image
from pmd_pipeline.images.decode.stored_image import make_stored_image
from pmd_pipeline.recipe import Images
from pmd_pipeline.shards.report import versions

HERE = Path(__file__).parent
IMG2DATASET_PYTHON = HERE.parent / ".bench-venv" / "bin" / "python"
PHOTOGRAPHS = HERE.parents[1] / "shared" / "samples" / "coco" / "mini" / "train2017"
LARGE = (2450, 1800)
ENLARGED = {"to 1024 x 768": (1024, 768), "to 2450 x 1800": LARGE}


class Img2datasetResizer:
    """img2dataset's Resizer in its own environment."""

    def __init__(self) -> None:
        self._worker = subprocess.Popen(
            [IMG2DATASET_PYTHON, HERE / "resizer_worker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                "NO_ALBUMENTATIONS_UPDATE": "1",
            },
        )
        self._read_line()

    def seconds(self, folder: Path, size: int) -> float:
        """Resize all photographs of `folder` into files beside them; CPU seconds."""
        assert self._worker.stdin
        self._worker.stdin.write(json.dumps({"size": size, "folder": str(folder)}) + "\n")
        self._worker.stdin.flush()
        return float(json.loads(self._read_line())["seconds"])

    def close(self) -> None:
        """Stop the worker."""
        assert self._worker.stdin
        self._worker.stdin.close()
        self._worker.wait()

    def _read_line(self) -> str:
        assert self._worker.stdout
        line = self._worker.stdout.readline()
        if not line:
            sys.exit("img2dataset's worker has failed; see its output above")
        return line


def our_seconds(folder: Path, rules: Images, name: str) -> float:
    """Resize all photographs of `folder` into files beside them; CPU seconds."""
    bodies = {path: path.read_bytes() for path in sorted(folder.glob("*.jpg"))}
    started = time.process_time()
    made = {
        path: make_stored_image(body, open_image(body, rules), rules)
        for path, body in bodies.items()
    }
    seconds = time.process_time() - started
    for path, one in made.items():
        path.with_suffix(f".{name}").write_bytes(one.content)
    return seconds


def psnr(folder: Path, name: str) -> float:
    """Mean PSNR in dB of the files with extension `name`, over images that were downsampled."""
    values = []
    for path in sorted(folder.glob("*.jpg")):
        made = Image.open(path.with_suffix(f".{name}")).convert("RGB")
        whole = Image.open(path).convert("RGB")
        if made.size == whole.size:
            continue
        reference = np.asarray(whole.resize(made.size, Image.Resampling.LANCZOS), dtype=float)
        values.append(10 * np.log10(255**2 / np.mean((np.asarray(made) - reference) ** 2)))
    return float(np.mean(values)) if values else float("nan")


def write_photographs(source: Path, folder: Path, kind: str, num: int) -> None:
    """Write `num` photographs: unchanged, enlarged, or as sharp collages of 16."""
    folder.mkdir()
    paths = sorted(source.glob("*.jpg"))
    if kind == "as they are":
        for path in paths[:num]:
            (folder / path.name).write_bytes(path.read_bytes())
        return
    for number in range(num):
        whole = Image.new("RGB", LARGE)
        if kind in ENLARGED:
            photograph = Image.open(paths[number]).convert("RGB")
            whole = photograph.resize(ENLARGED[kind], Image.Resampling.LANCZOS)
        else:
            for position in range(16):
                tile = Image.open(paths[(16 * number + position) % len(paths)])
                whole.paste(tile, (position % 4 * 613, position // 4 * 450))
        out = BytesIO()
        whole.save(out, "JPEG", quality=90)
        (folder / f"{number}.jpg").write_bytes(out.getvalue())


def compare(folder: Path, size: int, img2dataset: Img2datasetResizer | None, rounds: int) -> str:
    """One line with the rate and the PSNR of each decoder at this size."""
    rules = {"ours": Images(size=size), "fast": Images(size=size, fast=True)}
    seconds: dict[str, list[float]] = {"ours": [], "fast": [], "theirs": []}
    for round_ in range(rounds + 1):
        taken = {name: our_seconds(folder, rule, name) for name, rule in rules.items()}
        if img2dataset:
            taken["theirs"] = img2dataset.seconds(folder, size)
        if round_:  # the first is a warm-up
            for name, one in taken.items():
                seconds[name].append(one)
    num = len(list(folder.glob("*.jpg")))
    parts = []
    for name, rows in seconds.items():
        if not rows:
            continue
        part = f"{name} {num / statistics.median(rows):5.0f}/s {psnr(folder, name):5.2f} dB"
        if img2dataset and name != "theirs":
            ratios = [a / b for a, b in zip(seconds["theirs"], rows, strict=True)]
            part += f" {statistics.median(ratios):.2f}x"
        parts.append(part)
    return " | ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, default=PHOTOGRAPHS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 256, 384, 512])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not any(options.photographs.glob("*.jpg")):
        parser.error(f"{options.photographs}: there are no JPEGs; give a folder with --photographs")
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions()}")
    img2dataset = Img2datasetResizer() if IMG2DATASET_PYTHON.exists() else None
    if img2dataset is None:
        print("img2dataset is not installed (run `make bench-env`): only our decoder is measured")
    with tempfile.TemporaryDirectory() as temporary:
        kinds = {"as they are": 40, "to 1024 x 768": 20, "to 2450 x 1800": 6, "large and sharp": 5}
        for kind, num in kinds.items():
            folder = Path(temporary) / kind
            write_photographs(options.photographs, folder, kind, num)
            for size in options.sizes:
                line = compare(folder, size, img2dataset, options.rounds)
                print(f"{kind:15} {size:4}: {line}", flush=True)
    if img2dataset:
        img2dataset.close()


if __name__ == "__main__":
    main()
