"""Shards with the image codes inside the tar, for other loaders."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pmd_pipeline.base.overwrite import refuse_overwrite
from pmd_pipeline.base.parallel import Pool, ReportProgress, WorkerDied
from pmd_pipeline.base.progress import Reporter
from pmd_pipeline.codes.tensors import Tensors, code_tensors
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, open_read, read_bytes, whole_file
from pmd_pipeline.contract.image_format import EXTENSIONS
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.contract.models import CodeRules, ShardEntry
from pmd_pipeline.contract.paths import ShardPaths, part_name
from pmd_pipeline.shards.shard_reader import check_tar, read_samples
from pmd_pipeline.shards.shard_writer import DigestingFile, ShardWriter
from pmd_pipeline.shards.tar_reader import TarReader

_EXTENSIONS = {"json", "txt"} | EXTENSIONS


@dataclass(frozen=True)
class ExportTask:
    """A shard to export; `out` is the address of the new tar."""

    shard: str
    entry: ShardEntry
    rules: CodeRules
    out: str

    def __str__(self) -> str:
        return f"export of part {part_name(self.entry.part)} of {self.entry.source}"


def export(path: str, out: str, pool: Pool, reporter: Reporter) -> Iterator[tuple[ExportTask, str]]:
    """Write every shard of the manifest at `path` below `out`, with codes; each tar's sha256.

    A sample has two more members: `<key>.codes.npy`, uint16 [crops, grid, grid], and
    `<key>.boxes.npy`, float32 [crops, 4], the boxes of these crops as fractions.

    Raises:
        PmdError: the manifest has no codes, a shard is not the one in it, or the shards lie in
            `out`.
    """
    manifest = load_manifest(path)
    if manifest.codes is None:
        raise PmdError(f"{path} has no image codes: run `pmd codes {path}` first")
    tasks = [
        ExportTask(
            located(path, shard.path),
            shard,
            manifest.codes,
            ShardPaths.in_folder(join(out, shard.source), shard.part).tar,
        )
        for shard in manifest.shards
    ]
    refuse_overwrite(out, [task.shard for task in tasks], [task.out for task in tasks])
    images = sum(shard.images for shard in manifest.shards)
    with reporter.stage(f"{manifest.name} export", "images", images) as stage:
        for task, result in pool.run(export_shard, tasks, stage.update):
            if isinstance(result, WorkerDied):
                raise result
            stage.advance(str(task), {"images": task.entry.images})
            yield task, result


def export_shard(task: ExportTask, report_progress: ReportProgress) -> str:
    """Write one shard with its codes inside; its sha256.

    Raises:
        PmdError: the shard or its codes are not those of the manifest.
    """
    check_tar(task.shard, task.entry)
    keys = [sample.key for sample in read_samples(task.shard, task.entry)]
    codes = _read_codes(task, len(keys))
    first = codes["first"]
    with whole_file(task.out) as raw, open_read(task.shard) as file:
        tar = DigestingFile(raw)
        writer = ShardWriter(tar)
        for number, (key, members) in enumerate(_samples(task, file, keys)):
            crops = slice(first[number], first[number + 1])
            members["codes.npy"] = _npy(codes["codes"][crops])
            members["boxes.npy"] = _npy(codes["boxes"][crops])
            writer.add(key, members)
            report_progress({"images": number + 1})
        writer.close()
    return tar.hexdigest()


def _read_codes(task: ExportTask, images: int) -> Tensors:
    """The tensors of the shard's codes, checked against the number of images and the rules."""
    address = ShardPaths.of(task.shard).codes
    content = read_bytes(address)
    if hashlib.sha256(content).hexdigest() != task.entry.codes_sha256:
        raise PmdError(
            f"{address} is not the file of codes in the manifest, its sha256 differs: run "
            "`pmd codes` again"
        )
    tensors = code_tensors(content)
    if isinstance(tensors, str):
        raise PmdError(f"{address} {tensors}: run `pmd codes` again")
    num_crops, grid = len(tensors["boxes"]), task.rules.grid
    first = tensors["first"]
    if (
        first.shape != (images + 1,)
        or tensors["boxes"].shape != (num_crops, 4)
        or tensors["codes"].shape != (num_crops, grid, grid)
        or [*first[:1], *first[-1:]] != [0, num_crops]
        or (np.diff(first) < 1).any()
    ):
        raise PmdError(f"{address} does not fit its shard: run `pmd codes` again")
    return tensors


def _samples(
    task: ExportTask, file: BinaryIO, keys: Sequence[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key of each sample of the tar, and content by extension; the keys must be `keys`."""
    expected = iter(keys)
    members = TarReader(file)
    files = ((*member.name.partition(".")[::2], content) for member, content in members)
    for key, group in groupby(files, key=itemgetter(0)):
        sample = {extension: content for _, extension, content in group}
        if members.faults or not sample.keys() <= _EXTENSIONS or key != next(expected, None):
            raise PmdError(f"{task.shard} is not a shard of `pmd build`: see {key!r} in it")
        yield key, sample
    if members.faults or next(expected, None) is not None:
        raise PmdError(f"{task.shard} ends before its ledger does: build it again")


def _npy(array: NDArray[Any]) -> bytes:
    out = BytesIO()
    np.save(out, array)
    return out.getvalue()
