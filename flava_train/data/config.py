"""The section `data` of a configuration: where the data is and how it is read."""

from dataclasses import dataclass
from pathlib import Path

from flava_train.data.file_cache import FileCache


@dataclass(frozen=True)
class DataConfig:
    """Where the data is, and how it is read.

    Args:
        pairs: manifest of pairs; a path, or an address such as `s3://pmd/manifests/pmd.json`.
        images: manifest of images without captions.
        texts: manifests of texts; several are mixed in proportion to their sizes.
        tokenizer: a `vocab.txt`, a `tokenizer.json`, a folder with either, or an id on the hub.
        revision: the commit on the hub.
        caption_tokens: most tokens of a caption, `[CLS]` and `[SEP]` included.
        text_tokens: most tokens of a text, likewise.
        window_shards: approximate number of shards that are shuffled together and open at a time.
        cache: folder for copies of shards that are not on this machine.
        cache_gib: size limit of all copies; the least recently used are removed.
        workers: loader processes for each rank.
        verify: compare the SHA-256 of each shard before it is used.
        renormalise: share the steps of a stream that has no manifest among the others.
    """

    pairs: str | None = None
    images: str | None = None
    texts: tuple[str, ...] = ()
    tokenizer: str = ""
    revision: str | None = None
    caption_tokens: int = 77
    text_tokens: int = 512
    window_shards: int = 16
    cache: str | None = None
    cache_gib: float = 200.0
    workers: int = 2
    verify: bool = True
    renormalise: bool = False

    def manifests(self, stream: str) -> tuple[str, ...]:
        """Addresses of a stream's manifests."""
        if stream == "texts":
            return self.texts
        address = self.pairs if stream == "pairs" else self.images
        return (address,) if address else ()

    def file_cache(self) -> FileCache:
        """The cache through which shards are read, held-out shards included."""
        folder = Path(self.cache) if self.cache else None
        return FileCache(folder, int(self.cache_gib * 2**30), verify=self.verify)
