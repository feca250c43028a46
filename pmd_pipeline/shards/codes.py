"""Image codes beside a shard: whether they are there, whole, and of this very shard."""

from pydantic import ValidationError

from pmd_pipeline.format import FORMAT, CodeRules, CodesReport, ShardEntry, digest
from pmd_pipeline.storage import read_bytes


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
