"""The report of a shard: what its ledger's rows add up to, and whether it still holds."""

from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Protocol

import cv2
import PIL
import pyarrow as pa
from PIL import features

from pmd_pipeline.base.storage import load_model
from pmd_pipeline.contract.image_format import FormatName
from pmd_pipeline.contract.models import Counts, Report
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LedgerRow
from pmd_pipeline.index.records import IndexRecord


class CountedRow(Protocol):
    """What counting needs of a row; `LedgerRow` has it."""

    @property
    def num_pairs(self) -> int:
        """Pairs of the record."""

    @property
    def status(self) -> str:
        """A `Status`."""

    @property
    def reason(self) -> str | None:
        """Why the record is not in the tar; None where it is."""


def counts_of(rows: Iterable[CountedRow]) -> Counts:
    """Pairs of the rows of a ledger, by status and reason.

    A row without a number of pairs, which only a damaged ledger has, counts as none.

    >>> counts_of([LedgerRow(key="0" * 16, id="a", num_pairs=2, status="success")]).kept
    2
    """
    pairs_in = kept = 0
    dropped, failed = Counter[str](), Counter[str]()
    for row in rows:
        num_pairs = row.num_pairs or 0
        pairs_in += num_pairs
        if row.status == Status.SUCCESS:
            kept += num_pairs
        else:
            reasons = dropped if row.status == Status.DROPPED else failed
            reasons[str(row.reason)] += num_pairs
    return Counts(
        pairs_in=pairs_in,
        kept=kept,
        dropped=dict(sorted(dropped.items())),
        failed=dict(sorted(failed.items())),
    )


def images_of(rows: Iterable[CountedRow]) -> int:
    """Rows whose image is in the tar."""
    return sum(row.status == Status.SUCCESS for row in rows)


def words_of(records: Iterable[IndexRecord], rows: Iterable[LedgerRow]) -> dict[int, int]:
    """Captions in the tar by their number of words; `rows` are those of `records`, in order."""
    words = Counter(
        len(caption.split())
        for record, row in zip(records, rows, strict=True)
        if row.status == Status.SUCCESS
        for caption in record.captions
        if caption
    )
    return dict(sorted(words.items()))


def valid_report(
    shards: str, name: str, dependency: str, file_sizes: Mapping[str, int]
) -> Report | None:
    """The report called `name` in the folder `shards`, if the shard may stay as it is.

    None where there is no report, where a file that it names has another size, or where the shard
    depends on something else than `dependency`.

    Args:
        file_sizes: bytes of the files in the folder, by name.
    """
    report = load_model(Report, shards, name) if name in file_sizes else None
    if report is None:
        return None
    is_whole = all(
        file_sizes.get(file.name) == file.num_bytes for file in (report.tar, report.ledger)
    )
    return report if is_whole and report.dependency == dependency else None


def done_report(
    shards: str, part: int, dependency: str, file_sizes: Mapping[str, int]
) -> Report | None:
    """The report of a part, in brief, if the part is done; see `valid_report`."""
    report = valid_report(shards, ShardPaths.in_folder("", part).report, dependency, file_sizes)
    return report.brief() if report else None


def versions(image_format: FormatName = "jpeg") -> dict[str, str]:
    """Libraries that determine the bytes of shards and ledgers."""
    webp = {"libwebp": features.version("webp") or "none"} if image_format == "webp" else {}
    return webp | {
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo") or "none",
        "simplejpeg": version("simplejpeg"),
        "opencv": cv2.__version__,
        "pyarrow": pa.__version__,
    }
