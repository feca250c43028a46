"""The whole product on a sample world, drawn and served on this machine: built, then learned."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.codes.tokenize import CodesRequest, code_manifest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import write_whole
from pmd_pipeline.dataset.build import BuildRequest, BuildResult, build_all
from pmd_pipeline.demo.poster import Found, draw, fingerprints, first_captions
from pmd_pipeline.demo.training_summary import Learned, read_learned
from pmd_pipeline.demo.world import World, serve, write_world
from pmd_pipeline.recipe import recipe_folder
from pmd_pipeline.shards.image_locations import WEB
from pmd_pipeline.text.vocabulary import learn_vocabulary

TIMES = 10
"""Times chance that R@1 on held-out images must reach, in both directions."""

HELD_OUT_SCENES = 240
"""Scenes that are never trained on; with their number, chance is fixed."""

LEAST_SCENES = 80
"""To train: with fewer, there would not be a batch of images alone."""

_HELD_OUT_SEED = 1
_ALONE = ("imagenet1k", "ccnews", "bookcorpus")
_CONFIG = "flava_tiny"
_NEEDED = ("torch", "tokenizers")
_MOST_PIECES = 1000
_CODES = 256
_VIEWS = 4
_QUERIES = 5


@dataclass(frozen=True)
class Places:
    """Where a quickstart keeps what, below its folder."""

    folder: Path

    def manifest(self, name: str) -> str:
        """Of something to train on."""
        return str(self.folder / "manifests" / f"{name}.json")

    @property
    def held_out(self) -> str:
        """Manifest of what is never trained on."""
        return str(self.folder / "held_out" / "manifests" / "coco.json")

    @property
    def vocabulary(self) -> str:
        """Pieces of words."""
        return str(self.folder / "vocab.txt")

    @property
    def trained(self) -> str:
        """The trainer's run."""
        return str(self.folder / "run")

    @property
    def poster(self) -> str:
        """The picture of what was learned."""
        return str(self.folder / "learned.png")


def run(
    folder: Path, scenes: int, runner: str, workers: int | None, reporter: Reporter
) -> BuildResult:
    """Draw a world of `scenes` pictures per source under `folder`, and build all nine from it.

    The recipes are those that real data takes; only the addresses of the hosts lead to this
    machine. Run again, it finds everything done.
    """
    world = write_world(folder / "world", scenes=scenes)
    return _build(world, folder, ("pmd",), runner, workers, reporter)


def lacking() -> list[str]:
    """Names of the libraries that training needs and that are not installed."""
    return [name for name in _NEEDED if not find_spec(name)]


def prepare(folder: Path, workers: int | None, reporter: Reporter) -> None:
    """Make what a training needs besides the nine that `run` has built.

    It is a second world to test on, a vocabulary, images alone and texts alone, and image codes.

    Raises:
        PmdError: an image of the second world is among those to train on.
    """
    places, model = Places(folder), _config()
    reporter.say("another world, never trained on:")
    other = write_world(
        folder / "held_out" / "world", scenes=HELD_OUT_SCENES, seed=_HELD_OUT_SEED, only=("coco",)
    )
    _build(other, folder / "held_out", ("coco",), "local", workers, reporter)
    with reporter.stage("tokenizer", "texts") as stage:
        vocabulary, _ = learn_vocabulary(places.manifest("pmd"), _MOST_PIECES, stage.update)
    write_whole(places.vocabulary, vocabulary.content)
    texts = {"tokenizer": places.vocabulary, "tokens": model["data"]["text_tokens"]}
    request = BuildRequest(
        recipes=_ALONE,
        out=str(folder / "data"),
        manifests=str(folder / "manifests"),
        raw=str(folder / "world" / "raw"),
        changes={"texts": texts},
        runner="local",
        workers=workers,
    )
    build_all(request, reporter)
    grid = model["model"]["image_size"] // model["model"]["patch_size"]
    for name in ("pmd", "imagenet1k"):
        wanted = CodesRequest(
            places.manifest(name),
            vocabulary=_CODES,
            grid=grid,
            views=_VIEWS,
            runner="local",
            workers=workers,
        )
        code_manifest(wanted, reporter)
    _check_apart(places)


