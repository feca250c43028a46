"""A manifest gets image codes: a tokenizer found or fitted, its shards coded, itself rewritten."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from pmd_pipeline.base.parallel import WorkerDied, open_pool
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.base.storage import sizes, sweep
from pmd_pipeline.build.shard_reader import ShardSample, check_tar, read_member, read_samples
from pmd_pipeline.codes.reports import done_codes, with_codes
from pmd_pipeline.codes.shard import CodesTask, code_shard, crop_pixels
from pmd_pipeline.codes.tokenizers import best_device
from pmd_pipeline.codes.tokenizers.kmeans import PATCH, fit, patches
from pmd_pipeline.codes.tokenizers.pickles import read_pickle
from pmd_pipeline.codes.tokenizers.weights import (
    dalle_weights,
    find_weights,
    read_weights,
    tensor_file,
)
from pmd_pipeline.contract.boxes import WHOLE_IMAGE
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import open_read, write_whole
from pmd_pipeline.contract.manifest import load_manifest, located, save_manifest
from pmd_pipeline.contract.models import FORMAT, CodeRules, CodesReport, Manifest, ShardEntry

_FITTED_IMAGES = 1024
"""Images whose patches k-means sees: those of the lowest keys, which are a random sample."""

_MOST_THREADS = 16
"""Threads that decode for one GPU."""


@dataclass(frozen=True)
class CodesRequest:
    """What codes a user asks for.

    Args:
        manifest: address of the manifest, which is written again.
        weights: file, folder or hub id of a tokenizer's weights; None fits k-means.
        revision: commit of the hub id.
        tokenizer: what the weights must be; None takes them as they are.
        vocabulary: codes of a k-means that is fitted here.
        grid: codes along each side of an image.
        views: see `CodeRules.views`.
        seed: of drawn views, and of k-means.
        device: `cpu`, `cuda`, or `auto`.
    """

    manifest: str
    weights: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    vocabulary: int = 1024
    grid: int = 14
    views: int = 1
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    runner: str = "ray"
    workers: int | None = None
    ray_address: str | None = None


@dataclass
class Coded:
    """What has become of it: the manifest is the new one, unless there are failures.

    Args:
        weights: address of the tokenizer's weights.
        agreement: share of codes that float32 gives too, where they are made in another.
        failures: a sentence for each shard that killed its workers.
    """

    manifest: Manifest
    rules: CodeRules
    weights: str
    agreement: float | None = None
    failures: list[str] = field(default_factory=list)


def code_manifest(request: CodesRequest, reporter: Reporter) -> Coded:
    """Make the codes of all shards of a manifest; what is done and still true is not done again.

    Raises:
        PmdError: there is nothing to code, no such tokenizer, or a shard is not what the manifest
            says.
    """
    manifest = load_manifest(request.manifest)
    shards = [(located(request.manifest, shard.path), shard) for shard in manifest.shards]
    _check(request, manifest, shards)
    address = _weights_address(request, manifest, shards, reporter)
    weights = read_weights(address)
    if request.tokenizer not in {None, weights.tokenizer}:
        raise PmdError(f"{address} holds weights of {weights.tokenizer}, not {request.tokenizer}")
    if weights.tokenizer == "kmeans" and request.dtype != "float32":
        raise PmdError("k-means counts in whole numbers: leave --dtype out")
    rules = CodeRules(
        tokenizer=weights.tokenizer,
        sha256=weights.sha256,
        vocabulary=weights.vocabulary,
        size=PATCH * request.grid,
        grid=request.grid,
        views=request.views,
        seed=request.seed,
        dtype=request.dtype,
    )
    device = best_device(weights) if request.device == "auto" else request.device
    del weights  # workers read them where they compute
    tasks = [_task(shard, entry, rules, address, device) for shard, entry in shards]
    coded = Coded(manifest, rules, address)
    reports = list(_reports(request, tasks, coded, reporter))
    if coded.failures:
        return coded
    coded.manifest = with_codes(manifest, reports)
    coded.agreement = _agreement(reports)
    save_manifest(request.manifest, coded.manifest)
    return coded


def convert_weights(pickle: str, out: str) -> str:
    """Write the dVAE's weights in `pickle`, or in safetensors, to `out`; the sha256 of the file.

    Raises:
        PmdError: it is refused, or holds something else, or `out` is no name for safetensors.
    """
    if not out.endswith(".safetensors"):  # nor would anything be read from there again
        raise PmdError(f"{out}: weights are written as safetensors, so let it end in .safetensors")
    is_safe = pickle.endswith(".safetensors")
    weights = read_weights(pickle) if is_safe else dalle_weights(read_pickle(pickle), pickle)
    if weights.tokenizer != "dalle":
        raise PmdError(f"{pickle} holds weights of {weights.tokenizer}, which need no conversion")
    write_whole(out, tensor_file(weights.tensors, {"tokenizer": "dalle"}))
    return weights.sha256


def _check(
    request: CodesRequest, manifest: Manifest, shards: Sequence[tuple[str, ShardEntry]]
) -> None:
    """Refuse at once what could only fail later."""
    if manifest.kind == "text" or not shards:
        raise PmdError(f"{request.manifest} holds no images that could get codes")
    for shard, _ in shards:
        if shard.startswith(("http://", "https://")):
            raise PmdError(
                f"codes are written beside the shards, and nothing can be written to {shard}: "
                "copy the shards to a place of yours, and name that in the manifest"
            )


def _weights_address(
    request: CodesRequest,
    manifest: Manifest,
    shards: Sequence[tuple[str, ShardEntry]],
    reporter: Reporter,
) -> str:
    """Where the weights are; those of k-means are fitted unless they lie beside the manifest."""
    if request.weights is not None:
        return find_weights(request.weights, request.revision)
    address = request.manifest.removesuffix(".json") + ".kmeans.safetensors"
    facts = {
        "tokenizer": "kmeans",
        "stand_in_for": "dalle",
        "format": FORMAT,
        "vocabulary": request.vocabulary,
        "grid": request.grid,
        "seed": request.seed,
        "fitted_on": digest([[one.sha256, one.ledger_sha256] for _, one in shards]),
    }
    folder, _, name = address.rpartition("/")
    if name not in sizes(folder or ".") or read_weights(address).facts != facts:
        with reporter.stage(f"{manifest.name} k-means", "images") as stage:
            seen = []
            for pixels in _first_images(shards, PATCH * request.grid):
                seen.append(patches(pixels))
                stage.update("k-means", {"images": len(seen)})
            centroids = fit(np.concatenate(seen), request.vocabulary, request.seed)
            write_whole(address, tensor_file({"centroids": centroids}, facts))
    return address


def _first_images(
    shards: Sequence[tuple[str, ShardEntry]], size: int
) -> Iterator[NDArray[np.uint8]]:
    """The whole images [1, size, size, 3] of the lowest keys, shard by shard."""
    by_source = defaultdict[str, list[tuple[str, ShardEntry]]](list)
    for shard, entry in sorted(shards, key=lambda one: one[1].part):
        by_source[entry.source].append((shard, entry))
    in_order = merge(*map(_by_key, by_source.values()), key=attrgetter("key"))
    by_shard = defaultdict[str, list[ShardSample]](list)
    for sample in islice(in_order, _FITTED_IMAGES):
        by_shard[sample.shard].append(sample)
    whole = np.array([WHOLE_IMAGE], dtype=np.float32)
    for shard, entry in shards:
        if shard not in by_shard:
            continue
        check_tar(shard, entry)
        with open_read(shard) as file:
            for sample in by_shard[shard]:
                jpeg = read_member(file, sample, sample.image)
                yield crop_pixels(sample, jpeg, whole, size)


def _by_key(shards: Iterable[tuple[str, ShardEntry]]) -> Iterator[ShardSample]:
    """The samples of one source; parts are key ranges, and no ledger is read before its turn."""
    for shard, entry in shards:
        yield from read_samples(shard, entry)


def _task(shard: str, entry: ShardEntry, rules: CodeRules, weights: str, device: str) -> CodesTask:
    threads = min(_MOST_THREADS, os.cpu_count() or 1) if device == "cuda" else 1
    return CodesTask(shard, entry, rules, weights, device, threads)


def _reports(
    request: CodesRequest, tasks: Sequence[CodesTask], coded: Coded, reporter: Reporter
) -> Iterator[CodesReport]:
    """Reports of all shards but those that failed, which `coded` hears of."""
    folders = {task.shard.rpartition("/")[0] for task in tasks}
    there = {folder: sizes(folder) for folder in sorted(folders)}
    done, waiting = list[CodesReport](), list[CodesTask]()
    for task in tasks:
        report = done_codes(task.shard, task.entry, there[task.shard.rpartition("/")[0]])
        if report and report.rules == coded.rules:
            done.append(report)
        else:
            waiting.append(task)
    yield from done
    for folder in sorted(folders):
        sweep(folder)
    on_gpu = bool(tasks) and tasks[0].device == "cuda"
    workers = request.workers or (1 if on_gpu and request.runner == "local" else None)
    images = sum(task.entry.images for task in tasks)
    with (
        reporter.stage(f"{coded.manifest.name} codes", "images", images) as stage,
        open_pool(request.runner, workers, request.ray_address, gpus=int(on_gpu)) as pool,
    ):
        for report in done:
            stage.resume_from(_counts(report))
        for task, result in pool.run(code_shard, waiting, stage.update):
            if isinstance(result, WorkerDied):
                coded.failures.append(str(result))
            else:
                stage.advance(str(task), _counts(result))
                yield result


def _counts(report: CodesReport) -> dict[str, int]:
    return {"images": report.images, "views": report.views}


def _agreement(reports: Sequence[CodesReport]) -> float | None:
    found = [report.agreement for report in reports if report.agreement is not None]
    return sum(found) / len(found) if found else None
