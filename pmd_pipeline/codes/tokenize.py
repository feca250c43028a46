"""Image codes of all shards of a manifest, and the manifest with them."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice
from operator import attrgetter

import numpy as np

from pmd_pipeline.base.parallel import WorkerDied, open_pool
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.base.storage import sizes, sweep
from pmd_pipeline.codes.reports import done_codes, with_codes
from pmd_pipeline.codes.shard import CodesTask, code_shard, crop_pixels
from pmd_pipeline.codes.tokenizers import Pixels, best_device, open_tokenizer
from pmd_pipeline.codes.tokenizers.kmeans import PATCH_SIZE, fit, patches
from pmd_pipeline.codes.weights import find_weights, read_tensors, tensor_bytes
from pmd_pipeline.contract.boxes import WHOLE_IMAGE
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import open_read, write_whole
from pmd_pipeline.contract.manifest import load_manifest, located, save_manifest
from pmd_pipeline.contract.models import FORMAT, CodeRules, CodesReport, Manifest, ShardEntry
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.contract.plugins import is_reference, source_digest
from pmd_pipeline.shards.shard_reader import ShardSample, check_tar, read_member, read_samples

_FIT_IMAGES = 1024
"""Images that k-means is fitted to: those of the lowest keys, which are a random sample."""

_MAX_THREADS = 16
"""Threads that decode for one GPU."""


@dataclass(frozen=True)
class CodesRequest:
    """The codes to make.

    Args:
        manifest: address of the manifest, which is rewritten.
        weights: file, folder or hub id of a tokenizer's weights.
        revision: commit of the hub id.
        tokenizer: name of a tokenizer, or `module:function`. None: that of the weights; without
            weights, a k-means that is fitted to the images.
        vocabulary: codes of the fitted k-means.
        grid: codes along each side of a crop.
        views: crops per image; see `CodeRules.views`.
        seed: of random crops, and of k-means.
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
class CodesResult:
    """The manifest with codes; the manifest as it was if there are failures.

    Args:
        weights: address of the tokenizer's weights, if it has any.
        agreement: share of codes that are the same in float32, where they are made in another.
        failures: one sentence for each shard whose workers died.
    """

    manifest: Manifest
    rules: CodeRules
    weights: str | None
    agreement: float | None = None
    failures: list[str] = field(default_factory=list)


def code_manifest(request: CodesRequest, reporter: Reporter) -> CodesResult:
    """Make the codes of all shards of a manifest; codes that are complete and current are kept.

    Raises:
        PmdError: there is nothing to code, there is no such tokenizer, or a shard is not the one in
            the manifest.
    """
    manifest = load_manifest(request.manifest)
    shards = [(located(request.manifest, shard.path), shard) for shard in manifest.shards]
    _refuse_unusable(request, manifest, shards)
    name, weights = _tokenizer_and_weights(request, manifest, shards, reporter)
    # opened on the CPU for its attributes: the weights compute in the workers
    tokenizer = open_tokenizer(name, weights, dtype=request.dtype)
    assert tokenizer.weights_sha256 is not None
    rules = CodeRules(
        tokenizer=name,
        sha256=tokenizer.weights_sha256,
        vocabulary=tokenizer.vocabulary,
        size=tokenizer.patch_size * request.grid,
        grid=request.grid,
        views=request.views,
        seed=request.seed,
        dtype=request.dtype,
        source_sha256=source_digest(name) if is_reference(name) else None,
    )
    device = best_device(tokenizer) if request.device == "auto" else request.device
    del tokenizer
    threads = min(_MAX_THREADS, os.cpu_count() or 1) if device == "cuda" else 1
    tasks = [CodesTask(shard, entry, rules, weights, device, threads) for shard, entry in shards]
    result = CodesResult(manifest, rules, weights)
    reports = list(_reports(request, tasks, result, reporter))
    if result.failures:
        return result
    result.manifest = with_codes(manifest, reports)
    result.agreement = _mean_agreement(reports)
    save_manifest(request.manifest, result.manifest)
    return result


def _refuse_unusable(
    request: CodesRequest, manifest: Manifest, shards: Sequence[tuple[str, ShardEntry]]
) -> None:
    if manifest.kind == "text" or not shards:
        raise PmdError(f"{request.manifest} holds no images that could get codes")
    for shard, _ in shards:
        if shard.startswith(("http://", "https://")):
            raise PmdError(
                f"codes are written beside the shards, and nothing can be written to {shard}: "
                "copy the shards to a folder or bucket of yours, with a manifest that names them"
            )


