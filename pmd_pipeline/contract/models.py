"""Reports and manifests: the JSON files of a dataset."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.names import Address, FileName, RelativePath, Sha256
from pmd_pipeline.contract.paths import ShardPaths

Kind: TypeAlias = Literal["pairs", "images", "text"]
"""What a sample of a dataset is."""

FORMAT = 3
"""Version of everything below; a change makes every part stale."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileDigest(_Stored):
    """A file by its content: `name` in its folder, SHA-256, size in bytes."""

    name: RelativePath
    sha256: Sha256
    num_bytes: int

    @classmethod
    def of(cls, name: str, content: bytes) -> "FileDigest":
        """The digest of a file whose content is at hand."""
        sha256 = hashlib.sha256(content).hexdigest()
        return cls(name=name, sha256=sha256, num_bytes=len(content))


class Counts(_Stored):
    """Pairs, by what became of them; law 1 is that they add up.

    Args:
        pairs_in: pairs that came in.
        kept: pairs that are there.
        dropped: pairs by the decision of the recipe that left them out.
        failed: pairs by the fault of the world that lost them.
    """

    pairs_in: int = 0
    kept: int = 0
    dropped: dict[str, int] = Field(default_factory=dict)
    failed: dict[str, int] = Field(default_factory=dict)

    def unaccounted(self) -> int:
        """Pairs that came in and are neither kept, dropped nor failed: zero, by law 1."""
        lost = sum(self.dropped.values()) + sum(self.failed.values())
        return self.pairs_in - self.kept - lost

    @classmethod
    def total(cls, counts: Iterable["Counts"]) -> "Counts":
        """The sum of counts, reason by reason."""
        pairs_in = kept = 0
        dropped, failed = Counter[str](), Counter[str]()
        for one in counts:
            pairs_in += one.pairs_in
            kept += one.kept
            dropped.update(one.dropped)
            failed.update(one.failed)
        return cls(
            pairs_in=pairs_in,
            kept=kept,
            dropped=dict(sorted(dropped.items())),
            failed=dict(sorted(failed.items())),
        )


class Timing(_Stored):
    """When, where, how long and after how many attempts; no digest covers it.

    Args:
        started: seconds since 1970.
        seconds: that it took.
        host: the machine that did it.
        attempts: how often the addresses of images were asked, by key; only what is above 1.
    """

    started: float = 0.0
    seconds: float = 0.0
    host: str = ""
    attempts: dict[str, int] = Field(default_factory=dict)


class Report(_Stored):
    """What became of one part; written last, so its presence means that the part is done.

    Args:
        dependency: digest of all that the part depends on (index part, rules, format).
        counts: pairs of the part.
        records: rows of the ledger; of texts, different documents.
        images: samples in the tar.
        words: pairs kept by their number of words.
        sequences: rows of a shard of texts.
        tokens: pieces in them, [CLS] and [SEP]s too.
        fetched_bytes: bytes of all images as they came, those that an earlier build fetched too.
        tar: the shard.
        ledger: its ledger.
        versions: libraries that shape bytes.
        timing: see `Timing`.
    """

    format: int = FORMAT
    source: FileName
    part: int
    dependency: str
    counts: Counts
    records: int
    images: int
    words: dict[int, int]
    sequences: int = 0
    tokens: int = 0
    fetched_bytes: int
    tar: FileDigest
    ledger: FileDigest
    versions: dict[str, str]
    timing: Timing = Timing()

    def brief(self) -> "Report":
        """The report without what grows with the records of its part."""
        timing = self.timing.model_copy(update={"attempts": {}})
        return self.model_copy(update={"timing": timing})


class CodeRules(_Stored):
    """How image codes were made; equal for all shards of a dataset.

    Args:
        tokenizer: `dalle` (DALL-E's dVAE), or `kmeans` (patch k-means, a stand-in for it).
        sha256: of the tokenizer's weights.
        vocabulary: codes are 0 to `vocabulary - 1`; at most 65,536.
        size: pixels of the square that a view is resized to, by Lanczos.
        grid: codes along each side of that square.
        views: stored views of an image without boxes: the whole image, then `views - 1` boxes drawn
            from (`seed`, key). An image with boxes has the whole, then one view for each caption.
        seed: of the drawn boxes.
        dtype: of the tokenizer's arithmetic, as torch calls it (`float32`, `bfloat16`).
    """

    tokenizer: Literal["dalle", "kmeans"]
    sha256: Sha256
    vocabulary: int
    size: int
    grid: int
    views: int = 1
    seed: int = 0
    dtype: str = "float32"


