"""Where a build looks for images: the web, folders, zips, tars, and shards of img2dataset."""

from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pmd_pipeline.base.parallel import Pool
from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.files import join
from pmd_pipeline.images.fetch.client import FetchClient, FetchedImage
from pmd_pipeline.images.local.archives import ImageLookup, archive_stamp, open_archive
from pmd_pipeline.images.local.img2dataset import build_catalogue, is_img2dataset, open_img2dataset
from pmd_pipeline.index.records import IndexRecord

WEB = "web"
"""The location that stands for HTTP."""

Fetch = Callable[[IndexRecord], Coroutine[Any, Any, FetchedImage]]


@dataclass(frozen=True)
class ImageLocation:
    """A place where a build looks for images.

    Args:
        address: `web`, or the path of a folder, zip or tar.
        stamp: stands for its content in the dependency of a part.
        lookup: folder of its lookup table, where the location is img2dataset's; else None.
    """

    address: str
    stamp: str
    lookup: str | None = None

    @property
    def is_web(self) -> bool:
        """Whether images are requested from their own addresses."""
        return self.address == WEB

    def open(self, records: Sequence[IndexRecord]) -> ImageLookup:
        """Open a location on this machine, for these records."""
        return open_img2dataset(self.lookup, records) if self.lookup else open_archive(self.address)


WEB_LOCATION = ImageLocation(WEB, WEB)


def image_locations(addresses: Sequence[str], folder: str, pool: Pool) -> tuple[ImageLocation, ...]:
    """The locations at `addresses`; folders of img2dataset get a new lookup table below `folder`.

    Raises:
        PmdError: an address names no folder, zip or tar that can be read.
    """
    return tuple(
        _location(address, join(folder, f"img2dataset-{number}"), pool)
        for number, address in enumerate(addresses)
    )


def fetch_function(
    locations: Sequence[ImageLocation],
    records: Sequence[IndexRecord],
    web: FetchClient,
    threads: ThreadPoolExecutor,
) -> Fetch:
    """A function that looks for a record's image in every location, in order.

    It acquires the bytes that it returns from the client's memory. It raises RecordError where no
    location has the image.
    """
    lookups = [None if location.is_web else location.open(records) for location in locations]

    async def fetch(record: IndexRecord) -> FetchedImage:
        for lookup in lookups:
            if lookup is not None:
                image = await web.loop.run_in_executor(threads, lookup, record)
                if image is not None:
                    web.byte_budget.acquire(len(image.body))
                    return image
            elif record.url:
                return await web.fetch(record.url)
        raise RecordError("not_in_archive", "none of the places given has this image")

    return fetch


def _location(address: str, lookup: str, pool: Pool) -> ImageLocation:
    if address == WEB:
        return WEB_LOCATION
    if is_img2dataset(address):
        build_catalogue(address, lookup, pool)
        return ImageLocation(address, archive_stamp(address), lookup)
    open_archive(address)  # reports a damaged archive before hours of indexing
    return ImageLocation(address, archive_stamp(address))
