"""What becomes of a record: bytes are judged and made a picture, or there is a reason why not."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.filters import image as image_filters
from pmd_pipeline.images.decode.processing import (
    StoredImage,
    make_stored_image,
    open_image,
    upright_size,
)
from pmd_pipeline.images.fetch.client import Fetched
from pmd_pipeline.index.records import IndexRecord
from pmd_pipeline.recipe import Images, predicate

_WRONG_SIZE = 0.05
"""How far the proportions of an image with boxes may be from upstream's, as a share."""


@dataclass(frozen=True)
class ImageResult:
    """What became of one record: a picture, or the reason why there is none.

    `attempts` says how often its address was asked; 0 where nobody was.
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
    """Makes pictures by the rules of a recipe."""

    def __init__(self, rules: Images) -> None:
        self._rules = rules
        self._checks = _checks(rules.filters)

    def outcome(self, found: Fetched | RecordError) -> ImageResult:
        """What becomes of an image, whichever record it is for; see `check_record`."""
        if isinstance(found, RecordError):
            return ImageResult(
                status=Status.FAILED_TO_DOWNLOAD,
                reason=found.kind,
                detail=found.detail,
                attempts=found.attempts,
            )
        outcome = _fetched(found)
        try:
            if len(found.body) > self._rules.max_bytes:
                raise RecordError("too_large", f"more than {self._rules.max_bytes} bytes")
            image = open_image(found.body, self._rules)
            size = found.original_size or upright_size(image)
            outcome = replace(outcome, original_size=size)
            for name, passes in self._checks.items():
                if not passes(size):
                    return replace(outcome, status=Status.DROPPED, reason=name)
            return replace(outcome, image=make_stored_image(found.body, image, self._rules))
        except RecordError as error:
            return _failed(outcome, error.kind, error.detail)

    def failed(self, found: Fetched, reason: str, detail: str) -> ImageResult:
        """The outcome of an image that is not even looked at."""
        return _failed(_fetched(found), reason, detail)


def check_record(record: IndexRecord, outcome: ImageResult) -> ImageResult:
    """The outcome of an image for one of the records that it may be for."""
    if outcome.sha256 is None or outcome.reason == "too_large":
        return outcome
    if record.sha256 and record.sha256 != outcome.sha256:
        other = replace(outcome, original_size=(None, None))
        return _failed(other, "changed", "not the bytes whose sha256 upstream states")
    if (
        record.boxes
        and outcome.status != Status.DROPPED
        and not _fits(outcome.original_size, record)
    ):
        return _failed(outcome, "wrong_size", "the boxes belong to other proportions")
    return outcome


def _checks(filters: Mapping[str, Mapping[str, Any]]) -> dict[str, Callable[..., bool]]:
    return {name: predicate(image_filters, name, keywords) for name, keywords in filters.items()}


def _fetched(found: Fetched) -> ImageResult:
    return ImageResult(
        fetched_bytes=len(found.body),
        sha256=found.sha256 or hashlib.sha256(found.body).hexdigest(),
        final_url=found.final_url,
        attempts=found.attempts,
    )


def _failed(outcome: ImageResult, reason: str, detail: str) -> ImageResult:
    return replace(
        outcome,
        image=None,
        status=Status.FAILED_TO_RESIZE,
        reason=reason,
        detail=detail,
    )


def _fits(size: tuple[int | None, int | None], record: IndexRecord) -> bool:
    width, height = size
    if not (width and height and record.width and record.height):
        return True
    stated = record.width / record.height
    return abs(width / height - stated) <= _WRONG_SIZE * stated
