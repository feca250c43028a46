"""Kills a build again and again, and compares what it comes to with what it comes to in peace.

The sample world's sources are built from a server on loopback by worker processes. At random
moments a worker or the driver is killed; the same command is run again until it is done, and its
digest must be that of an undisturbed build. Then it all begins again from nothing, until there have
been so many kills.

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
    images = [word for paths in world.images.values() for p in paths for word in ("--images", p)]
    words = [
        *(sys.executable, "-m", "pmd_pipeline.cli", "build", "--recipe", recipe),
        *("--raw", world.folder / "raw", "--out", folder / "data"),
        *("--manifests", folder / "manifests", "--images", "web", *images),
        *("--runner", "local", "--workers", "2", "--quiet"),
    ]
    return [str(word) for word in words]


def manifest(folder: Path) -> Manifest:
    """The manifest of a finished build."""
    return load_manifest(str(folder / "manifests" / "kills.json"))


def differences(one: Manifest, other: Manifest) -> str:
    """What two builds counted otherwise."""
    return "\n".join(
        f"{source}: {counts} or {other.sources[source].counts}"
        for source, entry in one.sources.items()
        if (counts := entry.counts) != other.sources[source].counts
    )


def disturbed(built: list[str], dice: random.Random, longest: float) -> Counter[str]:
    """Run a build to its end, killing a worker or the driver now and then; whom, how often."""
    killed = Counter[str]()
    while True:
        driver = subprocess.Popen(built, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                code = driver.wait(dice.uniform(0.2, longest))
            except subprocess.TimeoutExpired:
                killed[kill_one(driver.pid, dice)] += 1
            else:
                break
        if code == 0:
            return killed
        if code not in {1, -signal.SIGKILL}:  # 1: a part died as often as it may
            sys.exit(f"the build ended with {code}")


def kill_one(driver: int, dice: random.Random) -> str:
    """Kill the driver or one of its workers."""
    try:
        process = psutil.Process(driver)
        workers = [one for one in process.children(recursive=True) if "spawn" in str(one.cmdline())]
        victim = dice.choice([process, *workers])
        victim.kill()
    except psutil.NoSuchProcess:
        return "nobody"
    return "driver" if victim is process else "worker"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        world = write_world(Path(name) / "world", scenes=80, only=SOURCES)
        folder = Path(name) / "built"
        folder.mkdir()
        with serve(world) as origin:
            built = command(world, origin, folder)
            started = time.monotonic()
            subprocess.run(built, check=True, stdout=subprocess.DEVNULL)
            seconds, expected = time.monotonic() - started, manifest(folder)
            killed, builds = Counter[str](), 0
            while killed["driver"] + killed["worker"] < given.kills:
                shutil.rmtree(folder)
                folder.mkdir()
                killed += disturbed(built, dice, 0.75 * seconds)
                builds += 1
                found = manifest(folder)
                if found.digest != expected.digest:
                    print(differences(expected, found))
                    sys.exit(f"after {dict(killed)} the digest is another")
    print(
        f"{killed['driver']} drivers and {killed['worker']} workers killed in {builds} builds, "
        f"each of which came to the undisturbed digest {expected.digest[:12]}"
    )


if __name__ == "__main__":
    main()
