"""A toy source for tests of the stages: Conceptual Captions rows, and pictures in a folder."""

import random
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image
from rich.console import Console

from pmd_pipeline.base.parallel import Pool, ignore_progress, open_pool
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.contract.models import Manifest
from pmd_pipeline.dataset.build import build_source
from pmd_pipeline.dataset.source_build import SourceBuild
from pmd_pipeline.index.build import Index, build_index
from pmd_pipeline.recipe import Recipe, load_recipe
from pmd_pipeline.sources import find_annotations

QUIET = Reporter(Console(quiet=True), quiet=True)


def toy_recipe(**changes: object) -> Recipe:
    """The recipe of cc3m with `changes` laid over it."""
    return load_recipe("cc3m", changes)[0]


def write_rows(
    folder: Path, rows: Sequence[tuple[str, str]], name: str = "GCC-training.tsv"
) -> Path:
    """Write (caption, address) rows as upstream does; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{caption}\t{address}\n" for caption, address in rows)
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder


def write_pictures(folder: Path, names: Sequence[str], side: int = 40) -> Path:
    """Write a small JPEG of its own colours under each name; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        rng = random.Random(name)
        image = Image.new("RGB", (side + 8, side), tuple(rng.randrange(256) for _ in range(3)))
        out = BytesIO()
        image.save(out, "JPEG")
        (folder / name).write_bytes(out.getvalue())
    return folder


def toy_rows(count: int) -> list[tuple[str, str]]:
    """Rows of `count` pictures; every third has another row later, with another caption."""
    rows = [(f"a caption of picture {n}", f"http://a.test/{n}.jpg") for n in range(count)]
    repeats = [(f"picture {n} once more", f"http://a.test/{n}.jpg") for n in range(0, count, 3)]
    return rows + repeats


def toy_source_build(
    folder: Path, recipe: Recipe, *, pictures: Path, limit: int | None = None
) -> SourceBuild:
    """What to build of the rows in `folder/raw`."""
    return SourceBuild(
        recipe=recipe,
        raw=str(folder / "raw"),
        data=str(folder / "data"),
        manifest=str(folder / "manifests" / "cc3m.json"),
        limit=limit,
        images=(str(pictures),),
    )


def toy_build(source_build: SourceBuild, pool: Pool | None = None) -> Manifest:
    """The manifest of a build without failed parts."""
    if pool is None:
        with open_pool("local", 1, None) as own_pool:
            return toy_build(source_build, own_pool)
    manifest, failures = build_source(source_build, pool, QUIET)
    assert failures == []
    return manifest


def index_of(recipe: Recipe, raw: Path, folder: Path, pool: Pool) -> Index:
    """The index in `folder` of the annotation files under `raw`."""
    annotations = find_annotations(recipe.load_source(), str(raw), recipe.form)
    return build_index(recipe, annotations, str(folder), pool, ignore_progress)
