"""Second stage: a part of an index becomes a shard with its ledger and its report."""

import json
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import cv2
import PIL
import pyarrow as pa
from PIL import features

from pmd_pipeline.base.parallel import ReportProgress
from pmd_pipeline.base.record import url_id
from pmd_pipeline.base.storage import load_model, remove, sizes
from pmd_pipeline.build.optout import OptOut, load_list
from pmd_pipeline.build.pipeline import FetchPipeline
from pmd_pipeline.build.reuse import Exclusions, KnownOutcomes
from pmd_pipeline.build.shard_writer import ByteRange, DigestingFile, ShardWriter
from pmd_pipeline.contract.digests import canonical_json, digest
from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.files import join, local_path, whole_file, write_whole
from pmd_pipeline.contract.models import FORMAT, Counts, FileDigest, Report, Timing
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LedgerRow, ledger_bytes
from pmd_pipeline.images.decode.isolation import isolated_processor
from pmd_pipeline.images.decode.processor import ImageProcessor, ImageResult, check_record
from pmd_pipeline.images.decode.stored_image import StoredImage
from pmd_pipeline.images.fetch.client import FetchClient, FetchedImage, fetch_client
from pmd_pipeline.images.local.archives import open_archive
from pmd_pipeline.images.local.img2dataset import open_img2dataset
from pmd_pipeline.index.records import IndexPart, IndexRecord, read_part
from pmd_pipeline.recipe import Recipe

WEB = "web"
"""The place of images that stands for HTTP."""

_AHEAD = 8
"""Records that wait for hosts, for each request in flight."""

