"""Measure what a record costs: build a few records in a temporary folder.

The records are a source's, fetched from the web, or synthetic photographs, fetched from a server on
this machine.
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
from pmd_pipeline.contract.models import Report
from pmd_pipeline.index.records import IndexRecord
from pmd_pipeline.recipe import Fetch, Images, Recipe
from pmd_pipeline.shards.shard import ShardBuild, fetch_into_shard

NUM_GROUPS = 8
"""Groups of records that a probe builds one by one, to estimate the variance of its figures."""

_STUDENT = 2.365
"""97.5 % quantile of Student's t with `NUM_GROUPS - 1` degrees of freedom."""

_NORMAL = 1.96
"""97.5 % quantile of the normal distribution."""

_NUM_PHOTOGRAPHS = 4
_CALIBRATION_RECORDS = 64
_QUALITIES = (50, 70, 80, 85, 90, 93, 95, 97, 99)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; an unknown end is None."""

    value: float
    low: float | None = None
    high: float | None = None

    def __mul__(self, factor: float) -> "Interval":
        low = None if self.low is None else self.low * factor
        high = None if self.high is None else self.high * factor
        return Interval(self.value * factor, low, high)


@dataclass(frozen=True)
class ProbeResult:
    """Means over all records of a probe, those without an image included.

    Args:
        alive: success rate, the share of records with an image.
        bytes_down: fetched.
        bytes_stored: in shard and ledger.
        cpu_seconds: of one core.
        seconds: elapsed with one task, at the recipe's request rate; None where not measured.
        lost: share of the records by failure or drop reason, most frequent first.
    """

    alive: Interval
    bytes_down: Interval
    bytes_stored: Interval
    cpu_seconds: Interval
    seconds: Interval | None = None
    lost: Mapping[str, float] | None = None


def probe_records(
    recipe: Recipe,
    records: Sequence[IndexRecord],
    on_group: Callable[[Report], None],
    workers: int = 1,
) -> ProbeResult:
    """Build the records by the recipe, and delete the result.

    Args:
        records: at least `NUM_GROUPS`.
        on_group: called with the report of each group.
        workers: tasks that the build will run at a time; the probe keeps the request rate of one.
    """
    groups = [records[number::NUM_GROUPS] for number in range(NUM_GROUPS)]
    rows = []
    lost = Counter[str]()
    with tempfile.TemporaryDirectory(prefix="pmd-probe-") as scratch:
        for number, group in enumerate(groups):
            cpu_start, start = time.process_time(), time.monotonic()
            build = ShardBuild(recipe, number, scratch, workers=workers)
            report = fetch_into_shard(build, _single_captions(group), _no_progress)
            seconds_taken = time.process_time() - cpu_start, time.monotonic() - start
            stored = report.tar.num_bytes + report.ledger.num_bytes
            sums = (report.fetched_bytes, stored, *seconds_taken)
            rows.append([one / len(group) for one in sums])
            lost.update(report.counts.failed)
            lost.update(report.counts.dropped)
            on_group(report)
    bytes_down, bytes_stored, cpu_seconds, seconds = (
        _mean(column) for column in zip(*rows, strict=True)
    )
    return ProbeResult(
        alive=proportion(len(records) - lost.total(), len(records)),
        bytes_down=bytes_down,
        bytes_stored=bytes_stored,
        cpu_seconds=cpu_seconds,
        seconds=seconds,
        lost={reason: num / len(records) for reason, num in lost.most_common()},
    )


@cache
def calibrate(images_json: str, pixels: int, num_bytes: int) -> Interval:
    """CPU seconds of this machine for a record with an image, fetched from a local server.

    Args:
        images_json: the recipe's `[images]`, as JSON.
        pixels: of the synthetic photographs.
        num_bytes: of their JPEGs, about.
    """
    with tempfile.TemporaryDirectory(prefix="pmd-probe-") as folder, _serve(folder) as origin:
        for number in range(_NUM_PHOTOGRAPHS):
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
                Row(str(n), url=f"http://calibration.example/{n % _NUM_PHOTOGRAPHS}.jpg?{n}"),
            )
            for n in range(_CALIBRATION_RECORDS)
        ]
        probe_records(recipe, records[:NUM_GROUPS], lambda _: None)  # imports and first connections
        return probe_records(recipe, records, lambda _: None).cpu_seconds


def bare_record(source: str, row: Row) -> IndexRecord:
    """The record of a row's image, without pairs."""
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


def proportion(part: int, whole: int) -> Interval:
    """A proportion with Wilson's interval, which stays between 0 and 1.

    >>> proportion(50, 100)
    Interval(value=0.5, low=0.4038, high=0.5962)
    """
    share, z = part / whole, _NORMAL
    middle = (share + z * z / (2 * whole)) / (1 + z * z / whole)
    root = math.sqrt(share * (1 - share) / whole + z * z / (4 * whole * whole))
    half = z / (1 + z * z / whole) * root
    return Interval(share, round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4))


def _mean(values: Sequence[float]) -> Interval:
    half = _STUDENT * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values), max(0.0, fmean(values) - half), fmean(values) + half)


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
def _serve(folder: str) -> Iterator[str]:
    """The origin of a file server; it is another process, so its CPU time is not measured."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with subprocess.Popen(  # noqa: S603 - this interpreter and a temporary folder
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
    """A 4:3 JPEG with the spectrum of a photograph, of the quality nearest to `num_bytes`."""
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
