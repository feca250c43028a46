"""How golden tests run the product. No other file of this folder knows a module of it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pmd_pipeline.demo.world import serve, write_world

MODULES = {"pmd": "pmd_pipeline.cli", "flava-train": "flava_train.cli"}
"""The module of each command; its `main` is what the installed command calls."""

_CHANGES_OUTPUT = {
    *("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "PMD_LID_MODEL"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy"),
}
"""Variables that would make a command print or fetch something else here than elsewhere."""


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class SampleWorld:
    """Options of `pmd build` for the sample world, all paths relative to its folder.

    Args:
        images: the archives with images that the server does not serve.
        origin: address of the server while it runs; it has a random port, which enters no file
            that a build writes.
    """

    images: list[str]
    origin: str


def run(program: str, *words: object, cwd: Path, columns: int = 100) -> Result:
    """Run `pmd` or `flava-train` in a process of its own, without colours."""
    kept = {name: value for name, value in os.environ.items() if _is_harmless(name)}
    settings = {
        "COLUMNS": str(columns),
        "TERM": "dumb",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(cwd / "cache"),
    }
    module = MODULES[program]
    start = f"import sys; sys.argv[0] = {program!r}; from {module} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", start, *map(str, words)],
        cwd=cwd,
        env=kept | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_well(program: str, *words: object, cwd: Path) -> str:
    """What a command that must succeed prints on stdout."""
    done = run(program, *words, cwd=cwd)
    assert done.code == 0, f"{program} {' '.join(map(str, words))}: {done.err}"
    return done.out


@contextmanager
def sample_world(folder: Path, scenes: int) -> Iterator[SampleWorld]:
    """Write the sample world to `folder`/world, and serve its images while the context lasts."""
    world = write_world(folder / "world", scenes=scenes, seed=0)
    archives = [str(path.relative_to(folder)) for one in world.images.values() for path in one]
    with serve(world) as origin:
        yield SampleWorld(archives, origin)


def _is_harmless(name: str) -> bool:
    return name not in _CHANGES_OUTPUT and name.lower() not in _CHANGES_OUTPUT
