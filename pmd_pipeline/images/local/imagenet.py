"""ImageNet's images, listed where they lie; those in the hub's Parquet files are unpacked first.

Images of one part lie all over the Parquet files, where one image costs reading its whole row
group, so the files are unpacked once, into the folders in which ImageNet itself is published.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pmd_pipeline.base.parallel import OnProgress, Pool, ReportProgress, in_order
from pmd_pipeline.base.storage import load_model, remove, sizes
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import is_local, join, whole_file, write_whole

CLASSES = "LOC_synset_mapping.txt"
"""ImageNet's list of classes, in the order of their labels."""

_TRAIN = ("train", "ILSVRC/Data/CLS-LOC/train", ".")
_TABLES = ("train-*.parquet", "data/train-*.parquet")
_CLASS = re.compile(r"n\d{8}")
_IMAGE = re.compile(r"([A-Za-z0-9_-]{1,100})\.(?:jpe?g|png)", re.IGNORECASE)
_HUB_NAME = re.compile(r"(n\d{8}_\d+)_(n\d{8})")
"""The hub has put the class behind the name as well."""

_BATCH = 32

Classes = Mapping[str, tuple[int, str]]
"""Label and name of each class."""


@dataclass(frozen=True)
class UnpackTask:
    """A Parquet file of the hub; its images go below `folder`, their list to `folder/list`."""

    table: str
    folder: str
    classes: Classes

    def __str__(self) -> str:
        return f"unpacking {self.table}"


class _Unpacked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stamp: str


def laid_out(raw: str, folder: str, pool: Pool, on_progress: OnProgress) -> tuple[str, str]:
    """The folder of the list of training images, and the folder in which their paths begin.

    Args:
        raw: folder of ImageNet as published, or of the hub's Parquet files.
        folder: where the list goes, and what must be unpacked.

    Raises:
        PmdError: there is neither under `raw`, a Parquet file is damaged, or `folder` cannot take
            files.
    """
    check_images(raw)
    root, lists = Path(raw), join(folder, "list")
    if not is_local(folder):
        raise PmdError(f"images cannot be listed in {folder}: give a local --out")
    classes = _classes(root)
    train = next((root / name for name in _TRAIN if _has_classes(root / name)), None)
    tables = [] if train else sorted(path for name in _TABLES for path in root.glob(name))
    if train:
        _write_list(join(lists, "train.jsonl"), _listed(root, train, classes))
    tasks = [UnpackTask(str(table), folder, classes) for table in tables]
    in_order(pool, unpack, tasks, on_progress)
    wanted = {"train.jsonl"} if train else {f"{table.stem}.jsonl" for table in tables}
    for name in sizes(lists).keys() - wanted:
        if name.endswith(".jsonl"):
            remove(join(lists, name))  # of files that are not there any more
    return lists, raw if train else folder


def check_images(raw: str) -> None:
    """Do nothing where there is something to list.

    Raises:
        PmdError: there is nothing.
    """
    root = Path(raw)
    has_tables = any(True for name in _TABLES for _ in root.glob(name))
    if not has_tables and not any(_has_classes(root / name) for name in _TRAIN):
        raise PmdError(
            f"{raw} has neither train/n01440764 and so on nor train-*.parquet: see `pmd sources "
            "imagenet1k`"
        )


