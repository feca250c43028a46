"""Exports and lock files of a dataset never overwrite the dataset itself."""

from collections.abc import Iterable, Iterator

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import local_path
from pmd_pipeline.contract.paths import ShardPaths


def refuse_overwrite(out: str, shards: Iterable[str], written: Iterable[str]) -> None:
    """Check that no address in `written` is that of a file of one of `shards`.

    Args:
        out: folder of `written`, for the message.

    Raises:
        PmdError: an address is.
    """
    kept = {path for shard in shards for file in _shard_files(shard) for path in _resolved(file)}
    if any(path in kept for file in written for path in _resolved(file)):
        raise PmdError(f"--out {out} is where the dataset itself lies: give another folder")


def _shard_files(shard: str) -> tuple[str, ...]:
    paths = ShardPaths.of(shard)
    return paths.tar, paths.ledger, paths.report, paths.codes, paths.codes_report


def _resolved(address: str) -> Iterator[str]:
    """The absolute path of a local address, and of a link also that of its target."""
    path = local_path(address)
    if path is None:
        yield address
        return
    yield str(path.parent.resolve() / path.name)
    if path.is_symlink():
        yield str(path.resolve())
