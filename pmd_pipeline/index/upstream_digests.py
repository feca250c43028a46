"""Digests of the annotation files of an index; a file is read only if it has changed."""

from pathlib import Path

from pydantic import Field

from pmd_pipeline.base.parallel import OnProgress, Pool, ReportProgress, in_order
from pmd_pipeline.base.storage import load_model
from pmd_pipeline.contract.files import join, sha256_of, write_whole
from pmd_pipeline.contract.models import FileDigest, StoredModel
from pmd_pipeline.sources import Annotations

_CACHE_FILE = "upstream.json"


def upstream_digests(
    annotations: Annotations, folder: str, pool: Pool, on_progress: OnProgress
) -> tuple[list[FileDigest], str | None]:
    """Digests of the files that are read, and SHA-256 of the list of held-out images, if any.

    A file with the size and modification time of its last digest is not read again.
    """
    spans, heldout = annotations.spans, annotations.held_out
    files = [span.file for span in spans]
    files += [file for span in spans[:1] for _, file in span.beside]
    paths = list(dict.fromkeys(file.path for file in files + ([heldout.file] if heldout else [])))
    cache = load_model(_DigestCache, folder, _CACHE_FILE) or _DigestCache()
    stamps = {path: f"{(stat := Path(path).stat()).st_size} {stat.st_mtime_ns}" for path in paths}
    changed = [path for path in paths if cache.stamps.get(path) != stamps[path]]
    sha256 = {path: cache.sha256[path] for path in paths if path not in changed}
    sha256 |= dict(zip(changed, in_order(pool, _digest_of_file, changed, on_progress), strict=True))
    write_whole(
        join(folder, _CACHE_FILE),
        _DigestCache(stamps=stamps, sha256=sha256).model_dump_json().encode(),
    )
    read_paths = list(dict.fromkeys(file.path for file in files))
    digests = [
        FileDigest(
            name=Path(path).relative_to(annotations.folder).as_posix(),
            sha256=sha256[path],
            num_bytes=Path(path).stat().st_size,
        )
        for path in read_paths
    ]
    return digests, sha256[heldout.file.path] if heldout else None


class _DigestCache(StoredModel):
    stamps: dict[str, str] = Field(default_factory=dict)
    sha256: dict[str, str] = Field(default_factory=dict)


def _digest_of_file(path: str, _report_progress: ReportProgress) -> str:
    return sha256_of(path)
