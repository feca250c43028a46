"""Third stage: image codes of a shard, in files beside it, so that shards never change."""

import logging
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
from pmd_pipeline.base.stopwatch import Stopwatch
from pmd_pipeline.base.storage import remove
from pmd_pipeline.codes.crops import crop_boxes
from pmd_pipeline.codes.reports import codes_dependency
from pmd_pipeline.codes.tokenizers import Codes, Pixels, Tokenizer, open_tokenizer
from pmd_pipeline.codes.weights import tensor_bytes
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import open_read, write_whole
from pmd_pipeline.contract.models import CodeRules, CodesReport, FileDigest, ShardEntry
from pmd_pipeline.contract.paths import ShardPaths, part_name
from pmd_pipeline.contract.plugins import is_reference, source_digest
from pmd_pipeline.shards.shard_reader import (
    ShardSample,
    check_tar,
    decode_sample,
    read_member,
    read_samples,
    sample_captions,
)

Boxes: TypeAlias = NDArray[np.float32]

_PREFETCH = 8
"""Images per thread that are decoded before the tokenizer needs them."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CodesTask:
    """A shard to make codes of.

    Args:
        shard: address of the tar.
        entry: the shard in the manifest.
        weights: address of the tokenizer's weights, which have the sha256 of `rules`.
        device: `cpu` or `cuda`.
        threads: that decode while the tokenizer computes.
    """

    shard: str
    entry: ShardEntry
    rules: CodeRules
    weights: str | None
    device: str = "cpu"
    threads: int = 1

    def __str__(self) -> str:
        return f"codes of part {part_name(self.entry.part)} of {self.entry.source}"


def code_shard(task: CodesTask, report_progress: ReportProgress) -> CodesReport:
    """Make the codes of one shard and, last, their report.

    Raises:
        PmdError: the shard is not the one in the manifest or cannot be read; or the tokenizer has
            changed, or returns something else than codes.
    """
    stopwatch = Stopwatch()
    check_tar(task.shard, task.entry)
    samples = read_samples(task.shard, task.entry)
    paths, rules = ShardPaths.of(task.shard), task.rules
    remove(paths.codes_report)  # it belongs to files that are replaced from here on
    tokenizer = _load_tokenizer(rules, rules.dtype, task.weights, task.device)
    boxes: list[Boxes] = []
    codes: list[Codes] = []
    agreement: float | None = None
    crops = _collect_boxes(_decode_crops(task, samples), boxes, report_progress)
    for batch in _batches(crops, tokenizer.batch):
        codes.append(_checked_codes(tokenizer.codes(batch), len(batch), rules))
        if agreement is None and rules.dtype != "float32":
            exact = _load_tokenizer(rules, "float32", task.weights, task.device)
            agreement = float((exact.codes(batch) == codes[0]).mean())
    content = _file(task, boxes, codes)
    write_whole(paths.codes, content)
    report = CodesReport(
        source=task.entry.source,
        part=task.entry.part,
        dependency=codes_dependency(task.entry, rules),
        rules=rules,
        images=len(samples),
        views=sum(map(len, boxes)),
        file=FileDigest.of(paths.codes.rpartition("/")[2], content),
        agreement=agreement,
        versions=library_versions() | dict(tokenizer.versions),
        timing=stopwatch.timing(),
    )
    write_whole(paths.codes_report, report.model_dump_json(indent=1).encode())
    _log.info("%s: %d crops of %d images", task, report.views, report.images)
    return report


def library_versions() -> dict[str, str]:
    """Versions of the libraries that affect the pixels of crops."""
    return {
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo") or "none",
    }


def crop_pixels(sample: ShardSample, content: bytes, boxes: Boxes, size: int) -> Pixels:
    """The crops [v, size, size, 3] of a stored image, each resized by Lanczos from its exact box.

    Raises:
        PmdError: the image cannot be decoded.
    """
    image = decode_sample(sample, content)
    width, height = image.size
    sides = boxes.astype(float) * (width, height, width, height)
    return np.stack(
        [
            np.asarray(image.resize((size, size), Resampling.LANCZOS, box=tuple(box)))
            for box in sides.tolist()
        ]
    )


@lru_cache(maxsize=2)  # in a worker process: the tokenizer, and the same in float32
def _load_tokenizer(rules: CodeRules, dtype: str, weights: str | None, device: str) -> Tokenizer:
    name = rules.tokenizer
    tokenizer = open_tokenizer(name, weights, dtype=dtype, device=device)
    if tokenizer.weights_sha256 != rules.sha256:
        raise PmdError(f"{weights} has changed since the start: run the same command again")
    if is_reference(name) and source_digest(name) != rules.source_sha256:
        raise PmdError(f"{name} has changed since the start: run the same command again")
    return tokenizer


def _decode_crops(
    task: CodesTask, samples: Iterable[ShardSample]
) -> Iterator[tuple[Boxes, Pixels]]:
    """Boxes and pixels of the crops of each sample, in order; threads decode some in advance."""
    rules = task.rules
    queue = deque[tuple[Boxes, Future[Pixels]]]()
    with open_read(task.shard) as file, ThreadPoolExecutor(task.threads) as pool:
        try:
            for sample in samples:
                content = read_member(file, sample, sample.image)
                text = sample_captions(sample, read_member(file, sample, sample.metadata))
                regions = text.boxes or ()
                boxes = crop_boxes(sample.key, sample.size, regions, rules.views, rules.seed)
                queue.append((boxes, pool.submit(crop_pixels, sample, content, boxes, rules.size)))
                if len(queue) > _PREFETCH * task.threads:
                    boxes, pixels = queue.popleft()
                    yield boxes, pixels.result()
            for boxes, pixels in queue:
                yield boxes, pixels.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _collect_boxes(
    crops: Iterable[tuple[Boxes, Pixels]], boxes: list[Boxes], report_progress: ReportProgress
) -> Iterator[Pixels]:
    """The pixels of each image's crops; their boxes go into `boxes`, their number to the driver."""
    num_crops = 0
    for boxes_of_image, pixels in crops:
        boxes.append(boxes_of_image)
        num_crops += len(boxes_of_image)
        report_progress({"images": len(boxes), "crops": num_crops})
        yield pixels


