"""Random access to the samples of one shard."""

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from flava_train.data.file_cache import ExpectedFile, FileCache
from flava_train.data.image_codes import ShardCodes, open_codes
from flava_train.data.ledgers import ShardLedger, read_captions, read_image, read_ledger
from flava_train.data.pixels import decode_rgb
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.manifest import located
from pmd_pipeline.contract.models import CodeRules, ShardEntry
from pmd_pipeline.contract.paths import ShardPaths, part_name
from pmd_pipeline.contract.sample_json import SampleCaptions


@dataclass(frozen=True)
class ShardLocation:
    """A shard of a manifest, with the files that are read of it.

    Args:
        manifest: address of the manifest, which the shard's path is relative to.
        entry: the shard's entry in the manifest.
        code_rules: how the image codes beside it were made; None if they are not read.
        captioned: its images have captions.
    """

    manifest: str
    entry: ShardEntry
    code_rules: CodeRules | None = None
    captioned: bool = True

    @property
    def address(self) -> str:
        """Address of the tar, or of the Parquet file of texts."""
        return located(self.manifest, self.entry.path)

    @property
    def shard(self) -> ExpectedFile:
        """The tar, or the Parquet file of texts."""
        return ExpectedFile(self.address, self.entry.sha256)

    @property
    def ledger(self) -> ExpectedFile | None:
        """The ledger; None for texts, whose shard is its own ledger."""
        paths = ShardPaths.of(self.address)
        if self.address == paths.ledger:
            return None
        return ExpectedFile(paths.ledger, self.entry.ledger_sha256)

    @property
    def codes(self) -> ExpectedFile | None:
        """The image codes; None if there are none, or if they are not read."""
        if not (self.code_rules and self.entry.codes_sha256):
            return None
        return ExpectedFile(ShardPaths.of(self.address).codes, self.entry.codes_sha256)

    @property
    def files(self) -> list[ExpectedFile]:
        """All files that are read."""
        return [file for file in (self.shard, self.ledger, self.codes) if file]


def load_ledger(location: ShardLocation, files: FileCache) -> ShardLedger:
    """The ledger of a shard of images.

    Raises:
        PmdError: it cannot be read, or does not fit the shard.
    """

    def read(path: Path) -> ShardLedger:
        with path.open("rb") as file:
            return read_ledger(file, location.entry)

    assert location.ledger is not None
    return files.open(location.ledger, read)


class ImageShard:
    """An open shard of images; samples are numbered in the order of the ledger.

    Reads are by offset (`pread`), so forked processes and threads may share the descriptor.

    Args:
        location: of the shard.
        ledger: of the shard.
        files: cache through which the files are opened.

    Attributes:
        address: of the tar, for errors.
        ledger: as given.
        codes: image codes; None if they are not read.
    """

    def __init__(self, location: ShardLocation, ledger: ShardLedger, files: FileCache) -> None:
        self.address = location.address
        self.ledger = ledger
        self._captioned = location.captioned
        self._descriptor = files.open(location.shard, lambda path: os.open(path, os.O_RDONLY))
        weakref.finalize(self, os.close, self._descriptor)
        self.codes: ShardCodes | None = None
        if location.codes and location.code_rules:
            rules = location.code_rules
            self.codes = files.open(
                location.codes, lambda path: open_codes(path, location.entry, rules)
            )

    def captions(self, sample: int) -> SampleCaptions:
        """The captions of a sample."""
        return read_captions(
            self._descriptor, self.ledger, sample, self.address, captioned=self._captioned
        )

    def image(self, sample: int) -> Image.Image:
        """The stored image of a sample, decoded as RGB.

        Raises:
            PmdError: it is not the image that the ledger describes.
        """
        content = read_image(self._descriptor, self.ledger, sample, self.address)
        size = int(self.ledger.widths[sample]), int(self.ledger.heights[sample])
        try:
            return decode_rgb(content, size)
        except ValueError as error:
            raise PmdError(
                f"{self.address}: {self.key(sample)} is not the image that its ledger describes: "
                f"it {error}"
            ) from error

    def key(self, sample: int) -> str:
        """The key of a sample."""
        key: str = self.ledger.keys[sample].decode()
        return key


class TextShard:
    """An open shard of texts; rows are read in groups, as the Parquet file has them.

    Args:
        location: of the shard.
        files: cache through which the file is opened.

    Raises:
        PmdError: it is not the Parquet file that the manifest describes.
    """

    def __init__(self, location: ShardLocation, files: FileCache) -> None:
        self._address = location.address
        self._name = f"{location.entry.source}-{part_name(location.entry.part)}"
        try:
            self._file = files.open(location.shard, pq.ParquetFile)
            groups = [self._file.metadata.row_group(n) for n in range(self._file.num_row_groups)]
            self._ends = np.cumsum([group.num_rows for group in groups])
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise self._mismatch(str(error)) from error
        if self._file.metadata.num_rows != location.entry.pairs:
            raise self._mismatch("it has another number of rows")

    def texts(self, rows: Sequence[int]) -> list[str]:
        """The texts of the given rows."""
        groups: dict[int, list[object]] = {}
        texts = []
        for row in rows:
            group = int(np.searchsorted(self._ends, row, side="right"))
            if group not in groups:
                groups[group] = self._read_group(group)
            text = groups[group][row - (int(self._ends[group - 1]) if group else 0)]
            if not isinstance(text, str):
                raise self._mismatch(f"row {row} has no text")
            texts.append(text)
        return texts

    def key(self, row: int) -> str:
        """An identifier of a row among all shards."""
        return f"{self._name}-{row}"

    def _read_group(self, group: int) -> list[object]:
        try:
            column = self._file.read_row_group(group, columns=["text"], use_threads=False)["text"]
        except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:
            raise self._mismatch(str(error)) from error
        texts: list[object] = column.to_pylist()
        return texts

    def _mismatch(self, detail: str) -> PmdError:
        reason = detail.partition("\n")[0]
        return PmdError(f"{self._address} is not the shard that its manifest names: {reason}")
