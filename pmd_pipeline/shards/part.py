"""One part of an index becomes one shard."""

from collections.abc import Sequence
from dataclasses import dataclass

from pmd_pipeline.base.parallel import ReportProgress
from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.models import FORMAT, Report
from pmd_pipeline.index.records import IndexPart, read_part
from pmd_pipeline.recipe import Recipe
from pmd_pipeline.shards.image_locations import ImageLocation
from pmd_pipeline.shards.shard import ShardBuild, fetch_into_shard


@dataclass(frozen=True)
class PartTask:
    """One part to build.

    Args:
        shard: what to build of it.
        index: folder of the index.
        limit: take only so many of the part's records, in key order; None takes all.
    """

    shard: ShardBuild
    index: str
    part: IndexPart
    limit: int | None = None

    def __str__(self) -> str:
        return str(self.shard)

    @property
    def num_records(self) -> int:
        """Records of the part that are built."""
        return self.part.records if self.limit is None else self.limit


def build_part(task: PartTask, report_progress: ReportProgress) -> Report:
    """Build the shard, the ledger and, last, the report of one part; the report in brief."""
    records = list(read_part(task.index, task.part, task.limit))
    return fetch_into_shard(task.shard, records, report_progress)


def part_dependency(
    recipe: Recipe, part: IndexPart, limit: int | None, locations: Sequence[ImageLocation]
) -> str:
    """Digest of all that a part depends on.

    Licences and the list of images to leave out are not in it: `Exclusions.hold` checks whether a
    part still agrees with them.
    """
    rules = recipe.shard_rules()
    rules.get("images", {}).pop("licences", None)  # texts have neither
    return digest(
        {
            "format": FORMAT,
            "index": part.kept.sha256,
            "limit": limit,
            "rules": rules,
            "places": [location.stamp for location in locations],
        }
    )
