"""Checks of the samples of a tar against the rows of its ledger."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pmd_pipeline.codes.crops import crop_boxes
from pmd_pipeline.contract.boxes import are_boxes
from pmd_pipeline.contract.digests import canonical_json
from pmd_pipeline.contract.image_format import ImageFormat, stored_format
from pmd_pipeline.contract.models import CodeRules, Kind
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import LedgerRow
from pmd_pipeline.inspect.verify.image_headers import image_size
from pmd_pipeline.shards.tar_reader import TarMember

_MAX_NAMES = 3
"""Members that are named for one kind of fault; with another part's ledger all have it."""


class SampleChecker:
    """Checks the members of a tar, one after another, against the rows of its ledger.

    The ledger determines the whole tar, except for the pixels of the images and what the JSON holds
    beyond the ledger. `words` counts captions by their number of words; `boxes` are the boxes of
    the captions of each sample in the ledger, by key.
    """

    def __init__(
        self,
        source: str,
        kind: Kind,
        image_format: ImageFormat,
        rows: Sequence[LedgerRow],
        add_fault: Callable[[str], None],
    ) -> None:
        self.words = Counter[int]()
        self._source = source
        self._kind = kind
        self._format = image_format
        self._add_fault = add_fault
        self._rows = {row.key: row for row in rows if row.status == Status.SUCCESS}
        self.boxes: dict[str, list[list[float]]] = {key: [] for key in self._rows}
        extensions = [image_format.extension, "json", *(["txt"] if kind == "pairs" else [])]
        self._expected = [f"{key}.{ext}" for key in self._rows for ext in sorted(extensions)]
        self._names: list[str] = []

    def check(self, member: TarMember, content: bytes) -> None:
        """Check one member of the tar."""
        self._names.append(member.name)
        key, _, extension = member.name.partition(".")
        row = self._rows.get(key)
        if row is None:
            return
        if extension == self._format.extension:
            self._check_place(member, row.image_offset, row.image_size)
            self._check_image(member, row, content)
        elif extension == "json":
            self._check_place(member, row.json_offset, row.json_size)
            for fault in self._json_faults(row, content):
                self._add_fault(f"{member.name} {fault}")
        elif extension == "txt" and content != (row.caption or "").encode():
            self._add_fault(f"{member.name} is not the caption in the ledger")

    def finish(self, *, is_whole: bool) -> None:
        """Compare the names of all members with those that the ledger requires.

        Args:
            is_whole: the tar was read to its end; else missing members are only counted.
        """
        expected, counts = set(self._expected), Counter(self._names)
        unknown = [name for name in counts if name not in expected]
        missing = [name for name in self._expected if name not in counts]
        self._list(unknown, "is not in the ledger")
        self._list([name for name in counts if counts[name] > 1], "is in the tar more than once")
        if is_whole:
            self._list(missing, "is missing")
        elif missing:
            self._add_fault(f"{len(missing):,} members could not be read")
        order = [name for name in counts if name in expected]
        expected_order = [name for name in self._expected if name in counts]
        for name, other in zip(order, expected_order, strict=True):
            if name != other:
                self._add_fault(f"{name} is at the place of {other}")
                return  # all members after it are displaced too

    def crops(self, rules: CodeRules) -> list[NDArray[np.float32]]:
        """The boxes of the crops whose codes each sample in the ledger must have."""
        return [
            crop_boxes(key, (row.width or 1, row.height or 1), boxes, rules.views, rules.seed)
            for (key, row), boxes in zip(self._rows.items(), self.boxes.values(), strict=True)
        ]

    def _list(self, names: Sequence[str], fault: str) -> None:
        for name in names[:_MAX_NAMES]:
            self._add_fault(f"{name} {fault}")
        if len(names) > _MAX_NAMES:
            self._add_fault(f"and {len(names) - _MAX_NAMES:,} more members, the last {names[-1]}")

    def _check_place(self, member: TarMember, offset: int | None, size: int | None) -> None:
        if (offset, size) != (member.offset, member.size):
            self._add_fault(
                f"{member.name} is at byte {member.offset:,} with {member.size:,} bytes, by the "
                f"ledger at {offset} with {size}"
            )

    def _check_image(self, member: TarMember, row: LedgerRow, content: bytes) -> None:
        size = image_size(content)
        if stored_format(content) != self._format or size is None:
            self._add_fault(f"{member.name} is no {self._format.pillow}")
        elif size != (row.width, row.height):
            self._add_fault(
                f"{member.name} has {size[0]} x {size[1]} pixels, by the ledger "
                f"{row.width} x {row.height}"
            )

    def _json_faults(self, row: LedgerRow, content: bytes) -> Iterator[str]:
        try:
            sample = json.loads(content)
            canonical = canonical_json(sample).encode()
        except (ValueError, RecursionError):
            yield "is no JSON"
            return
        if not isinstance(sample, dict) or canonical != content:
            yield "is no canonical JSON"
            return
        expected = {
            "source": self._source,
            "id": row.id,
            "url": row.url,
            "width": row.width,
            "height": row.height,
            "original_width": row.original_width,
            "original_height": row.original_height,
            "sha256": row.sha256,
        }
        for name, value in expected.items():
            if sample.get(name) != value:
                yield f"has {name} = {sample.get(name)!r}, the ledger {value!r}"
        captions, boxes = sample.get("captions"), sample.get("boxes")
        if not isinstance(captions, list) or not all(isinstance(one, str) for one in captions):
            yield "has no list of captions"
            return
        self.words.update(len(caption.split()) for caption in captions)
        if self._kind == "pairs" and (
            len(captions) != row.num_pairs or captions[:1] != [row.caption]
        ):
            yield "has other captions than the ledger"
        if boxes is not None and not are_boxes(boxes, len(captions)):
            yield "has invalid boxes"
        else:
            self.boxes[row.key] = boxes or []