def _batches(pixels: Iterable[Pixels], size: int) -> Iterator[Pixels]:
    """The same crops in batches of `size`, the last one smaller; they depend on the shard alone."""
    waiting: list[Pixels] = []
    count = 0
    for crops in pixels:
        waiting.append(crops)
        count += len(crops)
        while count >= size:
            joined = np.concatenate(waiting)
            yield joined[:size]
            waiting, count = [joined[size:]], count - size
    if count:
        yield np.concatenate(waiting)


def _checked_codes(codes: Codes, num_images: int, rules: CodeRules) -> Codes:
    """The codes as given, if they are what a `Tokenizer` promises."""
    shape = (num_images, rules.grid, rules.grid)
    if codes.shape != shape or codes.dtype != np.uint16:
        raise PmdError(
            f"--tokenizer {rules.tokenizer}: it returned codes {codes.dtype} of shape "
            f"{codes.shape}, and must return uint16 of shape {shape}"
        )
    if int(codes.max(initial=0)) >= rules.vocabulary:
        raise PmdError(
            f"--tokenizer {rules.tokenizer}: it returned the code {int(codes.max())}, and has a "
            f"vocabulary of {rules.vocabulary:,}"
        )
    return codes


def _file(task: CodesTask, boxes: list[Boxes], codes: list[Codes]) -> bytes:
    """The safetensors file of codes; docs/format.md describes `boxes`, `codes` and `first`."""
    rules = task.rules
    tensors = {
        "boxes": np.concatenate([np.empty((0, 4), np.float32), *boxes]),
        "codes": np.concatenate([np.empty((0, rules.grid, rules.grid), np.uint16), *codes]),
        "first": np.cumsum([0, *map(len, boxes)], dtype=np.int64),
    }
    assert len(tensors["codes"]) == len(tensors["boxes"])
    return tensor_bytes(tensors, {"rules": rules.model_dump(mode="json"), "tar": task.entry.sha256})
