"""Read and write manifests, and locate the files that they name."""

import posixpath
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import join, read_bytes, write_whole
from pmd_pipeline.contract.models import FORMAT, Manifest


def load_manifest(path: str) -> Manifest:
    """The manifest at `path`, its digest checked.

    Raises:
        PmdError: it is missing, no manifest, of another format, or was changed by hand.
    """
    content = read_bytes(path)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise PmdError(
            f"{path} is no manifest of this version: {error.errors()[0]['msg'].lower()}"
        ) from error
    if manifest.format != FORMAT:
        raise PmdError(
            f"{path} is of format {manifest.format}, this version has {FORMAT}: build it again"
        )
    if manifest.digest != manifest.computed_digest():
        raise PmdError(f"{path} was changed: its digest is not that of its content; build it again")
    return manifest


def save_manifest(path: str, manifest: Manifest) -> None:
    """Write `manifest` to `path`, as indented JSON."""
    write_whole(path, (manifest.model_dump_json(indent=1) + "\n").encode())


def located(manifest_path: str, path: str) -> str:
    """The address of a file that a manifest at `manifest_path` calls `path`.

    >>> located("s3://pmd/manifests/coco.json", "../shards/coco/00000.tar")
    's3://pmd/shards/coco/00000.tar'
    """
    if "://" in path or Path(path).is_absolute():
        return path
    folder = manifest_path.rpartition("/")[0] or "."
    scheme, colon, rest = folder.rpartition("://")
    if colon:  # an object store has no ".."
        return f"{scheme}{colon}{posixpath.normpath(join(rest, path))}"
    below, _, name = path.rpartition("/")
    return join(_resolved_folder(folder, below), name)


@lru_cache(maxsize=1024)  # one for each source of a manifest, not one for each shard
def _resolved_folder(folder: str, below: str) -> str:
    """`below` from `folder`, without ".." unless a symbolic link makes that another folder."""
    joined = posixpath.join(folder, below)
    plain = posixpath.normpath(joined)
    same = posixpath.realpath(plain) == posixpath.realpath(joined)
    return ("" if plain == "." else plain) if same else joined


def sealed(manifest: Manifest) -> Manifest:
    """The manifest with the digest of its content."""
    return manifest.model_copy(update={"digest": manifest.computed_digest()})
