"""Rows per second and peak memory of indexing YFCC100M.

Writes files of synthetic rows (see yfcc_rows.py), indexes each with the default recipe, and prints
rows per second and the peak memory of all processes; memory must not grow with the rows.

    python benchmarks/index.py --rows 500000 2000000 --workers 2 --runner local
"""

import argparse
import os
import platform
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

import psutil
from yfcc_rows import write_rows

from pmd_pipeline.base.parallel import ignore_progress, open_pool
from pmd_pipeline.index.build import build_index
from pmd_pipeline.recipe import load_recipe
from pmd_pipeline.sources import find_annotations


class Memory:
    """Peak memory of this process and its children together, sampled."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        driver = psutil.Process()
        while not self._stop.wait(0.1):
            num_bytes = 0
            for process in [driver, *driver.children(recursive=True)]:
                try:
                    num_bytes += process.memory_full_info().pss  # shared pages are counted once
                except psutil.Error:
                    continue
            self.peak = max(self.peak, num_bytes)


def cpu_seconds() -> float:
    """CPU time of this process and of all its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[500_000, 2_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runner", choices=["local", "ray"], default="local")
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "raw"
            raw.mkdir()
            write_rows(raw / "yfcc100m_dataset", rows, seed=0)
            size = (raw / "yfcc100m_dataset").stat().st_size
            with Memory() as memory, open_pool(options.runner, options.workers, None) as pool:
                started, before = time.monotonic(), cpu_seconds()
                recipe = load_recipe("yfcc100m")[0]
                annotations = find_annotations(recipe.load_source(), str(raw))
                index = build_index(recipe, annotations, f"{folder}/index", pool, ignore_progress)
                seconds = time.monotonic() - started
        cpu = cpu_seconds() - before
        assert index.rows == rows
        kept = index.counts.kept / index.counts.pairs_in
        print(
            f"{rows:>11,} rows ({size >> 20:,} MiB) in {seconds:6.1f} s: {rows / seconds:>9,.0f} "
            f"rows/s ({rows / cpu:,.0f} a CPU-second), peak {memory.peak / 2**30:.2f} GiB, "
            f"{kept:.0%} kept, {len(index.parts)} parts, "
            f"{options.runner} with {options.workers} workers"
        )


if __name__ == "__main__":
    main()