def _tokenizer_and_weights(
    request: CodesRequest,
    manifest: Manifest,
    shards: Sequence[tuple[str, ShardEntry]],
    reporter: Reporter,
) -> tuple[str, str | None]:
    """The tokenizer's name and the address of its weights; k-means without weights is fitted."""
    name = request.tokenizer
    if request.weights is not None:
        address = find_weights(request.weights, request.revision)
        if name is None:
            name = "kmeans" if "centroids" in read_tensors(address).tensors else "dalle"
        return name, address
    if name not in {None, "kmeans"}:
        return str(name), None
    if request.dtype != "float32":
        raise PmdError("k-means computes in whole numbers: leave --dtype out")
    return "kmeans", _fitted_kmeans(request, manifest, shards, reporter)


def _fitted_kmeans(
    request: CodesRequest,
    manifest: Manifest,
    shards: Sequence[tuple[str, ShardEntry]],
    reporter: Reporter,
) -> str:
    """The address of a k-means of these shards, beside the manifest; fitted unless it exists."""
    address = request.manifest.removesuffix(".json") + ".kmeans.safetensors"
    facts = {
        "tokenizer": "kmeans",
        "stand_in_for": "dalle",
        "format": FORMAT,
        "vocabulary": request.vocabulary,
        "grid": request.grid,
        "seed": request.seed,
        "fitted_on": digest([[entry.sha256, entry.ledger_sha256] for _, entry in shards]),
    }
    folder, _, name = address.rpartition("/")
    if name in sizes(folder or ".") and read_tensors(address).facts == facts:
        return address
    with reporter.stage(f"{manifest.name} k-means", "images") as stage:
        samples = []
        for pixels in _first_images(shards, PATCH_SIZE * request.grid):
            samples.append(patches(pixels))
            stage.update("k-means", {"images": len(samples)})
        centroids = fit(np.concatenate(samples), request.vocabulary, request.seed)
        write_whole(address, tensor_bytes({"centroids": centroids}, facts))
    return address


def _first_images(shards: Sequence[tuple[str, ShardEntry]], size: int) -> Iterator[Pixels]:
    """The whole images [1, size, size, 3] of the lowest keys, shard by shard."""
    by_source = defaultdict[str, list[tuple[str, ShardEntry]]](list)
    for shard, entry in sorted(shards, key=lambda one: one[1].part):
        by_source[entry.source].append((shard, entry))
    in_order = merge(*map(_samples_by_key, by_source.values()), key=attrgetter("key"))
    by_shard = defaultdict[str, list[ShardSample]](list)
    for sample in islice(in_order, _FIT_IMAGES):
        by_shard[sample.shard].append(sample)
    whole = np.array([WHOLE_IMAGE], dtype=np.float32)
    for shard, entry in shards:
        if shard not in by_shard:
            continue
        check_tar(shard, entry)
        with open_read(shard) as file:
            for sample in by_shard[shard]:
                yield crop_pixels(sample, read_member(file, sample, sample.image), whole, size)


def _samples_by_key(shards: Iterable[tuple[str, ShardEntry]]) -> Iterator[ShardSample]:
    """The samples of one source; parts are key ranges, so one ledger is read at a time."""
    for shard, entry in shards:
        yield from read_samples(shard, entry)


def _reports(
    request: CodesRequest, tasks: Sequence[CodesTask], result: CodesResult, reporter: Reporter
) -> Iterator[CodesReport]:
    """Reports of all shards but those that failed, which go into `result.failures`."""
    folders = sorted({ShardPaths.of(task.shard).folder for task in tasks})
    sizes_in = {folder: sizes(folder) for folder in folders}
    done, waiting = list[CodesReport](), list[CodesTask]()
    for task in tasks:
        report = done_codes(task.shard, task.entry, sizes_in[ShardPaths.of(task.shard).folder])
        if report and report.rules == result.rules:
            done.append(report)
        else:
            waiting.append(task)
    yield from done
    for folder in folders:
        sweep(folder)
    on_gpu = bool(tasks) and tasks[0].device == "cuda"
    workers = request.workers or (1 if on_gpu and request.runner == "local" else None)
    images = sum(task.entry.images for task in tasks)
    with (
        reporter.stage(f"{result.manifest.name} codes", "images", images) as stage,
        open_pool(request.runner, workers, request.ray_address, gpus=int(on_gpu)) as pool,
    ):
        for report in done:
            stage.resume_from(_counts(report))
        for task, report_or_death in pool.run(code_shard, waiting, stage.update):
            if isinstance(report_or_death, WorkerDied):
                result.failures.append(str(report_or_death))
            else:
                stage.advance(str(task), _counts(report_or_death))
                yield report_or_death


def _counts(report: CodesReport) -> dict[str, int]:
    return {"images": report.images, "crops": report.views}


def _mean_agreement(reports: Sequence[CodesReport]) -> float | None:
    shares = [report.agreement for report in reports if report.agreement is not None]
    return sum(shares) / len(shares) if shares else None