def unpack(task: UnpackTask, report_progress: ReportProgress) -> None:
    """Write the images of a Parquet file as files, and then their list; done once.

    Raises:
        PmdError: the file is damaged or of another kind.
    """
    path = Path(task.table)
    stat, lists = path.stat(), join(task.folder, "list")
    stamp = _Unpacked(stamp=f"{path.name} {stat.st_size} {stat.st_mtime_ns} {len(task.classes)}")
    if load_model(_Unpacked, lists, f"{path.stem}.json") == stamp:
        return
    try:
        table = pq.ParquetFile(path)
        kinds = {field.name: field.type for field in table.schema_arrow}
        if not pa.types.is_struct(kinds.get("image", pa.null())):
            raise PmdError(f"{path} has no column image with bytes: is it ImageNet's?")
        columns = [name for name in ("image", "label") if name in kinds]
        entries = (
            entry
            for batch in table.iter_batches(_BATCH, columns=columns)
            for entry in batch.to_pylist()
        )
        _write_list(
            join(lists, f"{path.stem}.jsonl"),
            _unpacked(entries, path.stem, task, report_progress),
            sync=True,
        )
    except (pa.ArrowException, OSError) as error:
        said = str(error).partition("\n")[0]
        raise PmdError(f"cannot unpack {path} ({said}): download it again, or make room") from error
    write_whole(join(lists, f"{path.stem}.json"), stamp.model_dump_json().encode())


def _listed(root: Path, train: Path, classes: Classes) -> Iterator[dict[str, Any]]:
    """An entry for each file of the class folders, in order of path; hidden ones are nobody's."""
    for folder in sorted(path for path in train.iterdir() if _CLASS.fullmatch(path.name)):
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            found = _IMAGE.fullmatch(path.name)
            if found is None or not path.is_file():
                yield {"bad": f"{folder.name}/{path.name!a} is no image file"}
                continue
            yield {
                "id": found[1],
                "file": path.relative_to(root).as_posix(),
                "bytes": path.stat().st_size,
                **_described(folder.name, None, classes),
            }


def _unpacked(
    rows: Iterator[dict[str, Any]], table: str, task: UnpackTask, report_progress: ReportProgress
) -> Iterator[dict[str, Any]]:
    by_label = {label: name for name, (label, _) in task.classes.items()}
    for number, row in enumerate(rows):
        image, label = row["image"] or {}, row.get("label")
        body = image.get("bytes")
        if not isinstance(body, bytes) or not body:
            yield {"bad": f"row {number} of {table} has no bytes"}
            continue
        stem, wordnet = _named(image.get("path"), f"{table}-{number}")
        wordnet = wordnet or (None if label is None else by_label.get(label))
        path = f"train/{wordnet or 'unknown'}/{stem}.JPEG"
        target = Path(task.folder, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(body)
        yield {
            "id": stem,
            "file": path,
            "bytes": len(body),
            **_described(wordnet, label, task.classes),
        }
        report_progress({"rows": number + 1})


def _named(path: object, otherwise: str) -> tuple[str, str | None]:
    """Name of an image without folder and ending, and its class, from the path that the hub has."""
    found = _IMAGE.fullmatch(path.rsplit("/", 1)[-1]) if isinstance(path, str) else None
    stem = found[1] if found else otherwise
    if twice := _HUB_NAME.fullmatch(stem):
        return twice[1], twice[2]
    wordnet = stem.partition("_")[0]
    return stem, wordnet if _CLASS.fullmatch(wordnet) else None


def _described(wordnet: str | None, label: int | None, classes: Classes) -> dict[str, Any]:
    known = classes.get(wordnet or "")
    facts = {
        "class": wordnet,
        "label": known[0] if known and label is None else label,
        "name": known[1] if known else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _classes(root: Path) -> Classes:
    """Label and name of each class, where the list of classes is there."""
    for path in (root / CLASSES, root.parent / CLASSES):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            rows = (line.partition(" ") for line in lines if line.strip())
            return {wordnet: (label, name) for label, (wordnet, _, name) in enumerate(rows)}
    return {}


def _has_classes(folder: Path) -> bool:
    return any(path.is_dir() for path in folder.glob("n" + 8 * "[0-9]"))


def _write_list(address: str, entries: Iterator[dict[str, Any]], *, sync: bool = False) -> None:
    with whole_file(address) as file:
        for entry in entries:
            file.write(json.dumps(entry).encode() + b"\n")
        if sync:
            os.sync()  # the list vouches for the files, which were not synced one by one