_READERS = 32
"""Threads that read images that the user already has."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartTask:
    """One part to build.

    Args:
        index: folder of the index.
        limit: take only so many of the part's records, in key order.
        shards: folder of the source's shards.
        places: where images are looked for, in order: `web`, or paths of shelves.
        catalogues: folder of the catalogue of each place that is img2dataset's.
        dependency: digest of all that the part depends on.
        optout: address beside which the list of images to leave out lies; None has no list.
        again: reasons under which what failed before is asked for again; everything else of an
            earlier build by the same dependency is taken over.
        workers: how many tasks run at a time and ask the same hosts.
    """

    recipe: Recipe
    index: str
    part: IndexPart
    limit: int | None
    shards: str
    places: tuple[str, ...]
    catalogues: tuple[tuple[str, str], ...]
    dependency: str
    optout: str | None = None
    again: frozenset[str] = frozenset()
    workers: int = 1

    def __str__(self) -> str:
        return f"part {part_name(self.part.part)} of {self.recipe.source}"


@dataclass
class _Tally:
    kept: int = 0
    images: int = 0
    fetched_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    attempts: dict[str, int] = field(default_factory=dict)


def build_part(task: PartTask, report_progress: ReportProgress) -> Report:
    """Build the shard, the ledger and, last, the report of one part; the report in brief."""
    started, clock = time.time(), time.monotonic()
    recipe, name = task.recipe, part_name(task.part.part)
    aside = f"{name}.before.json"
    there = sizes(task.shards)
    before = _whole_report(task, there, f"{name}.json") or _whole_report(task, there, aside)
    exclusions = exclusions_of(task)
    tally, rows = _Tally(), list[LedgerRow]()
    with whole_file(join(task.shards, f"{name}.tar")) as raw_tar:
        tar = DigestingFile(raw_tar)
        writer = ShardWriter(tar)
        with KnownOutcomes.of(exclusions, task.again, task.shards, before) as settled:
            tally.fetched_bytes = settled.fetched_bytes
            waits = partial(_told_waiting, report_progress, rows, tally)
            for record, outcome in _outcomes(task, settled, waits):
                rows.append(_stored(recipe.source, record, outcome, writer, tally))
                report_progress(_progress(len(rows), tally))
        writer.close()
        # nothing may vouch for files that are replaced from here on, but if it comes to nothing
        # the next build takes over what they are
        if before:
            write_whole(join(task.shards, aside), before.model_dump_json(indent=1).encode())
        remove(join(task.shards, f"{name}.json"))
    ledger = ledger_bytes(rows)
    write_whole(join(task.shards, f"{name}.parquet"), ledger)
    report = Report(
        source=recipe.source,
        part=task.part.part,
        dependency=task.dependency,
        counts=Counts(
            pairs_in=sum(row.num_pairs for row in rows),
            kept=tally.kept,
            dropped=dict(sorted(tally.dropped.items())),
            failed=dict(sorted(tally.failed.items())),
        ),
        records=len(rows),
        images=tally.images,
        words=dict(sorted(tally.words.items())),
        fetched_bytes=tally.fetched_bytes,
        tar=FileDigest(name=f"{name}.tar", sha256=tar.hexdigest(), num_bytes=tar.num_bytes),
        ledger=FileDigest.of(f"{name}.parquet", ledger),
        versions=versions(),
        timing=Timing(
            started=started,
            seconds=time.monotonic() - clock,
            host=socket.gethostname(),
            attempts=tally.attempts,
        ),
    )
    assert report.counts.unaccounted() == 0
    write_whole(join(task.shards, f"{name}.json"), report.model_dump_json(indent=1).encode())
    if before or aside in there:
        remove(join(task.shards, aside))
    _log.info("%s: %d of %d images", task, report.images, report.records)
    return report.brief()


def done_report(task: PartTask, there: dict[str, int]) -> Report | None:
    """The part's report, in brief, if it is done and nothing it depends on has changed.

    `there` are the sizes of the files in the folder of shards, by name.
    """
    report = _whole_report(task, there, f"{part_name(task.part.part)}.json")
    return report.brief() if report else None


def exclusions_of(task: PartTask) -> Exclusions:
    """What the part leaves out, whatever its bytes."""
    listed = load_list(task.optout) if task.optout else OptOut()
    return Exclusions(listed, tuple(task.recipe.images.licences))


def part_dependency(
    recipe: Recipe, part: IndexPart, limit: int | None, stamps: Sequence[str]
) -> str:
    """Digest of what a part depends on; `stamps` tell the places of images apart.

    Licences and the list of images to leave out are not in it: `Exclusions.hold` says whether a
    part still obeys them.
    """
    rules = recipe.shard_rules()
    rules.get("images", {}).pop("licences", None)  # texts have neither
    return digest(
        {
            "format": FORMAT,
            "index": part.kept.sha256,
            "limit": limit,
            "rules": rules,
            "places": list(stamps),
        }
    )


def versions() -> dict[str, str]:
    """Libraries that shape the bytes of shards and ledgers."""
    return {
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo") or "none",
        "simplejpeg": version("simplejpeg"),
        "opencv": cv2.__version__,
        "pyarrow": pa.__version__,
    }


def _whole_report(task: PartTask, there: dict[str, int], name: str) -> Report | None:
    """The report of this name, if it is of the files that are there and nothing has changed."""
    report = load_model(Report, task.shards, name) if name in there else None
    if report is None:
        return None
    whole = all(there.get(file.name) == file.num_bytes for file in (report.tar, report.ledger))
    return report if whole and report.dependency == task.dependency else None


def _outcomes(
    task: PartTask, settled: KnownOutcomes, waits: Callable[[FetchClient], None]
) -> Iterator[tuple[IndexRecord, ImageResult]]:
    """Records with what became of them, in order of key."""
    records = list(read_part(task.index, task.part, task.limit))
    fetched = _fetched(task, settled.unknown(records), waits)
    for record in records:
        known = settled.outcome(record)
        if known:
            yield record, known
        else:
            _, outcome = next(fetched)
            yield record, settled.judged(check_record(record, outcome))


def _fetched(
    task: PartTask, records: Sequence[IndexRecord], waits: Callable[[FetchClient], None]
) -> Iterator[tuple[IndexRecord, ImageResult]]:
    """Records with what came of fetching them, in order of key; `waits` is called meanwhile."""
    if not records:
        return
    recipe = task.recipe
    is_all_web = task.places == (WEB,)
    folder, name = _folder(task.shards), part_name(task.part.part)
    with (
        fetch_client(recipe.fetch, recipe.images, task.workers) as web,
        ThreadPoolExecutor(_READERS) as readers,
        isolated_processor(
            ImageProcessor(recipe.images), folder, f"{recipe.source}-{name}"
        ) as maker,
    ):
        flow = FetchPipeline(
            loop=web.loop,
            memory=web.byte_budget,
            ask=_asker(task, records, web, readers),
            make=lambda record, found: maker.process(record.key, found),
            ahead=_AHEAD * recipe.fetch.concurrency if is_all_web else 2 * _READERS,
            per_host=web.per_host + 1,  # one waits, so that the host never does
            folder=folder,
            idle=lambda: waits(web),
        )
        keys = _web_key if is_all_web else _own_key
        yield from flow.outcomes(records, _host if WEB in task.places else _no_host, keys)


def _asker(
    task: PartTask, records: Sequence[IndexRecord], web: FetchClient, readers: ThreadPoolExecutor
) -> Callable[[IndexRecord], Coroutine[Any, Any, FetchedImage]]:
    """Looks for a record's image in all places, in order."""
    catalogues = dict(task.catalogues)
    shelves = {
        place: open_img2dataset(catalogues[place], records)
        if place in catalogues
        else open_archive(place)
        for place in task.places
        if place != WEB
    }

    async def ask(record: IndexRecord) -> FetchedImage:
        for place in task.places:
            if place == WEB and record.url:
                return await web.fetch(record.url)
            if place != WEB:
                found = await web.loop.run_in_executor(readers, shelves[place], record)
                if found is not None:
                    web.byte_budget.acquire(len(found.body))
                    return found
        raise RecordError("not_in_archive", "none of the places given has this image")

    return ask


