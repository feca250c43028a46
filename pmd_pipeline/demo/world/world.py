"""The sample world as a whole: written to a folder, loaded again, and sure of its own truth."""

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
from pmd_pipeline.demo.world.plan import OnWeb, Plan
from pmd_pipeline.demo.world.responses import picture
from pmd_pipeline.demo.world.scenes import Scene
from pmd_pipeline.demo.world.table_sources import cc3m, cc12m, sbu, wit, yfcc100m
from pmd_pipeline.demo.world.unimodal_sources import bookcorpus, ccnews, imagenet1k

LEAST_SCENES = 20
"""Below, COCO would have no held-out images for the other sources to share."""

_WRITERS = (
    *(coco, sbu, localized_narratives, cc3m, visual_genome, wit, cc12m, redcaps, yfcc100m),
    *(imagenet1k, ccnews, bookcorpus),
)
SOURCES = tuple(write.__name__ for write in _WRITERS)
"""The nine, and those of images alone and texts alone."""

_NOTE = "world.json"


@dataclass(frozen=True)
class World:
    """A small stand-in for upstream and for the web, in which everything is known.

    Args:
        folder: with `raw/<source>/` and `images/<source>/` in it.
        scenes: pictures of each source.
        seed: of all that is drawn and said; another one gives other scenes.
        planted: what a build with the default recipes must report, by source.
        images: archives with the images that upstream does not serve one by one, by source: more
            places for a build to look in, beside the web.
        archived: what each image in the archives shows, by its path there.
        web: what is at each address (host and path).
    """

    folder: Path
    scenes: int
    seed: int
    planted: dict[str, Counts]
    images: dict[str, tuple[Path, ...]]
    archived: dict[str, Scene]
    web: dict[str, OnWeb]


def write_world(
    folder: Path, *, scenes: int = 240, seed: int = 0, only: Sequence[str] = SOURCES
) -> World:
    """Write the annotation files and archives of a world to `folder`; the same bytes each time.

    What a source has does not depend on which others `only` names.

    Raises:
        PmdError: too few scenes for all that a world needs, or the folder cannot be written.
    """
    if scenes < LEAST_SCENES:
        raise PmdError(f"a sample world needs {LEAST_SCENES} scenes a source, not {scenes}")
    plans = _plans(scenes, seed, only)
    for plan in plans:
        for name, content in plan.files.items():
            write_whole(str(folder / "raw" / plan.source / name), content)
        for name, (scene, kind) in plan.loose.items():
            write_whole(str(folder / "raw" / plan.source / name), picture(kind, scene)[0])
        for name, drawn in _archives(plan).items():
            packed = _zipped(drawn) if name.endswith(".zip") else _tarred(drawn)
            write_whole(str(folder / "images" / plan.source / name), packed)
    note = {"scenes": scenes, "seed": seed, "only": list(only)}
    write_whole(str(folder / _NOTE), json.dumps(note).encode())
    return _world(folder, scenes, seed, plans)


def load_world(folder: Path) -> World:
    """The world that `write_world` wrote to `folder`.

    Raises:
        PmdError: there is none.
    """
    try:
        note = json.loads((folder / _NOTE).read_bytes())
        scenes, seed, only = int(note["scenes"]), int(note["seed"]), list(map(str, note["only"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PmdError(f"{folder} holds no sample world: write one there first") from error
    return _world(folder, scenes, seed, _plans(scenes, seed, only))


def _plans(scenes: int, seed: int, only: Sequence[str]) -> list[Plan]:
    plans = []
    for write in (one for one in _WRITERS if one.__name__ in only):
        plan = Plan(write.__name__, seed, scenes)
        write(plan)
        plans.append(plan)
    return plans


def _world(folder: Path, scenes: int, seed: int, plans: list[Plan]) -> World:
    return World(
        folder=folder,
        scenes=scenes,
        seed=seed,
        planted={plan.source: plan.counts() for plan in plans},
        images={
            plan.source: tuple(folder / "images" / plan.source / name for name in _archives(plan))
            for plan in plans
            if plan.images
        },
        archived={path: scene for plan in plans for path, scene in plan.images.items()},
        web={address: there for plan in plans for address, there in plan.web.items()},
    )


def _archives(plan: Plan) -> dict[str, dict[str, Scene]]:
    """Scenes by path inside each archive, by the name under which upstream hands it out."""
    names = {"ADEChallengeData2016": ".zip", "flickr30k-images": ".tar"}
    found: dict[str, dict[str, Scene]] = {}
    for path, scene in plan.images.items():
        folder = path.split("/")[0]
        found.setdefault(folder + names[folder], {})[path] = scene
    return found


def _zipped(drawn: dict[str, Scene]) -> bytes:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(drawn):
            archive.writestr(zipfile.ZipInfo(path), picture("jpeg", drawn[path])[0])
    return out.getvalue()


def _tarred(drawn: dict[str, Scene]) -> bytes:
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(drawn):
            member = tarfile.TarInfo(path)
            body = picture("jpeg", drawn[path])[0]
            member.size = len(body)
            archive.addfile(member, BytesIO(body))
    return out.getvalue()