def train(folder: Path, steps: int | None, *, quiet: bool) -> Learned:
    """Train on what `prepare` made, in a process of its own, and read what was learned.

    Args:
        folder: of the quickstart.
        steps: to take; None takes those of the configuration.
        quiet: let the trainer show nothing.

    Raises:
        PmdError: the trainer stopped with an error, which it has told.
        KeyboardInterrupt: it was interrupted, and has saved what it had.
    """
    places, config = Places(folder), _config()
    steps = steps or int(config["steps"])
    settings = {
        "steps": steps,
        "data.images": places.manifest("imagenet1k"),
        "data.texts": [places.manifest(name) for name in _ALONE[1:]],
        "data.tokenizer": places.vocabulary,
        "evaluation.retrieval": places.held_out,
        "evaluation.every": max(1, steps // 6),
        "optimizer.warmup": min(config["optimizer"]["warmup"], steps // 10),
    }
    # strings and lists of JSON are those of TOML
    said = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    command = ["--shards", places.manifest("pmd"), "--config", _CONFIG, "--out", places.trained]
    said += ["--quiet"] if quiet else []
    code = _wait_for(_trainer([*command, *said], stdout=sys.stderr.fileno()))
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise PmdError(
            f"flava-train ended with exit code {code}; what it says stands above; if {folder} is "
            "of an earlier version, delete it"
        )
    return read_learned(Path(places.trained) / "metrics.jsonl")


def show_off(folder: Path, learned: Learned) -> str | None:
    """Let the model find images for a few captions, and draw that with all it has learned.

    Gives the path of the PNG, or None where matplotlib, which draws it, is not installed.
    """
    if not find_spec("matplotlib"):
        return None
    places = Places(folder)
    asked = first_captions(places.held_out, _QUERIES)
    command = ["search", places.trained, places.held_out, *(text for _, text in asked), "--json"]
    process = _trainer(command, stdout=subprocess.PIPE)
    answer, _ = process.communicate()
    if process.returncode:
        raise PmdError("flava-train search failed; what it says stands above")
    found = [
        Found(text, key, [image["key"] for image in one["images"]])
        for (key, text), one in zip(asked, json.loads(answer), strict=True)
    ]
    draw(learned, found, places.held_out, places.poster)
    return places.poster


def _build(
    world: World,
    folder: Path,
    recipes: tuple[str, ...],
    runner: str,
    workers: int | None,
    reporter: Reporter,
) -> BuildResult:
    with serve(world) as origin:
        request = BuildRequest(
            recipes=recipes,
            out=str(folder / "data"),
            manifests=str(folder / "manifests"),
            raw=str(folder / "world" / "raw"),
            images=(WEB, *(str(path) for paths in world.images.values() for path in paths)),
            changes={"fetch": {"connect_to": {"*": origin}}, "part_records": 100},
            runner=runner,
            workers=workers,
        )
        return build_all(request, reporter)


def _check_apart(places: Places) -> None:
    """See by their sha256 that no held-out image is trained on."""
    held_out = set(fingerprints(places.held_out))
    for name in ("pmd", "imagenet1k"):
        if shared := held_out.intersection(fingerprints(places.manifest(name))):
            raise PmdError(
                f"{len(shared)} images of {places.held_out} are among those of "
                f"{places.manifest(name)}: take another number of --scenes"
            )


def _config() -> dict[str, Any]:
    content = (recipe_folder() / f"{_CONFIG}.toml").read_text(encoding="utf-8")
    return tomllib.loads(content)


def _trainer(arguments: Sequence[str], *, stdout: int) -> subprocess.Popen[bytes]:
    # not imported: the trainer is another package, and knows torch
    command = [sys.executable, "-m", "flava_train.cli", *arguments]
    # waiting threads that spin would hold the core that the loader needs
    environment: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    return subprocess.Popen(  # noqa: S603 - our own command, of our own words
        command, stdout=stdout, env=environment
    )


def _wait_for(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process, which is given time to save when Ctrl-C interrupts both."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        process.kill()
