"""Image codes beside a shard: whether they are there, whole, and of this very shard."""

from collections.abc import Iterable

from pydantic import ValidationError

from pmd_pipeline.contract.digests import digest
from pmd_pipeline.contract.files import read_bytes
from pmd_pipeline.contract.manifest import sealed
from pmd_pipeline.contract.models import FORMAT, CodeRules, CodesReport, Manifest, ShardEntry


def done_codes(shard: str, entry: ShardEntry, there: dict[str, int]) -> CodesReport | None:
    """The report of a shard's codes, if they are whole and of this very shard, by whatever rules.

    `there` are the sizes of the files in the folder of the shard, by name.
    """
    base = shard.removesuffix(".tar")
    name = base.rpartition("/")[2]
    if f"{name}.codes.json" not in there:
        return None
    try:
        report = CodesReport.model_validate_json(read_bytes(f"{base}.codes.json"))
    except ValidationError:
        return None  # of an older format
    whole = there.get(report.file.name) == report.file.num_bytes
    return report if whole and report.dependency == codes_dependency(entry, report.rules) else None


def codes_dependency(entry: ShardEntry, rules: CodeRules) -> str:
    """Digest of what a shard's codes depend on."""
    return digest(
        {
            "format": FORMAT,
            "tar": entry.sha256,
            "ledger": entry.ledger_sha256,
            "rules": rules.model_dump(mode="json"),
        }
    )


def with_codes(manifest: Manifest, reports: Iterable[CodesReport]) -> Manifest:
    """The manifest with its shards' image codes, if all have them by one rule; else without."""
    found = {(report.source, report.part): report for report in reports}
    coded = [found.get((shard.source, shard.part)) for shard in manifest.shards]
    rules = one_rule(report.rules if report else None for report in coded)
    shards = [
        shard.model_copy(
            update={
                "codes_sha256": report.file.sha256 if report and rules else None,
                "views": report.views if report and rules else None,
            }
        )
        for shard, report in zip(manifest.shards, coded, strict=True)
    ]
    return sealed(manifest.model_copy(update={"shards": shards, "codes": rules}))


def one_rule(given: Iterable[CodeRules | None]) -> CodeRules | None:
    """The rules that all share; None where some have others, or none."""
    found = set(given)
    return found.pop() if len(found) == 1 else None
