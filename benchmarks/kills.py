"""Kill builds at random moments, and compare their digest with that of an undisturbed build.

Worker processes build sources of the sample world from a server on this machine. At random moments
a worker or the driver is killed. The same command is run again until it ends, and its digest must
be that of an undisturbed build. This repeats from nothing until there have been enough kills.

    python benchmarks/kills.py --kills 500
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.contract.models import Manifest
from pmd_pipeline.demo.world import World, serve, write_world

SOURCES = ["cc3m", "wit", "visual_genome"]


def command(world: World, origin: str, folder: Path) -> list[str]:
    """The build of the sample world into `folder`."""
    recipe = folder.parent / "kills.toml"
    recipe.write_text(
        f"include = {json.dumps(SOURCES)}\npart_records = 20\n"
        f'[fetch.connect_to]\n"*" = "{origin}"\n'
    )
    images = [
        option for paths in world.images.values() for p in paths for option in ("--images", p)
    ]
    arguments = [
        *(sys.executable, "-m", "pmd_pipeline.cli", "build", "--recipe", recipe),
        *("--raw", world.folder / "raw", "--out", folder / "data"),
        *("--manifests", folder / "manifests", "--images", "web", *images),
        *("--runner", "local", "--workers", "2", "--quiet"),
    ]
    return [str(argument) for argument in arguments]


def manifest(folder: Path) -> Manifest:
    """The manifest of a finished build."""
    return load_manifest(str(folder / "manifests" / "kills.json"))


def differences(one: Manifest, other: Manifest) -> str:
    """The sources whose counts differ between two builds."""
    return "\n".join(
        f"{source}: {counts} or {other.sources[source].counts}"
        for source, entry in one.sources.items()
        if (counts := entry.counts) != other.sources[source].counts
    )


def run_with_kills(build: list[str], rng: random.Random, max_pause: float) -> Counter[str]:
    """Run a build to its end with kills; the number of kills of drivers and workers."""
    killed = Counter[str]()
    while True:
        driver = subprocess.Popen(build, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                code = driver.wait(rng.uniform(0.2, max_pause))
            except subprocess.TimeoutExpired:
                killed[kill_one(driver.pid, rng)] += 1
            else:
                break
        if code == 0:
            return killed
        if code not in {1, -signal.SIGKILL}:  # 1: a part failed after its last crash
            sys.exit(f"the build ended with {code}")


def kill_one(driver: int, rng: random.Random) -> str:
    """Kill the driver or one of its workers."""
    try:
        process = psutil.Process(driver)
        workers = [one for one in process.children(recursive=True) if "spawn" in str(one.cmdline())]
        victim = rng.choice([process, *workers])
        victim.kill()
    except psutil.NoSuchProcess:
        return "none"
    return "driver" if victim is process else "worker"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        world = write_world(Path(name) / "world", scenes=80, only=SOURCES)
        folder = Path(name) / "built"
        folder.mkdir()
        with serve(world) as origin:
            build = command(world, origin, folder)
            started = time.monotonic()
            subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
            seconds, expected = time.monotonic() - started, manifest(folder)
            killed, builds = Counter[str](), 0
            while killed["driver"] + killed["worker"] < options.kills:
                shutil.rmtree(folder)
                folder.mkdir()
                killed += run_with_kills(build, rng, 0.75 * seconds)
                builds += 1
                result = manifest(folder)
                if result.digest != expected.digest:
                    print(differences(expected, result))
                    sys.exit(f"after {dict(killed)} the digest differs")
    print(
        f"{killed['driver']} drivers and {killed['worker']} workers killed in {builds} builds, "
        f"each with the digest of the undisturbed build, {expected.digest[:12]}"
    )


if __name__ == "__main__":
    main()
