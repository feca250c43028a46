"""Second stage: a part of an index becomes a shard with its ledger and its report."""

import hashlib
import json
import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from queue import SimpleQueue
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import cv2
import PIL
import pyarrow as pa
from PIL import features

from pmd_pipeline.errors import RecordError
from pmd_pipeline.fetch import Fetched, Web
from pmd_pipeline.filters import image as image_filters
from pmd_pipeline.format import (
    FORMAT,
    WORKED,
    Counts,
    FileDigest,
    Report,
    Timing,
    canonical_json,
    digest,
    part_name,
)
from pmd_pipeline.images import Picture, opened, picture, upright_size
from pmd_pipeline.img2dataset import open_img2dataset
from pmd_pipeline.parallel import Tick
from pmd_pipeline.recipe import Recipe, predicate
from pmd_pipeline.records import IndexPart, IndexRecord, read_part
from pmd_pipeline.shards import DigestingFile, Place, ShardWriter, ledger_bytes
from pmd_pipeline.shelves import Shelf, open_shelf
from pmd_pipeline.storage import join, load_model, remove, whole_file, write_whole

WEB = "web"
"""The place of images that stands for HTTP."""

_WRONG_SIZE = 0.05
"""How far the proportions of an image with boxes may be from upstream's, as a share."""

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")

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
    """

    recipe: Recipe
    index: str
    part: IndexPart
    limit: int | None
    shards: str
    places: tuple[str, ...]
    catalogues: tuple[tuple[str, str], ...]
    dependency: str

    def __str__(self) -> str:
        return f"part {part_name(self.part.part)} of {self.recipe.source}"


@dataclass
class Outcome:
    """What became of one record: a picture, or the reason why there is none."""

    picture: Picture | None = None
    fetched_bytes: int = 0
    sha256: str | None = None
    final_url: str | None = None
    original_size: tuple[int | None, int | None] = (None, None)
    status: str = WORKED
    reason: str | None = None
    detail: str | None = None


@dataclass
class _Work(Generic[_Item, _Answer]):
    """An item with its answer, once a thread has it; `host` is who must be asked for it."""

    item: _Item
    host: str | None
    future: Future[_Answer] | None = None


@dataclass
class _Tally:
    kept: int = 0
    images: int = 0
    fetched_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)


def build_part(task: PartTask, tick: Tick) -> Report:
    """Build the shard, the ledger and, last, the report of one part."""
    started, clock = time.time(), time.monotonic()
    recipe, name = task.recipe, part_name(task.part.part)
    remove(join(task.shards, f"{name}.json"))  # nothing may vouch for files that are being replaced
    tally, rows = _Tally(), list[dict[str, Any]]()
    with whole_file(join(task.shards, f"{name}.tar")) as raw_tar:
        tar = DigestingFile(raw_tar)
        writer = ShardWriter(tar)
        for record, outcome in _outcomes(task):
            rows.append(_stored(recipe.source, record, outcome, writer, tally))
            tick(_progress(len(rows), tally))
        writer.close()
    ledger = ledger_bytes(rows)
    write_whole(join(task.shards, f"{name}.parquet"), ledger)
    report = Report(
        source=recipe.source,
        part=task.part.part,
        dependency=task.dependency,
        counts=Counts(
            pairs_in=sum(row["num_pairs"] for row in rows),
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
        timing=Timing(started=started, seconds=time.monotonic() - clock, host=socket.gethostname()),
    )
    assert report.counts.unaccounted() == 0
    write_whole(join(task.shards, f"{name}.json"), report.model_dump_json(indent=1).encode())
    _log.info("%s: %d of %d images", task, report.images, report.records)
    return report


def done_report(task: PartTask, there: dict[str, int]) -> Report | None:
    """The part's report if it is done and nothing it depends on has changed.

    `there` are the sizes of the files in the folder of shards, by name.
    """
    name = part_name(task.part.part)
    report = load_model(Report, task.shards, f"{name}.json") if f"{name}.json" in there else None
    if report is None:
        return None
    whole = all(there.get(file.name) == file.num_bytes for file in (report.tar, report.ledger))
    return report if whole and report.dependency == task.dependency else None


def part_dependency(
    recipe: Recipe, part: IndexPart, limit: int | None, stamps: Sequence[str]
) -> str:
    """Digest of what a part depends on; `stamps` tell the places of images apart."""
    return digest(
        {
            "format": FORMAT,
            "index": part.kept.sha256,
            "limit": limit,
            "rules": recipe.shard_rules(),
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


def _outcomes(task: PartTask) -> Iterator[tuple[IndexRecord, Outcome]]:
    """Records with what became of them, in order of key, a bounded number ahead of the writer."""
    recipe = task.recipe
    records = list(read_part(task.index, task.part, task.limit))
    fetch = _fetcher(task, records)
    checks = [
        (name, predicate(image_filters, name, keywords))
        for name, keywords in recipe.images.filters.items()
    ]

    def outcome(record: IndexRecord) -> Outcome:
        return _outcome(record, recipe, fetch, checks)

    yield from _in_order(
        records,
        outcome,
        recipe.fetch.concurrency,
        _host if WEB in task.places else lambda _: None,
        2 * recipe.fetch.per_host,  # as many again may wait for it, decode or encode
    )


def _host(record: IndexRecord) -> str | None:
    """The host that a record's image is asked of first."""
    try:
        return urlsplit(record.url or "").hostname
    except ValueError:
        return None  # nobody will be asked


