"""Records whose result is known before any request: left out, or in the files of an earlier build.

A new entry in the opt-out list, other licences, or a retry of failures changes only the parts that
it concerns, and only records without a known result are fetched. The shard is the one that a build
from nothing gives.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from io import BytesIO
from typing import Any, BinaryIO, Self

import polars as pl

from pmd_pipeline.base.tables import read_table
from pmd_pipeline.contract.files import join, open_read, read_bytes, sha256_of
from pmd_pipeline.contract.image_format import stored_format
from pmd_pipeline.contract.models import Report
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LedgerRow, ledger_rows
from pmd_pipeline.images.decode.processor import ImageResult
from pmd_pipeline.images.decode.stored_image import StoredImage
from pmd_pipeline.index.records import IndexPart, IndexRecord
from pmd_pipeline.shards.optout import REASON, OptOut

LICENCE = "licence"
"""Drop reason of pairs whose image has none of the licences that the recipe allows."""


@dataclass(frozen=True)
class Exclusions:
    """Rules that leave out records by their address or licence, or by the hash of their image.

    Args:
        optout: the list beside the dataset.
        licences: globs; an image's licence must match one of them. Empty allows every image, also
            one without a licence.
    """

    optout: OptOut = field(default_factory=OptOut)
    licences: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.optout.entries or self.licences)

    def reason(self, key: str, url: str | None, licence: str | None) -> str | None:
        """Why the record is left out without a request; None where it is not."""
        if self.optout.has_record(key, url):
            return REASON
        if self.licences and not any(
            fnmatchcase((licence or "").casefold(), glob.casefold()) for glob in self.licences
        ):
            return LICENCE
        return None

    def apply(self, result: ImageResult) -> ImageResult:
        """The result, or a drop where the fetched bytes or their address are in the list."""
        if not self.optout.has_bytes(result.sha256, result.final_url):
            return result
        return replace(result, image=None, status=Status.DROPPED, reason=REASON, detail=None)

    def still_hold(self, index: str, part: IndexPart, shards: str, report: Report) -> bool:
        """Whether the shard of `report` leaves out exactly what these rules leave out.

        False for a shard whose files are damaged.
        """
        if not self and not report.counts.dropped.keys() & {REASON, LICENCE}:
            return True
        try:
            with open_read(join(index, part.kept.name)) as file:
                records = pl.read_parquet(file, columns=["key", "url", "licence"])
            with open_read(join(shards, report.ledger.name)) as file:
                ledger = pl.read_parquet(file, columns=["key", "reason", "sha256", "final_url"])
        except pl.exceptions.PolarsError:
            return False
        return all(
            self._final_reason(row)
            == (row["reason"] if row["reason"] in {REASON, LICENCE} else None)
            for row in ledger.join(records, on="key", how="left").iter_rows(named=True)
        )

    def _final_reason(self, row: dict[str, Any]) -> str | None:
        reason = self.reason(row["key"], row["url"], row["licence"])
        if reason is None and self.optout.has_bytes(row["sha256"], row["final_url"]):
            return REASON
        return reason


class KnownResults:
    """The results of those records that need no request.

    Args:
        exclusions: rules that leave out records.
        records: of the shard.
        retry_reasons: failure reasons for which an earlier result does not count.
        earlier: the shard of an earlier build, if there is one.
    """

    def __init__(
        self,
        exclusions: Exclusions,
        records: Sequence[IndexRecord],
        retry_reasons: frozenset[str],
        earlier: "EarlierShard | None",
    ) -> None:
        self._exclusions = exclusions
        self._retry_reasons = retry_reasons
        self._earlier = earlier
        self._reasons = {
            record.key: reason
            for record in records
            if (reason := exclusions.reason(record.key, record.url, record.licence))
        }
        self.unknown = [
            record
            for record in records
            if record.key not in self._reasons and self._row(record.key) is None
        ]
        """The records that have to be fetched."""

    def result(self, record: IndexRecord) -> ImageResult | None:
        """The known result of a record; None where the record has to be fetched."""
        if reason := self._reasons.get(record.key):
            return ImageResult(status=Status.DROPPED, reason=reason)
        row = self._row(record.key)
        if row is None:
            return None
        assert self._earlier
        return self.apply_exclusions(self._earlier.result(row))

    def apply_exclusions(self, result: ImageResult) -> ImageResult:
        """See `Exclusions.apply`."""
        return self._exclusions.apply(result)

    def _row(self, key: str) -> LedgerRow | None:
        """The row of the earlier ledger, where its result still counts."""
        row = self._earlier.rows.get(key) if self._earlier else None
        if row is None or row.reason in {*self._retry_reasons, LICENCE}:
            return None
        if row.reason == REASON and not self._exclusions.optout.has_bytes(
            row.sha256, row.final_url
        ):
            return None
        return row


class EarlierShard:
    """The shard of an earlier build: its ledger by key, its tar, and the attempts of its report."""

    def __init__(self, shards: str, report: Report) -> None:
        ledger = read_table(BytesIO(read_bytes(join(shards, report.ledger.name))))
        self.rows = {row.key: row for row in ledger_rows(ledger)}
        self.fetched_bytes = report.fetched_bytes
        self._attempts = report.timing.attempts
        self._stack = ExitStack()
        self._tar: BinaryIO = self._stack.enter_context(open_read(join(shards, report.tar.name)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def result(self, row: LedgerRow) -> ImageResult:
        """The result that a row of the ledger describes."""
        return ImageResult(
            image=self._image(row),
            sha256=row.sha256,
            final_url=row.final_url,
            original_size=(row.original_width, row.original_height),
            status=row.status,
            reason=row.reason,
            detail=row.error_message,
            attempts=self._attempts.get(row.key, 0),
        )

    def _image(self, row: LedgerRow) -> StoredImage | None:
        if row.image_offset is None:
            return None
        self._tar.seek(row.image_offset)
        content = self._tar.read(row.image_size or 0)
        image_format = stored_format(content)
        assert image_format, "the tar has the digest of its report"
        return StoredImage(content, image_format, row.width or 0, row.height or 0)


@contextmanager
def earlier_shard(shards: str, report: Report | None) -> Iterator[EarlierShard | None]:
    """The shard in the folder `shards` that `report` describes, opened.

    None without a report, or where the files have other digests than it states.
    """
    if report is None or any(
        sha256_of(join(shards, file.name)) != file.sha256 for file in (report.tar, report.ledger)
    ):
        yield None
        return
    with EarlierShard(shards, report) as shard:
        yield shard
