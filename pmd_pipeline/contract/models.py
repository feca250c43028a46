"""Reports and manifests: the JSON files of a dataset."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.names import Address, FileName, RelativePath, Sha256, TokenizerName
from pmd_pipeline.contract.paths import ShardPaths

Kind: TypeAlias = Literal["pairs", "images", "text"]
"""Kind of the samples of a dataset."""

FORMAT = 3
"""Version of the files of a dataset; a change makes every part stale."""


class StoredModel(BaseModel):
    """A JSON file or a part of one: frozen, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FileDigest(StoredModel):
    """A file by its content: `name` in its folder, SHA-256, size in bytes."""

    name: RelativePath
    sha256: Sha256
    num_bytes: int

    @classmethod
    def of(cls, name: str, content: bytes) -> "FileDigest":
        """The digest of `content`."""
        sha256 = hashlib.sha256(content).hexdigest()
        return cls(name=name, sha256=sha256, num_bytes=len(content))


class Counts(StoredModel):
    """Numbers of pairs; conservation: `pairs_in` = `kept` + all dropped + all failed.

    Args:
        pairs_in: pairs of the input.
        kept: pairs in the output.
        dropped: pairs that the recipe left out, by reason.
        failed: pairs that were lost to failures, by reason.
    """

    pairs_in: int = 0
    kept: int = 0
    dropped: dict[str, int] = Field(default_factory=dict)
    failed: dict[str, int] = Field(default_factory=dict)

    def unaccounted(self) -> int:
        """Pairs of the input that are neither kept, dropped nor failed: zero by conservation."""
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


class Timing(StoredModel):
    """Times, host and attempts; no digest covers them.

    Args:
        started: Unix time in seconds.
        seconds: wall-clock time of the work.
        host: name of the machine that did the work.
        attempts: requests per image, by key; images with one request are left out.
    """

    started: float = 0.0
    seconds: float = 0.0
    host: str = ""
    attempts: dict[str, int] = Field(default_factory=dict)


class Report(StoredModel):
    """Report of one part, written last: a part is done if its report exists.

    Args:
        dependency: digest of the inputs of the part (index part, rules, format).
        counts: pairs of the part.
        records: rows of the ledger; of texts, different documents.
        images: samples in the tar.
        words: pairs kept by their number of words.
        sequences: rows of a shard of texts.
        tokens: tokens of all sequences, [CLS] and [SEP] included.
        fetched_bytes: bytes of all images as fetched, by this build or an earlier one.
        tar: digest of the shard.
        ledger: digest of its ledger.
        versions: versions of the libraries that shape bytes.
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
        """The report without the parts that grow with the number of records."""
        timing = self.timing.model_copy(update={"attempts": {}})
        return self.model_copy(update={"timing": timing})


class CodeRules(StoredModel):
    """Settings of image codes, equal for all shards of a dataset.

    Args:
        tokenizer: `dalle` (DALL-E's dVAE), `kmeans` (patch k-means, which replaces it without
            weights), or the user's own as `module:function`.
        sha256: of the tokenizer's weights; of no bytes where it has none.
        vocabulary: codes are 0 to `vocabulary - 1`; at most 65,536.
        size: side in pixels of the square that a crop is resized to, by Lanczos.
        grid: codes along one side of that square.
        views: crops of an image without boxes: the whole image, then `views - 1` random boxes of
            (`seed`, key). An image with boxes has the whole image, then one crop per caption.
        seed: of the random boxes.
        dtype: torch name of the arithmetic of the tokenizer (`float32`, `bfloat16`).
        source_sha256: of the source file of the user's own tokenizer; None, and absent from JSON
            and digests, for a tokenizer of the package.
    """

    tokenizer: TokenizerName
    sha256: Sha256
    vocabulary: int
    size: int
    grid: int
    views: int = 1
    seed: int = 0
    dtype: str = "float32"
    source_sha256: Sha256 | None = None

    @model_serializer(mode="wrap")
    def _leave_out_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class CodesReport(StoredModel):
    """Report of the codes of one shard, written last: codes are done if their report exists.

    Args:
        dependency: digest of the inputs (tar, ledger, rules, format).
        images: records that have codes: the samples of the tar, in its order.
        views: number of crops: rows of `boxes` and `codes`.
        file: the safetensors file with `boxes`, `codes` and `first`.
        agreement: share of the codes of the first batch that equal those of float32, for other
            dtypes.
        versions: versions of the libraries that shape codes.
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


class SourceEntry(StoredModel):
    """One source of a manifest.

    Args:
        licence: of annotations and images.
        citation: what to cite.
        counts: pairs from the first upstream row to the last shard.
        images: samples in the shards.
        unique_images: distinct images among them, by the bytes as fetched.
        repeated: number of records by SHA-256, for images with the same bytes in ten records or
            more; the 20 most frequent. They are often placeholders of removed images.
        words: pairs kept by their number of words.
        tokens: tokens of all sequences of texts, [CLS] and [SEP] included.
        rules: the sections of the resolved recipe that shape data.
        rules_sha256: digest of `rules`.
        upstream: the annotation files that were read.
        leakage: digest of the `dataset_coco.json` whose held-out images were left out; `none` if
            the source shares no images with COCO; `not checked` if the file was missing.
        limit: value of `--limit`.
        optout: digest of the opt-out list.
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


class ShardEntry(StoredModel):
    """One shard of a manifest; `path` is relative to the manifest, or a URL.

    A shard of texts is a Parquet file with a column `text`, and is its own ledger. Its records and
    pairs are its rows (sequences); counts by reason are counts of documents.

    Args:
        codes_sha256: of the file of image codes beside the shard.
        views: number of crops in that file.
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
        """Path of the ledger, beside the tar."""
        return ShardPaths.of(self.path).ledger

    @property
    def codes_path(self) -> str:
        """Path of the image codes, beside the tar, where the shard has any."""
        return ShardPaths.of(self.path).codes


class Manifest(StoredModel):
    """The shards of a dataset; `digest` is the version of the dataset.

    Args:
        kind: kind of the samples, which is also what `pairs` counts: pairs, images or texts.
        codes: settings of the image codes; None unless every shard has codes.
        versions: versions of the libraries that shape bytes.
        missing: parts that are not built yet, by source; empty in a finished dataset.
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
        """SHA-256 of the canonical JSON of everything but `digest` and the paths of shards."""
        content = self.model_dump(mode="json", exclude={"digest": True})
        for shard in content["shards"]:
            del shard["path"]
        return digest(content)