def _in_order(
    items: Iterable[_Item],
    answer: Callable[[_Item], _Answer],
    threads: int,
    host_of: Callable[[_Item], str | None],
    per_host: int,
) -> Iterator[tuple[_Item, _Answer]]:
    """Answers from threads, in the order of the items, at most four a thread ahead.

    One host keeps at most `per_host` threads, so that a slow one leaves some to the others.
    """
    left = iter(items)
    window = deque[_Work[_Item, _Answer]]()
    parked: dict[str | None, deque[_Work[_Item, _Answer]]] = {}
    taken = Counter[str | None]()
    ended = SimpleQueue[str | None]()
    with ThreadPoolExecutor(threads) as pool:

        def start(work: _Work[_Item, _Answer]) -> None:
            taken[work.host] += 1
            work.future = pool.submit(answer, work.item)
            work.future.add_done_callback(lambda _: ended.put(work.host))

        try:
            while True:
                for item in islice(left, 4 * threads - len(window)):
                    work = _Work[_Item, _Answer](item, host_of(item))
                    window.append(work)
                    if work.host is not None and taken[work.host] >= per_host:
                        parked.setdefault(work.host, deque()).append(work)
                    else:
                        start(work)
                if not window:
                    return
                host = ended.get()
                taken[host] -= 1
                if parked.get(host):
                    start(parked[host].popleft())
                while window and (first := window[0].future) and first.done():
                    yield window.popleft().item, first.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _fetcher(task: PartTask, records: Sequence[IndexRecord]) -> Callable[[IndexRecord], Fetched]:
    catalogues = dict(task.catalogues)
    images = task.recipe.images
    web = Web(task.recipe.fetch, images.max_bytes, images.respect)

    def ask(record: IndexRecord) -> Fetched | None:
        return web.get(record.url) if record.url else None

    shelves: list[Shelf] = []
    for place in task.places:
        if place == WEB:
            shelves.append(ask)
        elif place in catalogues:
            shelves.append(open_img2dataset(catalogues[place], records))
        else:
            shelves.append(open_shelf(place))

    def fetch(record: IndexRecord) -> Fetched:
        for shelf in shelves:
            found = shelf(record)
            if found is not None:
                return found
        raise RecordError("not_in_archive", "none of the places given has this image")

    return fetch


def _outcome(
    record: IndexRecord,
    recipe: Recipe,
    fetch: Callable[[IndexRecord], Fetched],
    checks: Sequence[tuple[str, Callable[..., bool]]],
) -> Outcome:
    try:
        fetched = fetch(record)
    except RecordError as error:
        return Outcome(status="failed_to_download", reason=error.kind, detail=error.detail)
    outcome = Outcome(
        fetched_bytes=len(fetched.body),
        sha256=fetched.sha256 or hashlib.sha256(fetched.body).hexdigest(),
        final_url=fetched.final_url,
    )
    try:
        if len(fetched.body) > recipe.images.max_bytes:
            raise RecordError("too_large", f"more than {recipe.images.max_bytes} bytes")
        if record.sha256 and record.sha256 != outcome.sha256:
            raise RecordError("changed", "not the bytes whose sha256 upstream states")
        image = opened(fetched.body, recipe.images)
        size = fetched.original_size or upright_size(image)
        outcome.original_size = size
        for name, passes in checks:
            if not passes(size):
                outcome.status, outcome.reason = "dropped", name
                return outcome
        if record.boxes and not _fits(size, record):
            raise RecordError("wrong_size", "the boxes belong to other proportions")
        outcome.picture = picture(fetched.body, image, recipe.images)
    except RecordError as error:
        outcome.status, outcome.reason = "failed_to_resize", error.kind
        outcome.detail = error.detail
    return outcome


def _fits(size: tuple[int, int], record: IndexRecord) -> bool:
    if not (record.width and record.height):
        return True
    stated = record.width / record.height
    return abs(size[0] / size[1] - stated) <= _WRONG_SIZE * stated


def _stored(
    source: str, record: IndexRecord, outcome: Outcome, writer: ShardWriter, tally: _Tally
) -> dict[str, Any]:
    """Write the sample if there is one, count it, and make its ledger row."""
    num_pairs = len(record.captions)
    tally.fetched_bytes += outcome.fetched_bytes
    places: dict[str, Place] = {}
    if outcome.picture:
        places = writer.add(record.key, _members(source, record, outcome.picture, outcome))
        tally.images += 1
        tally.kept += num_pairs
        tally.words.update(len(caption.split()) for caption in record.captions)
    else:
        reasons = tally.dropped if outcome.status == "dropped" else tally.failed
        reasons[str(outcome.reason)] += num_pairs
    image, described = places.get("jpg"), places.get("json")
    return {
        "key": record.key,
        "id": record.id,
        "url": record.url,
        "caption": record.captions[0],
        "num_pairs": num_pairs,
        "status": outcome.status,
        "reason": outcome.reason,
        "error_message": outcome.detail,
        "width": outcome.picture.width if outcome.picture else None,
        "height": outcome.picture.height if outcome.picture else None,
        "original_width": outcome.original_size[0],
        "original_height": outcome.original_size[1],
        "sha256": outcome.sha256,
        "final_url": outcome.final_url,
        "image_offset": image.offset if image else None,
        "image_size": image.size if image else None,
        "json_offset": described.offset if described else None,
        "json_size": described.size if described else None,
    }


def _members(
    source: str, record: IndexRecord, stored: Picture, outcome: Outcome
) -> dict[str, bytes]:
    described: dict[str, Any] = {
        "source": source,
        "id": record.id,
        "url": record.url,
        "captions": record.captions,
        "fields": record.fields,
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
    return {
        "jpg": stored.jpeg,
        "json": canonical_json(described).encode(),
        "txt": record.captions[0].encode(),
    }


def _progress(records: int, tally: _Tally) -> dict[str, int]:
    return {
        "records": records,
        "images": tally.images,
        "failed": sum(tally.failed.values()),
        "bytes": tally.fetched_bytes,
    }
