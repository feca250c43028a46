"""Second stage: the images of records are fetched into a shard with its ledger and its report."""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import urlsplit

from pmd_pipeline.base.parallel import ReportProgress
from pmd_pipeline.base.record import url_id
from pmd_pipeline.base.stopwatch import Stopwatch
from pmd_pipeline.base.storage import remove, sizes
from pmd_pipeline.contract.files import local_path, whole_file, write_whole
from pmd_pipeline.contract.models import FileDigest, Report, Timing
from pmd_pipeline.contract.paths import ShardPaths, part_name
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LedgerRow, ledger_bytes
from pmd_pipeline.images.decode.isolation import isolated_processor
from pmd_pipeline.images.decode.processor import ImageProcessor, ImageResult, check_record
from pmd_pipeline.images.fetch.client import FetchClient, fetch_client
from pmd_pipeline.index.records import IndexRecord
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.shards.image_locations import WEB_LOCATION, ImageLocation, fetch_function
from pmd_pipeline.shards.optout import OptOut, load_list
from pmd_pipeline.shards.pipeline import FetchPipeline
from pmd_pipeline.shards.report import counts_of, images_of, valid_report, versions, words_of
from pmd_pipeline.shards.reuse import Exclusions, KnownResults, earlier_shard
from pmd_pipeline.shards.samples import build_shard
from pmd_pipeline.shards.shard_writer import DigestingFile, ShardWriter

_RECORDS_PER_REQUEST = 8
"""Records in flight for each concurrent request, so that slow hosts do not stop the others."""

_READERS = 32
"""Threads that read images that the user already has."""

_log = logging.getLogger(__name__)

CompleteRows: TypeAlias = Callable[[Sequence[LedgerRow]], Sequence[LedgerRow]]
"""Makes the rows of a ledger from those of the records that were fetched."""


@dataclass(frozen=True)
class ShardBuild:
    """One shard to build: by which recipe, from where, and to where.

    Args:
        part: number of the shard within its source.
        shards: folder of the source's shards.
        locations: where images are looked for, in order.
        dependency: digest of all that the shard depends on.
        optout: address beside which the list of images to leave out lies; None has no list.
        retry_reasons: failure reasons to retry; everything else of an earlier build with the same
            dependency is reused.
        workers: tasks that run at a time and send requests to the same hosts.
    """

    recipe: Recipe
    part: int
    shards: str
    locations: tuple[ImageLocation, ...] = (WEB_LOCATION,)
    dependency: str = ""
    optout: str | None = None
    retry_reasons: frozenset[str] = frozenset()
    workers: int = 1

    def __str__(self) -> str:
        return f"part {part_name(self.part)} of {self.recipe.source}"

    @property
    def paths(self) -> ShardPaths:
        """Addresses of the files of the shard."""
        return ShardPaths.in_folder(self.shards, self.part)

    @property
    def names(self) -> ShardPaths:
        """Names of the same files within their folder."""
        return ShardPaths.in_folder("", self.part)

    def exclusions(self) -> Exclusions:
        """What the shard leaves out, whatever its bytes."""
        optout = load_list(self.optout) if self.optout else OptOut()
        return Exclusions(optout, tuple(self.recipe.images.licences))


def fetch_into_shard(
    build: ShardBuild,
    records: Sequence[IndexRecord],
    report_progress: ReportProgress,
    *,
    complete: CompleteRows | None = None,
) -> Report:
    """Fetch the images of `records` into a shard, its ledger and, last, its report.

    Results of an earlier build with the same dependency are reused. A kill at any point leaves
    either the files of the earlier build with their report, or files that no report names.

    Args:
        records: in order of their keys.
        complete: makes the ledger's rows from the rows of `records`, where the ledger shall have
            more rows than these; counts are of the completed rows.

    Returns:
        The report in brief; the file has more.
    """
    stopwatch = Stopwatch()
    paths, names = build.paths, build.names
    file_sizes = sizes(build.shards)
    earlier_report = _report(build, names.report, file_sizes) or _report(
        build, names.previous_report, file_sizes
    )
    totals = _Totals()
    rows: list[LedgerRow] = []
    with whole_file(paths.tar) as raw_tar:
        tar = DigestingFile(raw_tar)
        writer = ShardWriter(tar)
        with earlier_shard(build.shards, earlier_report) as earlier:
            totals.fetched_bytes = earlier.fetched_bytes if earlier else 0
            known = KnownResults(build.exclusions(), records, build.retry_reasons, earlier)
            results = _results(build, records, known, totals, report_progress)
            for row in build_shard(build.recipe.source, records, results, writer):
                rows.append(row)
                totals.add(row)
                report_progress(totals.progress())
        writer.close()
        # No report may name files that are replaced from here on. The earlier report is kept
        # under another name: if this build is killed, the next one reuses the earlier files.
        if earlier_report:
            write_whole(paths.previous_report, earlier_report.model_dump_json(indent=1).encode())
        remove(paths.report)
    words = words_of(records, rows)
    ledger_rows = complete(rows) if complete else rows
    ledger = ledger_bytes(ledger_rows)
    write_whole(paths.ledger, ledger)
    report = report_of(
        build,
        ledger_rows,
        words=words,
        fetched_bytes=totals.fetched_bytes,
        tar=FileDigest(name=names.tar, sha256=tar.hexdigest(), num_bytes=tar.num_bytes),
        ledger=FileDigest.of(names.ledger, ledger),
        timing=stopwatch.timing(totals.attempts),
    )
    assert report.counts.unaccounted() == 0
    write_whole(paths.report, report.model_dump_json(indent=1).encode())
    if earlier_report or names.previous_report in file_sizes:
        remove(paths.previous_report)
    _log.info("%s: %d of %d images", build, report.images, report.records)
    return report.brief()


