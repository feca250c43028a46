"""Image codes beside a shard: whether they are complete and belong to this shard."""

from collections.abc import Iterable

from pydantic import ValidationError

from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.files import read_bytes
from pmd_pipeline.contract.manifest import sealed
from pmd_pipeline.contract.models import FORMAT, CodeRules, CodesReport, Manifest, ShardEntry
from pmd_pipeline.contract.paths import ShardPaths


def done_codes(shard: str, entry: ShardEntry, sizes: dict[str, int]) -> CodesReport | None:
    """The report of a shard's codes, by whatever rules, if they are complete and of this shard.

    Args:
        sizes: of the files in the folder of the shard, by name.
    """
    paths = ShardPaths.of(shard)
    if paths.codes_report.rpartition("/")[2] not in sizes:
        return None
    try:
        report = CodesReport.model_validate_json(read_bytes(paths.codes_report))
    except ValidationError:
        return None  # of an older format
    is_complete = sizes.get(report.file.name) == report.file.num_bytes
    is_current = report.dependency == codes_dependency(entry, report.rules)
    return report if is_complete and is_current else None


def codes_dependency(entry: ShardEntry, rules: CodeRules) -> str:
    """Digest of everything that a shard's codes depend on."""
    return digest(
        {
            "format": FORMAT,
            "tar": entry.sha256,
            "ledger": entry.ledger_sha256,
            "rules": rules.model_dump(mode="json"),
        }
    )


def with_codes(manifest: Manifest, reports: Iterable[CodesReport]) -> Manifest:
    """The manifest with the image codes of its shards if all have them by one rule, else without.

    Its digest is that of the result.
    """
    report_of = {(report.source, report.part): report for report in reports}
    in_order = [report_of.get((shard.source, shard.part)) for shard in manifest.shards]
    rules = common_rules(report.rules if report else None for report in in_order)
    shards = [
        shard.model_copy(
            update={
                "codes_sha256": report.file.sha256 if report and rules else None,
                "views": report.views if report and rules else None,
            }
        )
        for shard, report in zip(manifest.shards, in_order, strict=True)
    ]
    return sealed(manifest.model_copy(update={"shards": shards, "codes": rules}))


def common_rules(rules: Iterable[CodeRules | None]) -> CodeRules | None:
    """The rules that all share; None where some differ or have none."""
    different = set(rules)
    return different.pop() if len(different) == 1 else None
