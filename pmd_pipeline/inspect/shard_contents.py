"""Contents of one shard: its report, its first samples or texts, and one stored image."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.compute as pc
from pydantic import ValidationError

from pmd_pipeline.base.tables import read_table
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import open_read, read_bytes
from pmd_pipeline.contract.models import Report
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import column, ledger_rows

_NUM_SHOWN = 5
"""Samples or sequences that are shown of a shard."""


@dataclass(frozen=True)
class TextSequence:
    """One row of a shard of texts; `keys` are those of its documents."""

    row: int
    text: str
    tokens: int
    keys: list[str]


@dataclass(frozen=True)
class ShardContents:
    """A shard's report and its first samples or sequences, by name."""

    shard: str
    report: Report
    first: dict[str, dict[str, Any]] = field(default_factory=dict)


def shard_contents(shard: str) -> ShardContents:
    """The contents of the tar, or of the Parquet file of texts, at `shard`.

    Raises:
        PmdError: there is no shard with a report and a ledger at `shard`.
    """
    paths = ShardPaths.of(shard)
    report = load_report(paths.report)
    if report.ledger == report.tar:
        texts = list(read_texts(paths.ledger, _NUM_SHOWN))
        return ShardContents(shard, report, {f"sequence {one.row}": asdict(one) for one in texts})
    with open_read(paths.ledger) as file:
        table = read_table(file, address=paths.ledger)
    kept = table.filter(pc.equal(column(table, "status"), Status.SUCCESS)).slice(0, _NUM_SHOWN)
    samples = {row.key: {"caption": row.caption, "url": row.url} for row in ledger_rows(kept)}
    return ShardContents(shard, report, samples)


def load_report(address: str) -> Report:
    """The report at `address`.

    Raises:
        PmdError: there is none, or it is of another format.
    """
    try:
        return Report.model_validate_json(read_bytes(address))
    except ValidationError as error:
        raise PmdError(f"{address} is no report of this version: build the shard again") from error


def read_texts(address: str, limit: int | None = None) -> Iterator[TextSequence]:
    """The rows of a shard of texts, at most `limit`."""
    with open_read(address) as file:
        table = read_table(file, address=address)
    for number, row in enumerate(table.slice(0, limit).to_pylist()):
        yield TextSequence(row=number, **row)


def read_bytes_at(address: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file, from `offset` on."""
    with open_read(address) as file:
        file.seek(offset)
        return file.read(size)
