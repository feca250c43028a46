"""Lists of ImageNet's training images; the hub's Parquet files are unpacked first.

The images of one part lie in all Parquet files, where reading one image means reading its whole row
group. So the files are unpacked once, into the folders in which ImageNet itself is published.
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
from pmd_pipeline.base.tables import DAMAGE
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import is_local, join, whole_file, write_whole

CLASSES_FILE = "LOC_synset_mapping.txt"
"""ImageNet's list of classes, in the order of their labels."""

_TRAIN_FOLDERS = ("train", "ILSVRC/Data/CLS-LOC/train", ".")
_PARQUET_PATTERNS = ("train-*.parquet", "data/train-*.parquet")
_WORDNET_ID = re.compile(r"n\d{8}")
_IMAGE_NAME = re.compile(r"([A-Za-z0-9_-]{1,100})\.(?:jpe?g|png)", re.IGNORECASE)
_HUB_NAME = re.compile(r"(n\d{8}_\d+)_(n\d{8})")
"""The hub appends the class to the name."""

_BATCH_ROWS = 32

Classes = Mapping[str, tuple[int, str]]
"""Label and name of each class, by WordNet id."""


@dataclass(frozen=True)
class UnpackTask:
    """A Parquet file of the hub; its images go below `folder`, their list to `folder/list`."""

    parquet: str
    folder: str
    classes: Classes

    def __str__(self) -> str:
        return f"unpacking {self.parquet}"