def report_of(
    build: ShardBuild,
    rows: Sequence[LedgerRow],
    *,
    words: Mapping[int, int],
    fetched_bytes: int,
    tar: FileDigest,
    ledger: FileDigest,
    timing: Timing,
) -> Report:
    """The report of a shard whose ledger has these rows.

    Args:
        words: see `words_of`; the ledger has only the first caption of a record.
        fetched_bytes: of all images, those that an earlier build fetched too.
    """
    return Report(
        source=build.recipe.source,
        part=build.part,
        dependency=build.dependency,
        counts=counts_of(rows),
        records=len(rows),
        images=images_of(rows),
        words=dict(words),
        fetched_bytes=fetched_bytes,
        tar=tar,
        ledger=ledger,
        versions=versions(build.recipe.images.format),
        timing=timing,
    )


@dataclass
class _Totals:
    """Sums over the records so far: for progress, and for the report what no ledger holds."""

    records: int = 0
    images: int = 0
    failed: int = 0
    fetched_bytes: int = 0
    attempts: dict[str, int] = field(default_factory=dict)

    def add_result(self, key: str, result: ImageResult) -> None:
        self.fetched_bytes += result.fetched_bytes
        if result.attempts > 1:
            self.attempts[key] = result.attempts

    def add(self, row: LedgerRow) -> None:
        self.records += 1
        if row.status == Status.SUCCESS:
            self.images += 1
        elif row.status != Status.DROPPED:
            self.failed += row.num_pairs

    def progress(self) -> dict[str, int]:
        return {
            "records": self.records,
            "images": self.images,
            "failed": self.failed,
            "bytes": self.fetched_bytes,
        }


def _report(build: ShardBuild, name: str, file_sizes: dict[str, int]) -> Report | None:
    return valid_report(build.shards, name, build.dependency, file_sizes)


def _results(
    build: ShardBuild,
    records: Sequence[IndexRecord],
    known: KnownResults,
    totals: _Totals,
    report_progress: ReportProgress,
) -> Iterator[ImageResult]:
    """The results of all records, in order: those that are known, and those that are fetched."""

    def report_waiting(web: FetchClient) -> None:
        report_progress(totals.progress() | {"cut": int(web.is_offline())})

    with closing(fetch_images(build, known.unknown, report_waiting)) as fetched:
        for record in records:
            result = known.result(record)
            if result is None:
                result = known.apply_exclusions(check_record(record, next(fetched)))
            totals.add_result(record.key, result)
            yield result


def fetch_images(
    build: ShardBuild, records: Sequence[IndexRecord], on_idle: Callable[[FetchClient], None]
) -> Generator[ImageResult, None, None]:
    """The results of fetching the images of `records`, in order.

    A result is the image's: `check_record` compares it with a record.

    Args:
        on_idle: called repeatedly while no result comes.
    """
    if not records:
        return
    recipe = build.recipe
    is_web = [location.is_web for location in build.locations]
    folder = local_path(build.shards)
    with (
        fetch_client(recipe.fetch, recipe.images, build.workers) as web,
        ThreadPoolExecutor(_READERS) as readers,
        isolated_processor(
            ImageProcessor(recipe.images),
            str(folder) if folder else None,
            f"{recipe.source}-{part_name(build.part)}",
        ) as processor,
    ):
        pipeline = FetchPipeline(
            loop=web.loop,
            byte_budget=web.byte_budget,
            fetch=fetch_function(build.locations, records, web, readers),
            process=lambda record, fetched: processor.process(record.key, fetched),
            max_in_flight=_RECORDS_PER_REQUEST * recipe.fetch.concurrency
            if all(is_web)
            else 2 * _READERS,
            max_per_host=web.per_host + 1,  # one waits, so that the host never does
            folder=str(folder) if folder else None,
            on_idle=lambda: on_idle(web),
        )
        yield from pipeline.results(
            records,
            host_of=_host if any(is_web) else _no_host,
            key_of=_address_key if all(is_web) else _record_key,
        )


def _host(record: IndexRecord) -> str | None:
    """The host that is asked first for a record's image."""
    try:
        return urlsplit(record.url or "").hostname
    except ValueError:
        return None  # no request will be sent


def _no_host(_record: IndexRecord) -> None:
    return None


def _address_key(record: IndexRecord) -> str:
    """Records with equal addresses share one request."""
    return url_id(record.url) if record.url else record.key


def _record_key(record: IndexRecord) -> str:
    return record.key
