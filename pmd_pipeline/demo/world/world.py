"""The sample world: written to a folder, and loaded again, with the counts a build must report."""

import json
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import write_whole
from pmd_pipeline.contract.models import Counts
from pmd_pipeline.demo.world.json_sources import coco, localized_narratives, redcaps, visual_genome
from pmd_pipeline.demo.world.responses import sample_body
from pmd_pipeline.demo.world.sample_source import SampleSource, WebImage
from pmd_pipeline.demo.world.scenes import Scene
from pmd_pipeline.demo.world.table_sources import cc3m, cc12m, sbu, wit, yfcc100m
from pmd_pipeline.demo.world.unimodal_sources import bookcorpus, ccnews, imagenet1k

MIN_SCENES = 20
"""With fewer, COCO has no held-out images that other sources share."""

_WRITERS = (
    *(coco, sbu, localized_narratives, cc3m, visual_genome, wit, cc12m, redcaps, yfcc100m),
    *(imagenet1k, ccnews, bookcorpus),
)
SOURCES = tuple(write.__name__ for write in _WRITERS)
"""The nine sources of PMD, and those of images alone and texts alone."""

_WORLD_FILE = "world.json"


@dataclass(frozen=True)
class World:
    """A small replacement of upstream and of the web, whose contents are known.

    Args:
        folder: has `raw/<source>/` and `images/<source>/`.
        scenes: images of each source.
        seed: seed of scenes and captions.
        expected: counts that a build with the default recipes must report, by source.
        images: archives of images that upstream does not serve one by one, by source; `--images`
            of a build takes them beside the web.
        archived: scenes of the images in the archives, by their path.
        web: images by address (host and path).
    """

    folder: Path
    scenes: int
    seed: int
    expected: dict[str, Counts]
    images: dict[str, tuple[Path, ...]]
    archived: dict[str, Scene]
    web: dict[str, WebImage]


def write_world(
    folder: Path, *, scenes: int = 240, seed: int = 0, only: Sequence[str] = SOURCES
) -> World:
    """Write the annotation files and archives of a world to `folder`; deterministic.

    The content of a source does not depend on the other sources that `only` names.

    Raises:
        PmdError: too few scenes, or the folder cannot be written.
    """
    if scenes < MIN_SCENES:
        raise PmdError(f"a sample world needs {MIN_SCENES} scenes per source, not {scenes}")
    plans = _plans(scenes, seed, only)
    for source in plans:
        for name, content in source.files.items():
            write_whole(str(folder / "raw" / source.name / name), content)
        for name, (scene, kind) in source.raw_images.items():
            write_whole(str(folder / "raw" / source.name / name), sample_body(kind, scene)[0])
        for name, scenes_by_path in _archives(source).items():
            packed = _zip_of(scenes_by_path) if name.endswith(".zip") else _tar_of(scenes_by_path)
            write_whole(str(folder / "images" / source.name / name), packed)
    state = {"scenes": scenes, "seed": seed, "only": list(only)}
    write_whole(str(folder / _WORLD_FILE), json.dumps(state).encode())
    return _world(folder, scenes, seed, plans)


def load_world(folder: Path) -> World:
    """The world that `write_world` wrote to `folder`.

    Raises:
        PmdError: there is no world in `folder`.
    """
    try:
        state = json.loads((folder / _WORLD_FILE).read_bytes())
        scenes, seed, only = int(state["scenes"]), int(state["seed"]), list(map(str, state["only"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PmdError(f"{folder} has no sample world: write one there first") from error
    return _world(folder, scenes, seed, _plans(scenes, seed, only))


def _plans(scenes: int, seed: int, only: Sequence[str]) -> list[SampleSource]:
    plans = []
    for write in (writer for writer in _WRITERS if writer.__name__ in only):
        source = SampleSource(write.__name__, seed, scenes)
        write(source)
        plans.append(source)
    return plans


def _world(folder: Path, scenes: int, seed: int, plans: list[SampleSource]) -> World:
    return World(
        folder=folder,
        scenes=scenes,
        seed=seed,
        expected={source.name: source.counts() for source in plans},
        images={
            source.name: tuple(folder / "images" / source.name / name for name in _archives(source))
            for source in plans
            if source.images
        },
        archived={path: scene for source in plans for path, scene in source.images.items()},
        web={address: entry for source in plans for address, entry in source.web.items()},
    )


def _archives(source: SampleSource) -> dict[str, dict[str, Scene]]:
    """Scenes by path inside each archive, by upstream's name of the archive."""
    names = {"ADEChallengeData2016": ".zip", "flickr30k-images": ".tar"}
    archives: dict[str, dict[str, Scene]] = {}
    for path, scene in source.images.items():
        folder = path.split("/")[0]
        archives.setdefault(folder + names[folder], {})[path] = scene
    return archives


def _zip_of(scenes_by_path: dict[str, Scene]) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(scenes_by_path):
            archive.writestr(zipfile.ZipInfo(path), sample_body("jpeg", scenes_by_path[path])[0])
    return out.getvalue()


def _tar_of(scenes_by_path: dict[str, Scene]) -> bytes:
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(scenes_by_path):
            member = tarfile.TarInfo(path)
            body = sample_body("jpeg", scenes_by_path[path])[0]
            member.size = len(body)
            archive.addfile(member, BytesIO(body))
    return out.getvalue()
