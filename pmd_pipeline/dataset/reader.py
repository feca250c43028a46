"""A dataset in Python: its ledgers as polars frames, its samples in order or by key."""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from typing import Any, NoReturn, TypeVar

import polars as pl
from PIL import Image

from pmd_pipeline.base.tables import read_table
from pmd_pipeline.contract.boxes import Box
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import open_read, read_bytes
from pmd_pipeline.contract.manifest import load_manifest, located
from pmd_pipeline.contract.models import Manifest, ShardEntry
from pmd_pipeline.contract.schemas import LedgerColumn
from pmd_pipeline.shards.shard_reader import (
    ShardSample,
    decode_sample,
    read_member,
    read_samples,
    sample_captions,
)

_Item = TypeVar("_Item")

_KEPT_LEDGERS = 64
"""Ledgers that stay in memory for look-ups by key; each has about 10,000 rows."""


@dataclass(frozen=True)
class Sample:
    """One image with all its captions.

    Args:
        key: 16 hex digits; stable across rebuilds.
        source: name of the source.
        captions: in upstream's order; an image alone has none.
        boxes: one per caption as fractions of the stored image, or None.
        size: width and height of the stored image in pixels.
        content: the stored image as it lies in the tar, JPEG or WebP.
        metadata: the sample's whole JSON: `id`, `url`, `licence`, `sha256`, `meta`, ...
    """

    key: str
    source: str
    captions: Sequence[str]
    boxes: Sequence[Box] | None
    size: tuple[int, int]
    content: bytes
    metadata: dict[str, Any]
    _stored: ShardSample = field(repr=False)

    def image(self) -> Image.Image:
        """The stored image, decoded as RGB.

        Raises:
            PmdError: it is no whole image of the size that the ledger states.
        """
        return decode_sample(self._stored, self.content)


class Dataset:
    """The dataset of a manifest. Iteration gives every `Sample`, shard by shard.

    Memory does not grow with the number of samples. Files are read where they lie, in a folder or
    under any fsspec address.

    Args:
        path: of the manifest, or its address.

    Attributes:
        path: as given.
        manifest: counts, licences, rules and digests, by source.

    Raises:
        PmdError: there is no such manifest, or it was changed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.manifest: Manifest = load_manifest(path)
        self._samples = lru_cache(maxsize=_KEPT_LEDGERS)(self._read_samples)

    def __repr__(self) -> str:
        return f"Dataset({self.path!r}: {self.num_pairs:,} pairs in {self.num_images:,} images)"

    def __len__(self) -> int:
        """Samples that iteration gives."""
        return self.num_images

    @property
    def num_pairs(self) -> int:
        """Image-text pairs; of images alone, images; of texts alone, sequences."""
        return sum(shard.pairs for shard in self.manifest.shards)

    @property
    def num_images(self) -> int:
        """Images in the shards."""
        return sum(shard.images for shard in self.manifest.shards)

    def ledgers(
        self, columns: Sequence[LedgerColumn] | None = None, *, source: str | None = None
    ) -> Iterator[pl.DataFrame]:
        """One frame per shard: a row per record, kept or failed, with `source` and `part`.

        Raises:
            PmdError: a ledger is missing or damaged, or there is no such source.
        """
        for entry in self._entries(source):
            address = located(self.path, entry.ledger_path)
            table = read_table(BytesIO(read_bytes(address)), columns, address=address)
            yield pl.DataFrame(table).with_columns(
                source=pl.lit(entry.source), part=pl.lit(entry.part, pl.Int32)
            )

    def ledger(
        self, columns: Sequence[LedgerColumn] | None = None, *, source: str | None = None
    ) -> pl.DataFrame:
        """All ledgers as one frame, which is held in memory; name the columns that are needed."""
        frames = list(self.ledgers(columns, source=source))
        return pl.concat(frames) if frames else pl.DataFrame()

    def sample(self, key: str) -> Sample:
        """The sample with this key, found by the order of keys: a few ledgers are read.

        Raises:
            KeyError: no shard has an image under this key.
            PmdError: a shard is missing or damaged.
        """
        by_source: dict[str, list[ShardEntry]] = {}
        for entry in self._entries(None):
            by_source.setdefault(entry.source, []).append(entry)
        for entries in by_source.values():
            entries.sort(key=lambda entry: entry.part)  # parts are key ranges
            shard = _last_up_to(key, entries, lambda entry: self._samples(entry)[0].key)
            stored = shard and _last_up_to(key, self._samples(shard), lambda one: one.key)
            if shard and stored and stored.key == key:
                with open_read(stored.shard) as file:
                    return _sample(file, stored, shard.source)
        raise KeyError(key)

    def __iter__(self) -> Iterator[Sample]:
        return self.samples()

    def samples(self, *, source: str | None = None) -> Iterator[Sample]:
        """The samples of all shards, or of those of one source, in the order of the manifest.

        Raises:
            PmdError: a shard is missing or damaged, or there is no such source.
        """
        for entry in self._entries(source):
            samples = self._read_samples(entry)
            with open_read(located(self.path, entry.path)) as file:
                for one in samples:
                    yield _sample(file, one, entry.source)

    def _entries(self, source: str | None) -> list[ShardEntry]:
        if self.manifest.kind == "text":
            self._refuse_texts()
        if source is not None and source not in self.manifest.sources:
            known = ", ".join(sorted(self.manifest.sources))
            raise PmdError(f"{self.path} has no source {source!r}; there are {known}")
        return [
            entry
            for entry in self.manifest.shards
            if entry.images and source in {None, entry.source}
        ]

    def _refuse_texts(self) -> NoReturn:
        raise PmdError(f"{self.path} holds texts: read its Parquet shards with polars")

    def _read_samples(self, entry: ShardEntry) -> list[ShardSample]:
        return read_samples(located(self.path, entry.path), entry)


def open_manifest(path: str) -> Dataset:
    """The dataset of the manifest at `path`, a path or any fsspec address.

    >>> open_manifest("nowhere.json")
    Traceback (most recent call last):
        ...
    pmd_pipeline.contract.files.FileAbsentError: cannot read nowhere.json: there is no such file
    """
    return Dataset(path)


def _last_up_to(key: str, items: Sequence[_Item], key_of: Callable[[_Item], str]) -> _Item | None:
    """The last item whose key is not above `key`; `items` are in order of their keys."""
    number = bisect_right(items, key, key=key_of)
    return items[number - 1] if number else None


def _sample(file: Any, stored: ShardSample, source: str) -> Sample:  # noqa: ANN401 - a binary file
    content = read_member(file, stored, stored.metadata)
    text = sample_captions(stored, content)
    return Sample(
        key=stored.key,
        source=source,
        captions=text.captions,
        boxes=text.boxes or None,
        size=stored.size,
        content=read_member(file, stored, stored.image),
        metadata=json.loads(content),
        _stored=stored,
    )
