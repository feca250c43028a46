"""Rows a second and peak memory of indexing YFCC100M: read, decode, choose, language, gather.

Writes files of invented rows (see yfcc_rows.py), indexes each with the default recipe, and prints
rows a second and the largest memory of all processes together; memory must not grow with the rows.

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
    """The largest memory that this process and its children hold together, sampled."""

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
        me = psutil.Process()
        while not self._stop.wait(0.1):
            held = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    held += process.memory_full_info().pss  # shared pages are counted once
                except psutil.Error:
                    continue
            self.peak = max(self.peak, held)


def cpu_seconds() -> float:
    """Processor time of this process and of all its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[500_000, 2_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runner", choices=["local", "ray"], default="local")
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "raw"
            raw.mkdir()
            write_rows(raw / "yfcc100m_dataset", rows, seed=0)
            size = (raw / "yfcc100m_dataset").stat().st_size
            with Memory() as memory, open_pool(given.runner, given.workers, None) as pool:
                started, before = time.monotonic(), cpu_seconds()
                recipe = load_recipe("yfcc100m")[0]
                annotations = find_annotations(recipe.load_source(), str(raw))
                index = build_index(recipe, annotations, f"{folder}/index", pool, ignore_progress)
                seconds = time.monotonic() - started
        busy = cpu_seconds() - before
        assert index.rows == rows
        kept = index.counts.kept / index.counts.pairs_in
        print(
            f"{rows:>11,} rows ({size >> 20:,} MiB) in {seconds:6.1f} s: {rows / seconds:>9,.0f} "
            f"rows/s ({rows / busy:,.0f} a CPU-second), peak {memory.peak / 2**30:.2f} GiB, "
            f"{kept:.0%} kept, {len(index.parts)} parts, "
            f"{given.runner} with {given.workers} workers"
        )


if __name__ == "__main__":
    main()
