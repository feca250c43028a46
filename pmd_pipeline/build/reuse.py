"""Records whose fate is known before anything is fetched: left out, or as an earlier build found.

So a list of images to leave out, another choice of licences, or a second try of what failed
touches only the parts that it concerns, and asks for nothing that is there already. The shard is
the one that a build from nothing would give.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, BinaryIO, Self

import polars as pl

from pmd_pipeline.build.optout import REASON, OptOut
from pmd_pipeline.contract.files import join, open_read, read_bytes, sha256_of
from pmd_pipeline.contract.image_format import stored_format
from pmd_pipeline.contract.models import Report
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.images.decode.processor import ImageResult
from pmd_pipeline.images.decode.stored_image import StoredImage
from pmd_pipeline.index.records import IndexPart, IndexRecord

LICENCE = "licence"
"""Under which pairs are counted whose image has none of the licences allowed."""


@dataclass(frozen=True)
class Exclusions:
    """What is left out, whatever its bytes.

    Args:
        optout: the list beside the dataset.
        licences: globs, of which an image's licence must fit one; empty allows all, and none.
    """

    optout: OptOut = field(default_factory=OptOut)
    licences: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.optout.entries or self.licences)

    def reason(self, key: str, url: str | None, licence: str | None) -> str | None:
        """Why the record is left out without being fetched; None if it is not."""
        if self.optout.has_record(key, url):
            return REASON
        if self.licences and not any(
            fnmatchcase((licence or "").casefold(), glob.casefold()) for glob in self.licences
        ):
            return LICENCE
        return None

    def judged(self, outcome: ImageResult) -> ImageResult:
        """The outcome, or that the bytes are to be left out."""
        if not self.optout.has_bytes(outcome.sha256, outcome.final_url):
            return outcome
        return replace(outcome, image=None, status=Status.DROPPED, reason=REASON, detail=None)

    def hold(self, index: str, part: IndexPart, shards: str, report: Report) -> bool:
        """Say whether a part that is built leaves out what is to be left out, and nothing else.

        Of a part whose files are damaged nobody can say that.
        """
        if not self and not report.counts.dropped.keys() & {REASON, LICENCE}:
            return True
        try:
            with open_read(join(index, part.kept.name)) as file:
                records = pl.read_parquet(file, columns=["key", "url", "licence"])
            with open_read(join(shards, report.ledger.name)) as file:
                rows = pl.read_parquet(file, columns=["key", "reason", "sha256", "final_url"])
        except pl.exceptions.PolarsError:
            return False
        return all(
            self._expected(row) == (row["reason"] if row["reason"] in {REASON, LICENCE} else None)
            for row in rows.join(records, on="key", how="left").iter_rows(named=True)
        )

    def _expected(self, row: dict[str, Any]) -> str | None:
        before = self.reason(row["key"], row["url"], row["licence"])
        if before is None and self.optout.has_bytes(row["sha256"], row["final_url"]):
            return REASON
        return before


class KnownOutcomes:
    """What is known of the records of a part before they are fetched.

    Args:
        again: reasons under which what failed before is asked for again.
        fetched_bytes: of the earlier build.
    """

    def __init__(
        self,
        exclusions: Exclusions,
        again: frozenset[str],
        earlier: "_Earlier | None",
        fetched_bytes: int,
    ) -> None:
        self.fetched_bytes = fetched_bytes
        self._exclusions = exclusions
        self._again = again
        self._earlier = earlier

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._earlier:
            self._earlier.close()

    @classmethod
    def of(
        cls, exclusions: Exclusions, again: frozenset[str], shards: str, report: Report | None
    ) -> Self:
        """What is known, given the report of an earlier build of the same part by the same rules.

        A build whose files are not those of its report is not believed.
        """
        if report is None or any(
            sha256_of(join(shards, file.name)) != file.sha256
            for file in (report.tar, report.ledger)
        ):
            return cls(exclusions, again, None, 0)
        earlier = _Earlier(shards, report)
        return cls(exclusions, again, earlier, report.fetched_bytes)

    def unknown(self, records: Sequence[IndexRecord]) -> list[IndexRecord]:
        """The records that have to be fetched."""
        return [
            record
            for record in records
            if not self._reason(record) and self._row(record.key) is None
        ]

    def outcome(self, record: IndexRecord) -> ImageResult | None:
        """What is known of a record; None where it has to be fetched."""
        reason = self._reason(record)
        if reason:
            return ImageResult(status=Status.DROPPED, reason=reason)
        row = self._row(record.key)
        if row is None:
            return None
        assert self._earlier
        return self.judged(self._earlier.outcome(row))

    def judged(self, outcome: ImageResult) -> ImageResult:
        """See `Exclusions.judged`."""
        return self._exclusions.judged(outcome)

    def _reason(self, record: IndexRecord) -> str | None:
        return self._exclusions.reason(record.key, record.url, record.licence)

    def _row(self, key: str) -> dict[str, Any] | None:
        """The row of an earlier ledger that still stands."""
        row = self._earlier.rows.get(key) if self._earlier else None
        if row is None or row["reason"] in {*self._again, LICENCE}:
            return None
        if row["reason"] == REASON and not self._exclusions.optout.has_bytes(
            row["sha256"], row["final_url"]
        ):
            return None
        return row


class _Earlier:
    """The ledger of an earlier build by key, its tar, and its report."""

    def __init__(self, shards: str, report: Report) -> None:
        table = pl.read_parquet(read_bytes(join(shards, report.ledger.name)))
        self.rows = {row["key"]: row for row in table.iter_rows(named=True)}
        self._attempts = report.timing.attempts
        self._stack = ExitStack()
        tar = self._stack.enter_context(open_read(join(shards, report.tar.name)))
        self._tar: BinaryIO = tar

    def close(self) -> None:
        self._stack.close()

    def outcome(self, row: dict[str, Any]) -> ImageResult:
        picture = None
        if row["image_offset"] is not None:
            self._tar.seek(row["image_offset"])
            content = self._tar.read(row["image_size"])
            image_format = stored_format(content)
            assert image_format, "the tar has the digest of its report"
            picture = StoredImage(content, image_format, row["width"], row["height"])
        return ImageResult(
            image=picture,
            sha256=row["sha256"],
            final_url=row["final_url"],
            original_size=(row["original_width"], row["original_height"]),
            status=row["status"],
            reason=row["reason"],
            detail=row["error_message"],
            attempts=self._attempts.get(row["key"], 0),
        )
