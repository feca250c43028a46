"""The Python API: the functions that the command line calls, with the defaults of its options."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console

from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.dataset.build import BuildRequest, BuildResult, build_all
from pmd_pipeline.dataset.reader import Dataset, Sample, open_manifest

__all__ = ["BuildResult", "Dataset", "PmdError", "Sample", "build", "open_manifest"]


def build(  # noqa: PLR0913 - as many options as the command has
    *recipes: str,
    out: str = "data",
    manifests: str = "manifests",
    raw: str | None = None,
    images: Sequence[str] = ("web",),
    limit: int | None = None,
    changes: Mapping[str, Any] | None = None,
    optout: str | None = None,
    runner: Literal["ray", "local"] = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    quiet: bool = True,
) -> BuildResult:
    """Build sources to shards and manifests, as `pmd build` does; interrupted, it goes on.

    Args:
        recipes: names of sources (`coco`), `pmd` for all nine, or paths of recipe files.
        out: folder or address for index and shards.
        manifests: folder or address for manifests.
        raw: folder of annotation files; None downloads them where upstream allows it.
        images: where images are looked for, in order: `web`, folders, zips, tars, or output folders
            of img2dataset.
        limit: build only so many records of each source, an unbiased sample.
        changes: laid over every recipe, such as `{"images": {"size": 224}}`.
        optout: file of images to leave out, now and in later builds.
        runner: processes of this machine, or Ray.
        workers: tasks at a time; None takes all cores.
        ray_address: of a running Ray cluster to join.
        quiet: show no progress on stderr.

    Returns:
        The manifests with their addresses, and a sentence for each part that failed.

    Raises:
        PmdError: a recipe is wrong, the input is missing or wrong, or nothing can be written.
    """
    request = BuildRequest(
        recipes=recipes,
        out=out,
        manifests=manifests,
        raw=raw,
        images=tuple(images),
        limit=limit,
        changes=changes or {},
        optout=optout,
        runner=runner,
        workers=workers,
        ray_address=ray_address,
    )
    return build_all(request, Reporter(Console(stderr=True), quiet=quiet))
