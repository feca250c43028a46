"""What is made of a dataset is never written over it."""

from collections.abc import Iterable, Iterator

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import local_path

_ENDINGS = (".tar", ".parquet", ".json", ".codes.safetensors", ".codes.json")


def refuse_overwrite(out: str, shards: Iterable[str], written: Iterable[str]) -> None:
    """Look whether any address in `written`, below `out`, is that of a file of one of `shards`.

    Raises:
        PmdError: one is.
    """
    files = (shard.removesuffix(".tar") + ending for shard in shards for ending in _ENDINGS)
    own = {place for file in files for place in _places(file)}
    if any(place in own for file in written for place in _places(file)):
        raise PmdError(f"--out {out} is where the dataset itself lies: give another folder")


def _places(address: str) -> Iterator[str]:
    """The one place of an address; of a link on this machine, its own and that of its file."""
    path = local_path(address)
    if path is None:
        yield address
        return
    yield str(path.parent.resolve() / path.name)
    if path.is_symlink():
        yield str(path.resolve())
