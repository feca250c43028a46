"""Digests of the annotation files that an index is made from, each read once."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pmd_pipeline.base.parallel import OnProgress, Pool, ReportProgress, in_order
from pmd_pipeline.base.storage import load_model
from pmd_pipeline.contract.files import join, sha256_of, write_whole
from pmd_pipeline.contract.models import FileDigest
from pmd_pipeline.sources.upstream.files import Span
from pmd_pipeline.sources.upstream.held_out import HeldOutImages

_NOTE = "upstream.json"


def upstream_digests(
    raw: str,
    folder: str,
    spans: Sequence[Span],
    heldout: HeldOutImages | None,
    pool: Pool,
    on_progress: OnProgress,
) -> tuple[list[FileDigest], str | None]:
    """Digests of the files that are read, and sha256 of the file of held-out images, if any.

    A file whose size and time are those of its last digest is not read again.
    """
    files = [span.file for span in spans]
    files += [file for span in spans[:1] for _, file in span.beside]
    paths = list(dict.fromkeys(file.path for file in files + ([heldout.file] if heldout else [])))
    known = load_model(_Known, folder, _NOTE) or _Known()
    stamps = {path: f"{(stat := Path(path).stat()).st_size} {stat.st_mtime_ns}" for path in paths}
    fresh = [path for path in paths if known.stamps.get(path) != stamps[path]]
    found = {path: known.sha256[path] for path in paths if path not in fresh}
    found |= dict(zip(fresh, in_order(pool, _hash, fresh, on_progress), strict=True))
    write_whole(
        join(folder, _NOTE),
        _Known(stamps=stamps, sha256=found).model_dump_json().encode(),
    )
    read = list(dict.fromkeys(file.path for file in files))
    digests = [
        FileDigest(
            name=Path(path).relative_to(raw).as_posix(),
            sha256=found[path],
            num_bytes=Path(path).stat().st_size,
        )
        for path in read
    ]
    return digests, found[heldout.file.path] if heldout else None


class _Known(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stamps: dict[str, str] = Field(default_factory=dict)
    sha256: dict[str, str] = Field(default_factory=dict)


def _hash(path: str, _tick: ReportProgress) -> str:
    return sha256_of(path)
