"""The quickstart: build all sources from a sample world, train on them, and evaluate."""

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
from pmd_pipeline.demo.poster import SearchResult, draw_poster, image_digests, sample_queries
from pmd_pipeline.demo.training_summary import TrainingSummary, read_summary
from pmd_pipeline.demo.world import World, serve, write_world
from pmd_pipeline.recipe import recipe_folder
from pmd_pipeline.shards.image_locations import WEB
from pmd_pipeline.text.vocabulary import learn_vocabulary

MIN_TIMES_CHANCE = 10
"""Times chance that R@1 on held-out images must reach in both directions."""

HELD_OUT_SCENES = 240
"""Scenes of the held-out world; their number determines chance."""

MIN_TRAINING_SCENES = 80
"""Fewest scenes for training; with fewer there is no batch of images alone."""

_HELD_OUT_SEED = 1
_UNIMODAL = ("imagenet1k", "ccnews", "bookcorpus")
_CONFIG = "flava_tiny"
_TRAINING_LIBRARIES = ("torch", "tokenizers")
_MAX_TOKENS = 1000
_CODES = 256
_CROPS = 4
_QUERIES = 5


@dataclass(frozen=True)
class QuickstartPaths:
    """Paths of a quickstart below its folder."""

    folder: Path

    def manifest(self, name: str) -> str:
        """A manifest of training data."""
        return str(self.folder / "manifests" / f"{name}.json")

    @property
    def held_out(self) -> str:
        """The manifest of the held-out images."""
        return str(self.folder / "held_out" / "manifests" / "coco.json")

    @property
    def vocabulary(self) -> str:
        """The WordPiece vocabulary."""
        return str(self.folder / "vocab.txt")

    @property
    def run_folder(self) -> str:
        """The run folder of the trainer."""
        return str(self.folder / "run")

    @property
    def poster(self) -> str:
        """The poster of the run."""
        return str(self.folder / "learned.png")


def run(
    folder: Path, scenes: int, runner: str, workers: int | None, reporter: Reporter
) -> BuildResult:
    """Write a world of `scenes` images per source under `folder`, and build all nine sources.

    The recipes are those for real data; only all hosts are connected to this machine. A second run
    reuses the shards.
    """
    world = write_world(folder / "world", scenes=scenes)
    return _build(world, folder, ("pmd",), runner, workers, reporter)


def missing_libraries() -> list[str]:
    """Names of the libraries that training needs and that are not installed."""
    return [name for name in _TRAINING_LIBRARIES if not find_spec(name)]


def prepare(folder: Path, workers: int | None, reporter: Reporter) -> None:
    """Build the other inputs of a training, beside the nine sources that `run` has built.

    These are a held-out world for tests, a vocabulary, images alone, texts alone, and image codes.

    Raises:
        PmdError: a held-out image is among the training images.
    """
    paths, model = QuickstartPaths(folder), _config()
    reporter.say("another world, never trained on:")
    other = write_world(
        folder / "held_out" / "world", scenes=HELD_OUT_SCENES, seed=_HELD_OUT_SEED, only=("coco",)
    )
    _build(other, folder / "held_out", ("coco",), "local", workers, reporter)
    with reporter.stage("tokenizer", "texts") as stage:
        vocabulary, _ = learn_vocabulary(paths.manifest("pmd"), _MAX_TOKENS, stage.update)
    write_whole(paths.vocabulary, vocabulary.content)
    texts = {"tokenizer": paths.vocabulary, "tokens": model["data"]["text_tokens"]}
    request = BuildRequest(
        recipes=_UNIMODAL,
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
        codes_request = CodesRequest(
            paths.manifest(name),
            vocabulary=_CODES,
            grid=grid,
            views=_CROPS,
            runner="local",
            workers=workers,
        )
        code_manifest(codes_request, reporter)
    _refuse_overlap(paths)


def train_model(folder: Path, steps: int | None, *, quiet: bool) -> TrainingSummary:
    """Train on the output of `prepare` in a process of its own; the summary of the run.

    Args:
        folder: folder of the quickstart.
        steps: training steps; None takes those of the configuration.
        quiet: show no output of the trainer.

    Raises:
        PmdError: the trainer ended with an error, which it has printed.
        KeyboardInterrupt: it was interrupted, and has saved a checkpoint.
    """
    paths, config = QuickstartPaths(folder), _config()
    steps = steps or int(config["steps"])
    settings = {
        "steps": steps,
        "data.images": paths.manifest("imagenet1k"),
        "data.texts": [paths.manifest(name) for name in _UNIMODAL[1:]],
        "data.tokenizer": paths.vocabulary,
        "evaluation.retrieval": paths.held_out,
        "evaluation.every": max(1, steps // 6),
        "optimizer.warmup": min(config["optimizer"]["warmup"], steps // 10),
    }
    # JSON strings and lists are valid TOML
    options = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    command = ["--shards", paths.manifest("pmd"), "--config", _CONFIG, "--out", paths.run_folder]
    options += ["--quiet"] if quiet else []
    code = _wait_for_exit(_trainer([*command, *options], stdout=sys.stderr.fileno()))
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise PmdError(
            f"flava-train ended with exit code {code}; see its messages above; if {folder} is "
            "of an earlier version, delete it"
        )
    return read_summary(Path(paths.run_folder) / "metrics.jsonl")


def draw_search_results(folder: Path, summary: TrainingSummary) -> str | None:
    """Search images for a few captions with the model, and draw the poster.

    Returns the path of the PNG, or None if matplotlib is not installed.
    """
    if not find_spec("matplotlib"):
        return None
    paths = QuickstartPaths(folder)
    queries = sample_queries(paths.held_out, _QUERIES)
    command = ["search", paths.run_folder, paths.held_out, *(text for _, text in queries), "--json"]
    process = _trainer(command, stdout=subprocess.PIPE)
    answer, _ = process.communicate()
    if process.returncode:
        raise PmdError("flava-train search failed; see its messages above")
    results = [
        SearchResult(text, key, [image["key"] for image in one["images"]])
        for (key, text), one in zip(queries, json.loads(answer), strict=True)
    ]
    draw_poster(summary, results, paths.held_out, paths.poster)
    return paths.poster


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


def _refuse_overlap(paths: QuickstartPaths) -> None:
    """Refuse held-out images that are among the training images, by their SHA-256."""
    held_out = set(image_digests(paths.held_out))
    for name in ("pmd", "imagenet1k"):
        if shared := held_out.intersection(image_digests(paths.manifest(name))):
            raise PmdError(
                f"{len(shared)} images of {paths.held_out} are among those of "
                f"{paths.manifest(name)}: take another number of --scenes"
            )


def _config() -> dict[str, Any]:
    content = (recipe_folder() / f"{_CONFIG}.toml").read_text(encoding="utf-8")
    return tomllib.loads(content)


def _trainer(arguments: Sequence[str], *, stdout: int) -> subprocess.Popen[bytes]:
    # not imported: the trainer is another package, and imports torch
    command = [sys.executable, "-m", "flava_train.cli", *arguments]
    # threads that wait actively would occupy the core that the loader needs
    environment: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    return subprocess.Popen(  # noqa: S603 - our own command with our own arguments
        command, stdout=stdout, env=environment
    )


def _wait_for_exit(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process; after Ctrl-C, which reaches both, it has time to save."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        process.kill()
