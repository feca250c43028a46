"""Compare a build on Ray with a build in local processes, for parts of ten seconds and more.

Builds the same parts from pictures in a folder with both pools, in random order, and prints the
ratio of their times, and the time of starting the pools. Every part is the same work.

    python benchmarks/pools.py --parts 4 --records 2000 --repeats 2
"""

import argparse
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from pmd_pipeline.base.parallel import ignore_progress, open_pool
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.dataset.build import build_source
from pmd_pipeline.dataset.source_build import SourceBuild
from pmd_pipeline.recipe import load_recipe


def write_input(folder: Path, records: int) -> None:
    """Rows of `records` addresses, and a picture of 1024 x 768 behind each."""
    (folder / "raw").mkdir()
    lines = [f"a picture of number {n}\thttp://a.test/{n}.jpg\n" for n in range(records)]
    (folder / "raw" / "GCC-training.tsv").write_text("".join(lines))
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((1024, 768), Image.Resampling.BICUBIC)
        picture.save(folder / "pictures" / f"{number}.jpg", quality=90)
    for number in range(20, records):
        os.link(folder / "pictures" / f"{number % 20}.jpg", folder / "pictures" / f"{number}.jpg")


def start_worker(task: int, _report_progress: object) -> int:
    """A task that makes the pool start a worker."""
    return task


def build_seconds(
    folder: Path, runner: str, workers: int, parts: int, records: int
) -> tuple[float, float]:
    """Seconds of the build, and of starting the pool."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    recipe = load_recipe("cc3m", {"part_records": records // parts})[0]
    source_build = SourceBuild(
        recipe=recipe,
        raw=str(folder / "raw"),
        data=str(folder / "data"),
        manifest=str(folder / "data" / "cc3m.json"),
        images=(str(folder / "pictures"),),
    )
    quiet = Reporter(Console(quiet=True), quiet=True)
    started = time.monotonic()
    with open_pool(runner, workers, None) as pool:
        list(pool.run(start_worker, range(4 * workers), ignore_progress))
        ready = time.monotonic()
        build_source(source_build, pool, quiet)
        return time.monotonic() - ready, ready - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--records", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    starts: dict[str, list[float]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        write_input(Path(folder), options.records)
        for _ in range(options.repeats):
            for runner in random.sample(["local", "ray"], 2):
                elapsed, start = build_seconds(
                    Path(folder), runner, options.workers, options.parts, options.records
                )
                seconds[runner].append(elapsed)
                starts[runner].append(start)
                print(f"  {runner:5}: {elapsed:6.2f} s, start-up {start:.1f} s")
    local, ray = (statistics.median(seconds[runner]) for runner in ("local", "ray"))
    part_seconds = local * options.workers / options.parts
    print(f"a part takes {part_seconds:.1f} s; Ray / local = {ray / local:.3f} without start-up")


if __name__ == "__main__":
    main()
