"""Third stage: image codes of a shard, beside it, so that shards never change."""

import logging
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features
from PIL.Image import Resampling

from pmd_pipeline.base.parallel import ReportProgress
from pmd_pipeline.base.storage import remove
from pmd_pipeline.build.shard_reader import (
    ShardSample,
    caption_boxes,
    check_tar,
    decode_image,
    read_member,
    read_samples,
)
from pmd_pipeline.codes.crops import crop_boxes
from pmd_pipeline.codes.reports import codes_dependency
from pmd_pipeline.codes.tokenizers import Tokenizer, open_tokenizer
from pmd_pipeline.codes.tokenizers.weights import read_weights, tensor_file
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import open_read, write_whole
from pmd_pipeline.contract.models import CodeRules, CodesReport, FileDigest, ShardEntry, Timing

Pixels: TypeAlias = NDArray[np.uint8]
Boxes: TypeAlias = NDArray[np.float32]

_AHEAD = 8
"""Images per thread that are decoded before they are asked for."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CodesTask:
    """A shard that gets codes.

    Args:
        shard: address of the tar.
        entry: what the manifest says of it.
        weights: address of the tokenizer's weights, whose sha256 is that of `rules`.
        device: `cpu` or `cuda`.
        threads: that decode while the tokenizer computes.
    """

    shard: str
    entry: ShardEntry
    rules: CodeRules
    weights: str
    device: str = "cpu"
    threads: int = 1

    def __str__(self) -> str:
        return f"codes of part {self.entry.part:05d} of {self.entry.source}"

    @property
    def base(self) -> str:
        """The address of all that lies beside the tar, less the ending."""
        return self.shard.removesuffix(".tar")


def code_shard(task: CodesTask, report_progress: ReportProgress) -> CodesReport:
    """Make the codes of one shard and, last, their report.

    Raises:
        PmdError: the shard is not the one that the manifest names, or cannot be read.
    """
    started, clock = time.time(), time.monotonic()
    check_tar(task.shard, task.entry)
    samples = read_samples(task.shard, task.entry)
    remove(report_address(task))  # nothing may vouch for files that are being replaced
    rules = task.rules
    tokenizer = _loaded(task.weights, rules.sha256, rules.dtype, task.device)
    boxes: list[Boxes] = []
    codes: list[NDArray[np.uint16]] = []
    agreement: float | None = None
    for batch in _batches(_told(_seen(task, samples), boxes, report_progress), tokenizer.batch):
        codes.append(tokenizer.codes(batch))
        if agreement is None and rules.dtype != "float32":
            exact = _loaded(task.weights, rules.sha256, "float32", task.device)
            agreement = float((exact.codes(batch) == codes[0]).mean())
    content = _file(task, boxes, codes)
    name = task.base.rpartition("/")[2]
    write_whole(f"{task.base}.codes.safetensors", content)
    report = CodesReport(
        source=task.entry.source,
        part=task.entry.part,
        dependency=codes_dependency(task.entry, rules),
        rules=rules,
        images=len(samples),
        views=sum(map(len, boxes)),
        file=FileDigest.of(f"{name}.codes.safetensors", content),
        agreement=agreement,
        versions=versions() | tokenizer.versions,
        timing=Timing(started=started, seconds=time.monotonic() - clock, host=socket.gethostname()),
    )
    write_whole(report_address(task), report.model_dump_json(indent=1).encode())
    _log.info("%s: %d views of %d images", task, report.views, report.images)
    return report


def report_address(task: CodesTask) -> str:
    """Where the report of the codes lies."""
    return f"{task.base}.codes.json"


def versions() -> dict[str, str]:
    """Libraries that shape the pixels that a tokenizer sees."""
    return {
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo") or "none",
    }


def crop_pixels(sample: ShardSample, jpeg: bytes, boxes: Boxes, size: int) -> Pixels:
    """The views [v, size, size, 3] of a stored image, each resized by Lanczos from its exact box.

    Raises:
        PmdError: the image cannot be decoded.
    """
    image = decode_image(sample, jpeg)
    width, height = image.size
    sides = boxes.astype(float) * (width, height, width, height)
    return np.stack(
        [
            np.asarray(image.resize((size, size), Resampling.LANCZOS, box=tuple(box)))
            for box in sides.tolist()
        ]
    )


@lru_cache(maxsize=2)  # of a worker process: the tokenizer, and the one in float32 beside it
def _loaded(weights: str, sha256: str, dtype: str, device: str) -> Tokenizer:
    read = read_weights(weights)
    if read.sha256 != sha256:
        raise PmdError(f"{weights} has changed since the start: run the same command again")
    return open_tokenizer(read, dtype=dtype, device=device)


def _seen(task: CodesTask, samples: Iterable[ShardSample]) -> Iterator[tuple[Boxes, Pixels]]:
    """Boxes and pixels of the views of each sample, in order; threads decode some ahead."""
    rules = task.rules
    ahead = deque[tuple[Boxes, Future[Pixels]]]()
    with open_read(task.shard) as file, ThreadPoolExecutor(task.threads) as pool:
        try:
            for sample in samples:
                jpeg = read_member(file, sample, sample.image)
                captioned = caption_boxes(sample, read_member(file, sample, sample.described))
                boxes = crop_boxes(sample.key, sample.size, captioned, rules.views, rules.seed)
                ahead.append((boxes, pool.submit(crop_pixels, sample, jpeg, boxes, rules.size)))
                if len(ahead) > _AHEAD * task.threads:
                    boxes, pixels = ahead.popleft()
                    yield boxes, pixels.result()
            for boxes, pixels in ahead:
                yield boxes, pixels.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _told(
    seen: Iterable[tuple[Boxes, Pixels]], boxes: list[Boxes], report_progress: ReportProgress
) -> Iterator[Pixels]:
    """The pixels, while `boxes` collects their boxes and the driver hears how many there were."""
    views = 0
    for own, pixels in seen:
        boxes.append(own)
        views += len(own)
        report_progress({"images": len(boxes), "views": views})
        yield pixels


def _batches(pixels: Iterable[Pixels], size: int) -> Iterator[Pixels]:
    """The same views, `size` at a time and the rest at last: a matter of the shard alone."""
    waiting: list[Pixels] = []
    count = 0
    for views in pixels:
        waiting.append(views)
        count += len(views)
        while count >= size:
            joined = np.concatenate(waiting)
            yield joined[:size]
            waiting, count = [joined[size:]], count - size
    if count:
        yield np.concatenate(waiting)


def _file(task: CodesTask, boxes: list[Boxes], codes: list[NDArray[np.uint16]]) -> bytes:
    """The file of codes: see the design's words on `boxes`, `codes` and `first`."""
    rules = task.rules
    tensors = {
        "boxes": np.concatenate([np.empty((0, 4), np.float32), *boxes]),
        "codes": np.concatenate([np.empty((0, rules.grid, rules.grid), np.uint16), *codes]),
        "first": np.cumsum([0, *map(len, boxes)], dtype=np.int64),
    }
    assert int(tensors["codes"].max(initial=0)) < rules.vocabulary
    assert len(tensors["codes"]) == len(tensors["boxes"])
    told = {"rules": rules.model_dump(mode="json"), "tar": task.entry.sha256}
    return tensor_file(tensors, told)