class CodesReport(_Stored):
    """The codes of one shard; written last, so its presence means that they are done.

    Args:
        dependency: digest of all that they depend on (tar, ledger, rules, format).
        images: records that have codes: the samples of the tar, in its order.
        views: rows of `boxes` and `codes`.
        file: the safetensors file with `boxes`, `codes` and `first`.
        agreement: share of codes that float32 gives too, on a sample, where `dtype` is another.
        versions: libraries that shape codes.
        timing: see `Timing`.
    """

    format: int = FORMAT
    source: FileName
    part: int
    dependency: str
    rules: CodeRules
    images: int
    views: int
    file: FileDigest
    agreement: float | None = None
    versions: dict[str, str]
    timing: Timing = Timing()


class SourceEntry(_Stored):
    """What a manifest says of one source.

    Args:
        licence: of annotations and images.
        citation: what to cite.
        counts: pairs from the first upstream row to the last shard.
        images: samples in the shards.
        unique_images: distinct images among them, by the bytes as fetched.
        repeated: sha256 of images that came as the same bytes for ten records or more, each
            with its records; at most 20, those with most. Often they stand for removed pictures.
        words: pairs kept by their number of words.
        tokens: pieces in all sequences of texts, [CLS] and [SEP]s too.
        rules: the resolved recipe, as far as it shapes data.
        rules_sha256: digest of `rules`.
        upstream: annotation files read.
        leakage: digest of the `dataset_coco.json` whose held-out images were left out, `none` where
            the source shares no images with COCO, `not checked` where no such file was there.
        limit: records asked for with `--limit`.
        optout: digest of the list of images that were left out on demand.
    """

    licence: str
    citation: str
    counts: Counts
    images: int
    unique_images: int
    repeated: dict[str, int] = Field(default_factory=dict)
    words: dict[int, int]
    tokens: int = 0
    rules: dict[str, Any]
    rules_sha256: Sha256
    upstream: list[FileDigest]
    leakage: str
    limit: int | None = None
    optout: str | None = None


class ShardEntry(_Stored):
    """One shard of a manifest; `path` is relative to the manifest, or a URL.

    A shard of kind `text` is a Parquet file with a column `text`, and is its own ledger; its
    records and pairs are its rows, while all that is counted by reason are documents.

    Args:
        codes_sha256: of the file of image codes beside the shard.
        views: rows of that file.
    """

    source: FileName
    part: int
    path: Address
    sha256: Sha256
    num_bytes: int
    ledger_sha256: Sha256
    records: int
    images: int
    pairs: int
    codes_sha256: Sha256 | None = None
    views: int | None = None

    @property
    def ledger_path(self) -> str:
        """Where the ledger is: beside the tar."""
        return ShardPaths.of(self.path).ledger

    @property
    def codes_path(self) -> str:
        """Where the image codes are, if there are any: beside the tar."""
        return ShardPaths.of(self.path).codes


class Manifest(_Stored):
    """Which shards make a dataset. `digest` is the dataset's version.

    Args:
        kind: what a sample is. The thing that is counted as a pair is then the pair, the image or
            the text.
        codes: how the image codes were made, where every shard has them.
        versions: libraries that shape bytes.
        missing: parts that are planned but not there, by source; empty in a finished dataset.
    """

    format: int = FORMAT
    name: FileName
    kind: Kind = "pairs"
    sources: dict[FileName, SourceEntry]
    shards: list[ShardEntry]
    codes: CodeRules | None = None
    versions: dict[str, str]
    missing: dict[str, list[int]] = Field(default_factory=dict)
    digest: str = ""

    def computed_digest(self) -> str:
        """sha256 of the canonical JSON of all but `digest` and where the shards lie."""
        content = self.model_dump(mode="json", exclude={"digest": True})
        for shard in content["shards"]:
            del shard["path"]
        return digest(content)