def _host(record: IndexRecord) -> str | None:
    """The host that a record's image is asked of first."""
    try:
        return urlsplit(record.url or "").hostname
    except ValueError:
        return None  # nobody will be asked


def _no_host(_record: IndexRecord) -> None:
    return None


def _web_key(record: IndexRecord) -> str:
    """What tells an image on the web from others."""
    return url_id(record.url) if record.url else record.key


def _own_key(record: IndexRecord) -> str:
    return record.key


def _folder(address: str) -> str | None:
    """The folder of this machine that the shard is written to, if it is one."""
    path = local_path(address)
    return str(path) if path else None


def _stored(
    source: str, record: IndexRecord, outcome: ImageResult, writer: ShardWriter, tally: _Tally
) -> LedgerRow:
    """Write the sample if there is one, count it, and make its ledger row."""
    num_pairs = len(record.captions)
    tally.fetched_bytes += outcome.fetched_bytes
    if outcome.attempts > 1:
        tally.attempts[record.key] = outcome.attempts
    places: dict[str, ByteRange] = {}
    if outcome.image:
        places = writer.add(record.key, _members(source, record, outcome.image, outcome))
        tally.images += 1
        tally.kept += num_pairs
        tally.words.update(len(caption.split()) for caption in record.captions if caption)
    else:
        reasons = tally.dropped if outcome.status == Status.DROPPED else tally.failed
        reasons[str(outcome.reason)] += num_pairs
    image, described = places.get("jpg"), places.get("json")
    return LedgerRow(
        key=record.key,
        id=record.id,
        url=record.url,
        caption=record.captions[0] or None,
        num_pairs=num_pairs,
        status=outcome.status,
        reason=outcome.reason,
        error_message=outcome.detail,
        width=outcome.image.width if outcome.image else None,
        height=outcome.image.height if outcome.image else None,
        original_width=outcome.original_size[0],
        original_height=outcome.original_size[1],
        sha256=outcome.sha256,
        final_url=outcome.final_url,
        image_offset=image.offset if image else None,
        image_size=image.size if image else None,
        json_offset=described.offset if described else None,
        json_size=described.size if described else None,
    )


def _members(
    source: str, record: IndexRecord, stored: StoredImage, outcome: ImageResult
) -> dict[str, bytes]:
    captions = [caption for caption in record.captions if caption]  # an image alone has none
    described: dict[str, Any] = {
        "source": source,
        "id": record.id,
        "url": record.url,
        "captions": captions,
        "fields": record.fields if captions else [],
        "width": stored.width,
        "height": stored.height,
        "original_width": outcome.original_size[0],
        "original_height": outcome.original_size[1],
        "sha256": outcome.sha256,
        "licence": record.licence,
        "meta": json.loads(record.meta) if record.meta else {},
    }
    if record.boxes:
        described["boxes"] = record.boxes
    members = {"jpg": stored.content, "json": canonical_json(described).encode()}
    return members | {"txt": captions[0].encode()} if captions else members


def _told_waiting(
    report_progress: ReportProgress, rows: Sequence[LedgerRow], tally: _Tally, web: FetchClient
) -> None:
    """Tell that the part waits for the network, if it does."""
    report_progress(_progress(len(rows), tally) | {"cut": int(web.is_offline())})


def _progress(records: int, tally: _Tally) -> dict[str, int]:
    return {
        "records": records,
        "images": tally.images,
        "failed": sum(tally.failed.values()),
        "bytes": tally.fetched_bytes,
    }
