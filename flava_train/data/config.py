"""The section `data` of a configuration: where the data is and how it is read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """Where the data is, and how it is read.

    Args:
        pairs: manifest of pairs; a path, or an address such as `s3://pmd/manifests/pmd.json`.
        images: manifest of images without captions.
        texts: manifests of texts; more than one are mixed as they are large.
        tokenizer: a `vocab.txt`, a `tokenizer.json`, a folder with either, or an id on the hub.
        revision: the commit on the hub.
        caption_tokens: most tokens of a caption, `[CLS]` and `[SEP]` included.
        text_tokens: the same of a text.
        window_shards: about how many shards are read from at a time.
        cache: folder for copies of shards that are not on this machine.
        cache_gib: of all copies; the least recently used give way.
        workers: processes that load, for each rank.
        verify: compare the sha256 of each shard before it is used.
        renormalise: where a stream has no manifest, share its steps among the others.
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
