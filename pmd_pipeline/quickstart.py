"""The whole product on a sample world, drawn and served on this machine."""

from pathlib import Path

from pmd_pipeline.build import WEB
from pmd_pipeline.dataset import Built, Request, build_all
from pmd_pipeline.progress import Show
from pmd_pipeline.sample import serve, write_world


def run(folder: Path, scenes: int, runner: str, workers: int | None, show: Show) -> Built:
    """Draw a world of `scenes` pictures per source under `folder`, and build all nine from it.

    The recipes are those that real data takes; only the addresses of the hosts lead to this
    machine. Run again, it finds everything done.
    """
    world = write_world(folder / "world", scenes=scenes)
    with serve(world) as origin:
        request = Request(
            recipes=("pmd",),
            out=str(folder / "data"),
            manifests=str(folder / "manifests"),
            raw=str(folder / "world" / "raw"),
            images=(WEB, *(str(path) for paths in world.images.values() for path in paths)),
            changes={"fetch": {"connect_to": {"*": origin}}, "part_records": 100},
            runner=runner,
            workers=workers,
        )
        return build_all(request, show)
