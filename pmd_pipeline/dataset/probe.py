"""The build on a few records in a scratch folder, to see what a record takes on this machine.

The records are those of a source, fetched from the web, or drawn photographs, fetched from a
server on this machine.
"""

import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from PIL import Image

from pmd_pipeline.base.record import Row, key_of
from pmd_pipeline.build.shard import ShardBuild, fetch_into_shard
from pmd_pipeline.contract.models import Report
from pmd_pipeline.index.records import IndexRecord
from pmd_pipeline.recipe import Fetch, Images, Recipe

GROUPS = 8
"""Small parts that a trial is cut into, so that it shows how much its figures scatter."""

_STUDENT = 2.365
"""97.5 % quantile of Student's t with one degree of freedom less than there are groups."""

_NORMAL = 1.96
_DRAWN = 4
_CALIBRATION_RECORDS = 64
_QUALITIES = (50, 70, 80, 85, 90, 93, 95, 97, 99)


@dataclass(frozen=True)
class Range:
    """An estimate with its 95 % interval; an end that nobody can tell is None."""

    value: float
    low: float | None = None
    high: float | None = None

    def __mul__(self, factor: float) -> "Range":
        low = None if self.low is None else self.low * factor
        high = None if self.high is None else self.high * factor
        return Range(self.value * factor, low, high)


@dataclass(frozen=True)
class Trial:
    """What a record takes, on average over all that were tried, dead ones included.

    Args:
        alive: share that gave an image.
        bytes_down: fetched.
        bytes_stored: in shard and ledger.
        cpu_seconds: of one core.
        seconds: on the wall with one task, at the recipe's pace; None where that says nothing.
        lost: shares by reason, most frequent first.
    """

    alive: Range
    bytes_down: Range
    bytes_stored: Range
    cpu_seconds: Range
    seconds: Range | None = None
    lost: Mapping[str, float] | None = None


def tried(
    recipe: Recipe,
    records: Sequence[IndexRecord],
    finished: Callable[[Report], None],
    workers: int = 1,
) -> Trial:
    """Build the records, at least `GROUPS` of them, as the recipe says, and throw it all away.

    Args:
        finished: is told of each group's report.
        workers: tasks that the build will run at a time; this one asks hosts as one of them would.
    """
    groups = [records[number::GROUPS] for number in range(GROUPS)]
    rows = []
    lost = Counter[str]()
    with tempfile.TemporaryDirectory(prefix="pmd-trial-") as scratch:
        for number, group in enumerate(groups):
            busy, clock = time.process_time(), time.monotonic()
            build = ShardBuild(recipe, number, scratch, workers=workers)
            report = fetch_into_shard(build, _single_captions(group), _no_progress)
            took = time.process_time() - busy, time.monotonic() - clock
            stored = report.tar.num_bytes + report.ledger.num_bytes
            sums = (report.fetched_bytes, stored, *took)
            rows.append([one / len(group) for one in sums])
            lost.update(report.counts.failed)
            lost.update(report.counts.dropped)
            finished(report)
    down, stored_, cpu, seconds = (_mean(column) for column in zip(*rows, strict=True))
    return Trial(
        alive=share_of(len(records) - lost.total(), len(records)),
        bytes_down=down,
        bytes_stored=stored_,
        cpu_seconds=cpu,
        seconds=seconds,
        lost={reason: num / len(records) for reason, num in lost.most_common()},
    )


@cache
def calibrated(images_json: str, pixels: int, num_bytes: int) -> Range:
    """Processor seconds of this machine for a live record, fetched from a server beside it.

    Args:
        images_json: the recipe's `[images]`, as JSON.
        pixels: of the pictures drawn.
        num_bytes: their size, about.
    """
    with tempfile.TemporaryDirectory(prefix="pmd-trial-") as folder, _served(folder) as origin:
        for number in range(_DRAWN):
            jpeg = _photograph(number, pixels, num_bytes)
            Path(folder, f"{number}.jpg").write_bytes(jpeg)
        recipe = Recipe(
            source="coco",
            images=Images.model_validate_json(images_json),
            fetch=Fetch(connect_to={"*": origin}, concurrency=8, per_host=8),
        )
        records = [
            bare_record(
                "calibration",
                Row(str(n), url=f"http://calibration.example/{n % _DRAWN}.jpg?{n}"),
            )
            for n in range(_CALIBRATION_RECORDS)
        ]
        tried(recipe, records[:GROUPS], lambda _: None)  # imports and first connections
        return tried(recipe, records, lambda _: None).cpu_seconds


def bare_record(source: str, row: Row) -> IndexRecord:
    """What a row knows of its image, as a record without pairs."""
    return IndexRecord(
        key=key_of(source, row.id),
        id=row.id,
        url=row.url,
        file=row.file,
        licence=row.licence,
        width=row.width,
        height=row.height,
        sha256=row.sha256,
        meta=None,
        captions=[],
        fields=[],
        boxes=None,
        spans=[],
        rows=[],
    )


def share_of(part: int, whole: int) -> Range:
    """A share with Wilson's interval, which stays between 0 and 1.

    >>> share_of(50, 100)
    Range(value=0.5, low=0.4038, high=0.5962)
    """
    share, z = part / whole, _NORMAL
    middle = (share + z * z / (2 * whole)) / (1 + z * z / whole)
    root = math.sqrt(share * (1 - share) / whole + z * z / (4 * whole * whole))
    half = z / (1 + z * z / whole) * root
    return Range(share, round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4))


def _mean(values: Sequence[float]) -> Range:
    half = _STUDENT * stdev(values) / math.sqrt(len(values))
    return Range(fmean(values), max(0.0, fmean(values) - half), fmean(values) + half)


def _no_progress(_counts: Mapping[str, int]) -> None:
    """Progress within a group is not shown."""


def _single_captions(records: Sequence[IndexRecord]) -> list[IndexRecord]:
    """The records in order of key, each with one caption, so that counts are of records."""
    single = [
        replace(one, captions=["-"], fields=[""], boxes=None, spans=[0], rows=[0])
        for one in records
    ]
    return sorted(single, key=lambda record: record.key)


@contextmanager
def _served(folder: str) -> Iterator[str]:
    """The origin of a server of files, in a process of its own whose time is not counted."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with subprocess.Popen(  # noqa: S603 - our own interpreter, a folder of our own
        [*command, "--protocol", "HTTP/1.1", "--directory", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout
        try:
            port = server.stdout.readline().split(" port ")[1].split()[0]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def _photograph(seed: int, pixels: int, num_bytes: int) -> bytes:
    """A JPEG of 4:3, as rough as a photograph at each scale, of the nearest size to be had."""
    width, height = round(math.sqrt(pixels * 4 / 3)), round(math.sqrt(pixels * 3 / 4))
    rng = np.random.default_rng(seed)
    layers = np.zeros((height, width, 3), dtype=np.float32)
    side = 4
    while side < width:
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        layers += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / side
        side *= 2
    image = Image.fromarray((255 * (layers - layers.min()) / np.ptp(layers)).astype(np.uint8))
    jpegs = []
    for quality in _QUALITIES:
        out = BytesIO()
        image.save(out, "JPEG", quality=quality)
        jpegs.append(out.getvalue())
    return min(jpegs, key=lambda jpeg: abs(len(jpeg) - num_bytes))
