"""The result of one record: a stored image, or the reason for its absence."""

import hashlib
from dataclasses import dataclass, replace

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.filters import image as image_filters
from pmd_pipeline.filters import pixels as pixel_filters
from pmd_pipeline.images.decode.decoder import open_image, upright_size
from pmd_pipeline.images.decode.stored_image import ResizedImage, StoredImage
from pmd_pipeline.images.fetch.client import FetchedImage
from pmd_pipeline.index.records import IndexRecord
from pmd_pipeline.recipe import Images, predicates

_MAX_ASPECT_ERROR = 0.05
"""Largest relative difference between the aspect ratio of an image with boxes and upstream's."""


@dataclass(frozen=True)
class ImageResult:
    """The stored image of one record, or the reason for its absence.

    Args:
        attempts: how often the address was requested; 0 without any request.
    """

    image: StoredImage | None = None
    fetched_bytes: int = 0
    sha256: str | None = None
    final_url: str | None = None
    original_size: tuple[int | None, int | None] = (None, None)
    status: str = Status.SUCCESS
    reason: str | None = None
    detail: str | None = None
    attempts: int = 0


class ImageProcessor:
    """Filters, resizes and encodes images by the rules of a recipe."""

    def __init__(self, rules: Images) -> None:
        self._rules = rules
        digests = rules.filters_sha256
        self._size_filters = predicates(image_filters, rules.filters, digests)
        self._pixel_filters = predicates(pixel_filters, rules.pixel_filters, digests)

    def process(self, fetched: FetchedImage | RecordError) -> ImageResult:
        """The result of a fetch; checks that depend on the record are in `check_record`."""
        if isinstance(fetched, RecordError):
            return ImageResult(
                status=Status.FAILED_TO_DOWNLOAD,
                reason=fetched.kind,
                detail=fetched.detail,
                attempts=fetched.attempts,
            )
        result = _unprocessed(fetched)
        try:
            if len(fetched.body) > self._rules.max_bytes:
                raise RecordError("too_large", f"more than {self._rules.max_bytes} bytes")
            image = open_image(fetched.body, self._rules)
            size = fetched.original_size or upright_size(image)
            result = replace(result, original_size=size)
            for name, passes in self._size_filters.items():
                if not passes(size):
                    return replace(result, status=Status.DROPPED, reason=name)
            resized = ResizedImage(fetched.body, image, self._rules)
            for name, passes in self._pixel_filters.items():
                if not passes(resized.pixels):
                    return replace(result, status=Status.DROPPED, reason=name)
            return replace(result, image=resized.encode())
        except RecordError as error:
            return _failed(result, error.kind, error.detail)

    def failure(self, fetched: FetchedImage, reason: str, detail: str) -> ImageResult:
        """The result of an image that is not processed."""
        return _failed(_unprocessed(fetched), reason, detail)


def check_record(record: IndexRecord, result: ImageResult) -> ImageResult:
    """The result of an image for one of the records that share its address."""
    if result.sha256 is None or result.reason == "too_large":
        return result
    if record.sha256 and record.sha256 != result.sha256:
        other = replace(result, original_size=(None, None))
        return _failed(other, "changed", "not the bytes whose sha256 upstream states")
    if (
        record.boxes
        and result.status != Status.DROPPED
        and not _aspect_matches(result.original_size, record)
    ):
        return _failed(result, "wrong_size", "the boxes belong to other proportions")
    return result


def _unprocessed(fetched: FetchedImage) -> ImageResult:
    return ImageResult(
        fetched_bytes=len(fetched.body),
        sha256=fetched.sha256 or hashlib.sha256(fetched.body).hexdigest(),
        final_url=fetched.final_url,
        attempts=fetched.attempts,
    )


def _failed(result: ImageResult, reason: str, detail: str) -> ImageResult:
    return replace(
        result,
        image=None,
        status=Status.FAILED_TO_RESIZE,
        reason=reason,
        detail=detail,
    )


def _aspect_matches(size: tuple[int | None, int | None], record: IndexRecord) -> bool:
    width, height = size
    if not (width and height and record.width and record.height):
        return True
    stated = record.width / record.height
    return abs(width / height - stated) <= _MAX_ASPECT_ERROR * stated
