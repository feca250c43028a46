"""One build of a benchmark's URLs by this package, measured; see `fetch.py`.

Reads a request as one line of JSON, builds one part from its URLs, and prints one line of JSON with
CPU seconds, wall-clock seconds, number of images, and peak memory of the process.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

from pmd_pipeline.base.parallel import ignore_progress, open_pool
from pmd_pipeline.images.decode.decoder import open_image
from pmd_pipeline.images.decode.stored_image import make_stored_image
from pmd_pipeline.index.build import build_index
from pmd_pipeline.recipe import Images, load_recipe
from pmd_pipeline.shards.part import PartTask, build_part
from pmd_pipeline.shards.shard import ShardBuild
from pmd_pipeline.sources import find_annotations


def build(
    urls: list[str], connect_to: dict[str, str], folder: Path, politeness: dict[str, int]
) -> dict:
    """Build one part: CPU and wall-clock seconds, images, and failures by reason."""
    rows = "".join(f"a caption of picture {n}\t{url}\n" for n, url in enumerate(urls))
    (folder / "raw").mkdir()
    (folder / "raw" / "GCC-training.tsv").write_text(rows)
    fetch = {"connect_to": connect_to, **politeness}
    (recipe,) = load_recipe("cc3m", {"part_records": 1_000_000, "fetch": fetch})
    with open_pool("local", 1, None) as pool:
        annotations = find_annotations(recipe.load_source(), str(folder / "raw"))
        index = build_index(recipe, annotations, str(folder / "index"), pool, ignore_progress)
    (part,) = index.parts
    shard = ShardBuild(recipe, part.part, str(folder / "shards"))
    task = PartTask(shard, str(folder / "index"), part)
    cpu, clock = time.process_time(), time.monotonic()
    report = build_part(task, lambda _: None)
    return {
        "cpu": time.process_time() - cpu,
        "clock": time.monotonic() - clock,
        "images": report.images,
        "failed": report.counts.failed,
        "fetched": report.fetched_bytes,
    }


def pure_seconds(photographs: list[Path], weights: list[int]) -> float:
    """CPU seconds to decode, resize and encode all photographs, each times its weight."""
    rules, seconds = Images(), 0.0
    for path, weight in zip(photographs, weights, strict=True):
        body = path.read_bytes()
        started = time.process_time()
        make_stored_image(body, open_image(body, rules), rules)
        seconds += weight * (time.process_time() - started)
    return seconds


def main() -> None:
    request = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory() as folder:
        result = build(request["urls"], request["connect_to"], Path(folder), request["politeness"])
    result["mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    if request["photographs"]:
        photographs = [Path(path) for path in request["photographs"]]
        pure_seconds(photographs, request["weights"])  # warm-up
        result["pure"] = pure_seconds(photographs, request["weights"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
