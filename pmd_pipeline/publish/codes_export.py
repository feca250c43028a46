"""Shards with the image codes inside, for loaders of other people."""

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
from pmd_pipeline.build.shard_reader import check_tar, read_samples
from pmd_pipeline.build.shard_writer import DigestingFile, ShardWriter
from pmd_pipeline.build.tar_reader import TarReader
from pmd_pipeline.codes.tensors import Tensors, code_tensors
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, open_read, read_bytes, whole_file
from pmd_pipeline.contract.image_format import EXTENSIONS
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.contract.models import CodeRules, ShardEntry
from pmd_pipeline.contract.paths import part_name

_MEMBERS = {"json", "txt"} | EXTENSIONS


@dataclass(frozen=True)
class ExportTask:
    """A shard to write again with its codes; `out` is the address of the new tar."""

    shard: str
    entry: ShardEntry
    rules: CodeRules
    out: str

    def __str__(self) -> str:
        return f"export of part {part_name(self.entry.part)} of {self.entry.source}"


def export(path: str, out: str, pool: Pool, reporter: Reporter) -> Iterator[tuple[ExportTask, str]]:
    """Write every shard of the manifest at `path` below `out`, with codes; each tar's sha256.

    A sample has two members more: `<key>.codes.npy`, uint16 [views, grid, grid], and
    `<key>.boxes.npy`, float32 [views, 4], the boxes of these views as fractions.

    Raises:
        PmdError: the manifest has no codes, a shard is not what it says, or the shards themselves
            lie where they are to be written to.
    """
    manifest = load_manifest(path)
    if manifest.codes is None:
        raise PmdError(f"{path} has no image codes: run `pmd codes {path}` first")
    tasks = [
        ExportTask(
            located(path, shard.path),
            shard,
            manifest.codes,
            join(out, shard.source, f"{part_name(shard.part)}.tar"),
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
        PmdError: the shard or its codes are not those that the manifest names.
    """
    check_tar(task.shard, task.entry)
    keys = [sample.key for sample in read_samples(task.shard, task.entry)]
    codes = _codes(task, len(keys))
    first = codes["first"]
    with whole_file(task.out) as raw, open_read(task.shard) as file:
        tar = DigestingFile(raw)
        writer = ShardWriter(tar)
        for number, (key, members) in enumerate(_samples(task, file, keys)):
            views = slice(first[number], first[number + 1])
            members["codes.npy"] = _npy(codes["codes"][views])
            members["boxes.npy"] = _npy(codes["boxes"][views])
            writer.add(key, members)
            report_progress({"images": number + 1})
        writer.close()
    return tar.hexdigest()


def _codes(task: ExportTask, images: int) -> Tensors:
    """The tensors of the shard's codes, which fit its `images` and the rules."""
    address = task.shard.removesuffix(".tar") + ".codes.safetensors"
    content = read_bytes(address)
    if hashlib.sha256(content).hexdigest() != task.entry.codes_sha256:
        raise PmdError(
            f"{address} is not the file of codes that the manifest names, its sha256 differs: run "
            "`pmd codes` again"
        )
    found = code_tensors(content)
    if isinstance(found, str):
        raise PmdError(f"{address} {found}: run `pmd codes` again")
    views, grid = len(found["boxes"]), task.rules.grid
    first = found["first"]
    if (
        first.shape != (images + 1,)
        or found["boxes"].shape != (views, 4)
        or found["codes"].shape != (views, grid, grid)
        or [*first[:1], *first[-1:]] != [0, views]
        or (np.diff(first) < 1).any()
    ):
        raise PmdError(f"{address} does not fit its shard: run `pmd codes` again")
    return found


def _samples(
    task: ExportTask, file: BinaryIO, keys: Sequence[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of the tar, which are those of `keys`: key, and content by extension."""
    left = iter(keys)
    members = TarReader(file)
    named = ((*member.name.partition(".")[::2], content) for member, content in members)
    for key, group in groupby(named, key=itemgetter(0)):
        found = {extension: content for _, extension, content in group}
        if members.faults or not found.keys() <= _MEMBERS or key != next(left, None):
            raise PmdError(f"{task.shard} is no shard of `pmd build`, as {key} in it shows")
        yield key, found
    if members.faults or next(left, None) is not None:
        raise PmdError(f"{task.shard} ends before its ledger does: build it again")


def _npy(array: NDArray[Any]) -> bytes:
    out = BytesIO()
    np.save(out, array)
    return out.getvalue()
