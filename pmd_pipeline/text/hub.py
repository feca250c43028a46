"""A dataset of texts, read through the library `datasets` and saved as Parquet files."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pmd_pipeline.base.parallel import OnProgress
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import whole_file
from pmd_pipeline.recipe import Recipe

FILE_ROWS = 100_000
"""Rows of a file: at most so many are read again after an interruption."""

_GROUP_ROWS = 1000
_COMMIT = re.compile("[0-9a-f]{40}")


def dataset_folder(recipe: Recipe, raw: str) -> str:
    """The folder below `raw` for the dataset of the recipe; `raw` if it names none.

    Raises:
        PmdError: the dataset is on the hub and the recipe names no commit.
    """
    texts = recipe.texts
    if not texts.dataset:
        return raw
    if not Path(texts.dataset).exists() and not _COMMIT.fullmatch(texts.revision):
        raise PmdError(
            f"texts.dataset = {texts.dataset!r}: there is no such folder; for one of the hub, give "
            "its commit (40 hex digits) as texts.revision, since branches change"
        )
    name = digest([texts.dataset, texts.config, texts.revision, texts.split, _column(recipe)])
    return f"{raw}/dataset-{name[:12]}"


def save_dataset(recipe: Recipe, folder: str, on_progress: OnProgress) -> None:
    """Save the dataset as Parquet files in `folder`; an interrupted download is resumed.

    All files appear together, so that no reader sees a part of them.

    Raises:
        PmdError: the library is not installed, or the dataset cannot be read or has no such column.
    """
    target, column = Path(folder), _column(recipe)
    if (target / _file_name(0)).exists():  # the file that appears last
        return
    num_files = len(list(target.glob("*.parquet")))  # the hidden ones included
    with _library_errors(recipe):
        rows = iter(_streaming_dataset(recipe).skip(num_files * FILE_ROWS))
        while group := list(islice(rows, _GROUP_ROWS)):
            left = islice(rows, FILE_ROWS - len(group))
            with whole_file(str(target / f".{_file_name(num_files)}")) as file:
                num_rows = _write(file, group, left, column)
            on_progress(recipe.texts.dataset, {"rows": num_files * FILE_ROWS + num_rows})
            num_files += 1
    for number in reversed(range(num_files)):
        hidden = target / f".{_file_name(number)}"
        if hidden.exists():
            hidden.replace(target / _file_name(number))


def _write(
    file: BinaryIO, group: list[Mapping[str, Any]], left: Iterator[Mapping[str, Any]], column: str
) -> int:
    """Write the rows of `group` and of `left`; their number."""
    num_rows = 0
    with pq.ParquetWriter(file, pa.schema([(column, pa.string())])) as writer:
        while group:
            if column not in group[0]:
                raise PmdError(
                    f"the dataset has no column {column!r}, only {', '.join(group[0])}: name one "
                    "of them as column in the recipe's [options]"
                )
            texts = [row[column] if isinstance(row[column], str) else None for row in group]
            writer.write_table(pa.table({column: pa.array(texts, pa.string())}))
            num_rows += len(group)
            group = list(islice(left, _GROUP_ROWS))
    return num_rows


def _streaming_dataset(recipe: Recipe) -> Any:  # noqa: ANN401 - an IterableDataset of a library that may be absent
    try:
        import datasets  # noqa: PLC0415 - only who streams must have it
    except ImportError as error:
        raise PmdError(
            "texts.dataset is read by the library datasets: pip install datasets, or put files "
            "into the folder of the source"
        ) from error
    texts = recipe.texts
    return datasets.load_dataset(
        texts.dataset,
        texts.config or None,
        split=texts.split,
        revision=texts.revision or None,
        streaming=True,
    )


@contextmanager
def _library_errors(recipe: Recipe) -> Iterator[None]:
    """Turn what `datasets` raises about input, hub and network into a PmdError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise PmdError(
            f"cannot read the dataset {recipe.texts.dataset} ({reason}): run the same command "
            "again to resume, or put its files into a folder for --raw"
        ) from error


def _column(recipe: Recipe) -> str:
    return str(recipe.options["column"])


def _file_name(number: int) -> str:
    return f"{number:05d}.parquet"
