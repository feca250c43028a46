"""The samples of a tar against the rows of its ledger."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmd_pipeline.build.tar_reader import TarMember
from pmd_pipeline.codes.crops import crop_boxes
from pmd_pipeline.contract.boxes import are_boxes
from pmd_pipeline.contract.digests import canonical_json
from pmd_pipeline.contract.models import CodeRules
from pmd_pipeline.contract.reasons import Status

_COPIED = ("id", "url", "width", "height", "original_width", "original_height", "sha256")
"""What the JSON of a sample and its row of the ledger both hold."""

_MOST_NAMES = 3
"""Named of one fault; a shard that has a ledger of another part has it in every member."""

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG's markers that begin a frame and state its size."""


class Samples:
    """The samples of a tar against the rows of its ledger.

    What the tar should hold follows from the ledger to the last byte, except for what the pictures
    show and what the JSON says beyond the ledger. `words` counts captions by their length; `boxes`
    are those of the captions of each sample in the ledger.
    """

    def __init__(
        self,
        source: str,
        kind: str,
        rows: Sequence[Mapping[str, Any]],
        tell: Callable[[str], None],
    ) -> None:
        self.words = Counter[int]()
        self._source = source
        self._kind = kind
        self._tell = tell
        self._rows = {row["key"]: row for row in rows if row["status"] == Status.SUCCESS}
        self.boxes: dict[str, list[list[float]]] = {key: [] for key in self._rows}
        extensions = ("jpg", "json", "txt") if kind == "pairs" else ("jpg", "json")
        self._expected = [f"{key}.{extension}" for key in self._rows for extension in extensions]
        self._there: list[str] = []

    def see(self, member: TarMember, content: bytes) -> None:
        """Check one member, and remember that it is there."""
        self._there.append(member.name)
        key, _, extension = member.name.partition(".")
        row = self._rows.get(key)
        if row is None:
            return
        if extension == "jpg":
            self._check_place(member, row["image_offset"], row["image_size"])
            self._check_picture(member, row, content)
        elif extension == "json":
            self._check_place(member, row["json_offset"], row["json_size"])
            for sentence in self._json_faults(row, content):
                self._say(member, sentence)
        elif extension == "txt" and content != (row["caption"] or "").encode():
            self._say(member, "is not the caption in the ledger")

    def views(self, rules: CodeRules) -> list[NDArray[np.float32]]:
        """The boxes of the views that each sample in the ledger should have."""
        return [
            crop_boxes(key, (row["width"] or 1, row["height"] or 1), own, rules.views, rules.seed)
            for (key, row), own in zip(self._rows.items(), self.boxes.values(), strict=True)
        ]

    def compare(self, *, is_whole: bool) -> None:
        """Compare what is there with what should be, once all has been seen.

        Of a tar that could not be read to its end, what is missing is not told name by name.
        """
        expected, there = set(self._expected), Counter(self._there)
        unknown = [name for name in there if name not in expected]
        missing = [name for name in self._expected if name not in there]
        self._list(unknown, "is there, but the ledger does not know it")
        self._list([name for name in there if there[name] > 1], "is there more than once")
        if is_whole:
            self._list(missing, "is missing")
        elif missing:
            self._tell(f"{len(missing):,} members could not be read")
        known = [name for name in dict.fromkeys(self._there) if name in expected]
        order = [name for name in self._expected if name in there]
        for name, other in zip(known, order, strict=True):
            if name != other:
                self._tell(f"{name} stands where {other} should be")
                return  # what comes after it is moved too

    def _list(self, names: Sequence[str], what: str) -> None:
        for name in names[:_MOST_NAMES]:
            self._tell(f"{name} {what}")
        if len(names) > _MOST_NAMES:
            self._tell(f"and {len(names) - _MOST_NAMES:,} members more, the last {names[-1]}")

    def _say(self, member: TarMember, sentence: str) -> None:
        self._tell(f"{member.name} {sentence}")

    def _check_place(self, member: TarMember, offset: int | None, size: int | None) -> None:
        if (offset, size) != (member.offset, member.size):
            self._say(
                member,
                f"lies at byte {member.offset:,} and has {member.size:,} bytes; by the ledger at "
                f"{offset} with {size}",
            )

    def _check_picture(self, member: TarMember, row: Mapping[str, Any], content: bytes) -> None:
        size = jpeg_size(content)
        if size is None:
            self._say(member, "is no JPEG")
        elif size != (row["width"], row["height"]):
            stated = f"{row['width']} x {row['height']}"
            self._say(member, f"has {size[0]} x {size[1]} pixels, by the ledger {stated}")

    def _json_faults(self, row: Mapping[str, Any], content: bytes) -> Iterator[str]:
        try:
            sample = json.loads(content)
            written = canonical_json(sample).encode()
        except (ValueError, RecursionError):
            yield "is no JSON"
            return
        if not isinstance(sample, dict) or written != content:
            yield "is not written as JSON is written here"
            return
        stated = {"source": self._source} | {name: row[name] for name in _COPIED}
        for name, value in stated.items():
            if sample.get(name) != value:
                yield f"says {name} = {sample.get(name)!r}, the ledger {value!r}"
        captions, boxes = sample.get("captions"), sample.get("boxes")
        if not isinstance(captions, list) or not all(isinstance(one, str) for one in captions):
            yield "has no list of captions"
            return
        self.words.update(len(caption.split()) for caption in captions)
        if self._kind == "pairs" and (
            len(captions) != row["num_pairs"] or captions[0] != row["caption"]
        ):
            yield "has other captions than the ledger"
        if boxes is not None and not are_boxes(boxes, len(captions)):
            yield "has boxes that are none"
        else:
            self.boxes[row["key"]] = boxes or []


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Width and height by a JPEG's own header; None where the bytes are no JPEG.

    The picture is not decoded: the build did that, and the tar's sha256 vouches for the rest.
    """
    if not content.startswith(b"\xff\xd8\xff"):
        return None
    place = 2
    while place + 9 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in _FRAMES:
            height, width = (int.from_bytes(content[place + at : place + at + 2]) for at in (5, 7))
            return width, height
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return None
