"""Names of the files of a dataset; no other module builds one."""

from dataclasses import dataclass


def part_name(part: int) -> str:
    """The first part of the names of a part's files.

    >>> part_name(7)
    '00007'
    """
    return f"{part:05d}"


@dataclass(frozen=True)
class ShardPaths:
    """Addresses of the files of one shard.

    Args:
        base: what the addresses have in common: everything up to the first dot of the file name.

    >>> ShardPaths.of("data/shards/coco/00007.tar").ledger
    'data/shards/coco/00007.parquet'
    >>> ShardPaths.in_folder("data/shards/coco", 7).codes
    'data/shards/coco/00007.codes.safetensors'
    """

    base: str

    @classmethod
    def of(cls, address: str) -> "ShardPaths":
        """The files beside a shard: its tar, or the Parquet file of a shard of texts."""
        return cls(address.removesuffix(".tar").removesuffix(".parquet"))

    @classmethod
    def in_folder(cls, folder: str, part: int) -> "ShardPaths":
        """The files of a part in the folder of its source's shards."""
        gap = "" if not folder or folder.endswith("/") else "/"
        return cls(f"{folder}{gap}{part_name(part)}")

    @property
    def name(self) -> str:
        """`base` without the folder."""
        return self.base.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """The folder of the files; `.` where the address names none."""
        return self.base.rpartition("/")[0] or "."

    @property
    def tar(self) -> str:
        """The WebDataset tar."""
        return f"{self.base}.tar"

    @property
    def ledger(self) -> str:
        """The ledger; of a shard of texts, the shard itself."""
        return f"{self.base}.parquet"

    @property
    def report(self) -> str:
        """The report, written last."""
        return f"{self.base}.json"

    @property
    def previous_report(self) -> str:
        """The report of the earlier build, kept during a rebuild of the part."""
        return f"{self.base}.before.json"

    @property
    def codes(self) -> str:
        """The image codes."""
        return f"{self.base}.codes.safetensors"

    @property
    def codes_report(self) -> str:
        """The report of the image codes, written after them."""
        return f"{self.base}.codes.json"