class _UnpackedFile(BaseModel):
    """Written after a Parquet file is unpacked; `stamp` identifies the file's version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stamp: str


@dataclass(frozen=True)
class _ImageEntry:
    """One line of a list.

    Args:
        id: name of the file without its extension.
        file: path of the image.
        num_bytes: size of the file.
        wordnet_id: of the class, as far as known.
        label: of the class, likewise.
        class_name: likewise.
    """

    id: str
    file: str
    num_bytes: int
    wordnet_id: str | None
    label: int | None
    class_name: str | None

    def json_fields(self) -> dict[str, Any]:
        fields = {
            "id": self.id,
            "file": self.file,
            "bytes": self.num_bytes,
            "class": self.wordnet_id,
            "label": self.label,
            "name": self.class_name,
        }
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class _BadEntry:
    """One line of a list for what is no image."""

    reason: str

    def json_fields(self) -> dict[str, Any]:
        return {"bad": self.reason}


def list_images(raw: str, folder: str, pool: Pool, on_progress: OnProgress) -> tuple[str, str]:
    """The folder of the lists of training images, and the folder that their paths are relative to.

    Args:
        raw: folder of ImageNet as published, or of the hub's Parquet files.
        folder: of the lists and of unpacked images.

    Raises:
        PmdError: `raw` has neither, a Parquet file is damaged, or `folder` is not local.
    """
    check_images(raw)
    root, lists = Path(raw), join(folder, "list")
    if not is_local(folder):
        raise PmdError(f"images cannot be listed in {folder}: give a local --out")
    classes = _read_classes(root)
    train = next((root / name for name in _TRAIN_FOLDERS if _has_classes(root / name)), None)
    files = [] if train else sorted(p for name in _PARQUET_PATTERNS for p in root.glob(name))
    if train:
        _write_list(join(lists, "train.jsonl"), _folder_entries(root, train, classes))
    tasks = [UnpackTask(str(path), folder, classes) for path in files]
    in_order(pool, unpack, tasks, on_progress)
    current = {"train.jsonl"} if train else {f"{path.stem}.jsonl" for path in files}
    for name in sizes(lists).keys() - current:
        if name.endswith(".jsonl"):
            remove(join(lists, name))  # its Parquet file was deleted
    return lists, raw if train else folder


def check_images(raw: str) -> None:
    """Pass a folder that has images to list.

    Raises:
        PmdError: it has none.
    """
    root = Path(raw)
    has_parquet = any(True for name in _PARQUET_PATTERNS for _ in root.glob(name))
    if not has_parquet and not any(_has_classes(root / name) for name in _TRAIN_FOLDERS):
        raise PmdError(
            f"{raw} has neither train/n01440764 and so on nor train-*.parquet: see `pmd sources "
            "imagenet1k`"
        )


def unpack(task: UnpackTask, report_progress: ReportProgress) -> None:
    """Write the images of a Parquet file as files, then their list; once for each file.

    Raises:
        PmdError: the file is damaged or has other columns.
    """
    path = Path(task.parquet)
    stat, lists = path.stat(), join(task.folder, "list")
    unpacked = _UnpackedFile(
        stamp=f"{path.name} {stat.st_size} {stat.st_mtime_ns} {len(task.classes)}"
    )
    if load_model(_UnpackedFile, lists, f"{path.stem}.json") == unpacked:
        return
    try:
        file = pq.ParquetFile(path)
        types = {field.name: field.type for field in file.schema_arrow}
        if not pa.types.is_struct(types.get("image", pa.null())):
            raise PmdError(f"{path} has no column image with bytes: is it ImageNet's?")
        columns = [name for name in ("image", "label") if name in types]
        rows = (
            row
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns)
            for row in batch.to_pylist()
        )
        _write_list(
            join(lists, f"{path.stem}.jsonl"),
            _parquet_entries(rows, path.stem, task, report_progress),
            sync=True,
        )
    except DAMAGE as error:
        message = str(error).partition("\n")[0]
        raise PmdError(
            f"cannot unpack {path} ({message}): download it again, or make room"
        ) from error
    write_whole(join(lists, f"{path.stem}.json"), unpacked.model_dump_json().encode())


def _folder_entries(root: Path, train: Path, classes: Classes) -> Iterator[_ImageEntry | _BadEntry]:
    """An entry for each file of the class folders, in order of path; hidden files are skipped."""
    for folder in sorted(path for path in train.iterdir() if _WORDNET_ID.fullmatch(path.name)):
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            match = _IMAGE_NAME.fullmatch(path.name)
            if match is None or not path.is_file():
                yield _BadEntry(f"{folder.name}/{path.name!a} is no image file")
                continue
            file = path.relative_to(root).as_posix()
            yield _entry(match[1], file, path.stat().st_size, folder.name, None, classes)


def _parquet_entries(
    rows: Iterator[dict[str, Any]],
    parquet_name: str,
    task: UnpackTask,
    report_progress: ReportProgress,
) -> Iterator[_ImageEntry | _BadEntry]:
    """An entry for each row, whose image is written first."""
    by_label = {label: wordnet_id for wordnet_id, (label, _) in task.classes.items()}
    for number, row in enumerate(rows):
        image, label = row["image"] or {}, row.get("label")
        body = image.get("bytes")
        if not isinstance(body, bytes) or not body:
            yield _BadEntry(f"row {number} of {parquet_name} has no bytes")
            continue
        stem, wordnet_id = _parse_hub_path(image.get("path"), f"{parquet_name}-{number}")
        wordnet_id = wordnet_id or (None if label is None else by_label.get(label))
        file = f"train/{wordnet_id or 'unknown'}/{stem}.JPEG"
        path = Path(task.folder, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        yield _entry(stem, file, len(body), wordnet_id, label, task.classes)
        report_progress({"rows": number + 1})


def _parse_hub_path(path: object, default: str) -> tuple[str, str | None]:
    """Name of an image without folder and extension, and its class, from the path on the hub."""
    match = _IMAGE_NAME.fullmatch(path.rsplit("/", 1)[-1]) if isinstance(path, str) else None
    stem = match[1] if match else default
    if hub_name := _HUB_NAME.fullmatch(stem):
        return hub_name[1], hub_name[2]
    wordnet_id = stem.partition("_")[0]
    return stem, wordnet_id if _WORDNET_ID.fullmatch(wordnet_id) else None


def _entry(
    stem: str,
    file: str,
    num_bytes: int,
    wordnet_id: str | None,
    label: int | None,
    classes: Classes,
) -> _ImageEntry:
    listed_label, class_name = classes.get(wordnet_id or "", (None, None))
    if label is None:
        label = listed_label
    return _ImageEntry(stem, file, num_bytes, wordnet_id, label, class_name)


def _read_classes(root: Path) -> Classes:
    """Label and name of each class; empty without a list of classes."""
    for path in (root / CLASSES_FILE, root.parent / CLASSES_FILE):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            rows = (line.partition(" ") for line in lines if line.strip())
            return {wordnet_id: (label, name) for label, (wordnet_id, _, name) in enumerate(rows)}
    return {}


def _has_classes(folder: Path) -> bool:
    return any(path.is_dir() for path in folder.glob("n" + 8 * "[0-9]"))


def _write_list(
    address: str, entries: Iterator[_ImageEntry | _BadEntry], *, sync: bool = False
) -> None:
    with whole_file(address) as file:
        for entry in entries:
            file.write(json.dumps(entry.json_fields()).encode() + b"\n")
        if sync:
            os.sync()  # the list means that the images are complete, and they were not synced
