"""Checks of a shard of texts: one Parquet file, which is its own ledger."""

from itertools import pairwise

from pmd_pipeline.contract.files import read_bytes
from pmd_pipeline.contract.models import ShardEntry
from pmd_pipeline.contract.schemas import TEXT_SCHEMA
from pmd_pipeline.inspect.verify.findings import Content, ShardFindings, check_content
from pmd_pipeline.inspect.verify.ledger import read_parquet


def check_texts(entry: ShardEntry, path: str, findings: ShardFindings) -> None:
    """Check the bytes, the rows and the tokens of the shard at `path`."""
    content = b""
    with findings.catch_errors(path):
        content = read_bytes(path)
        expected = Content(entry.sha256, entry.num_bytes)
        check_content(path, Content.of(content), expected, findings)
    table = read_parquet(content, path, TEXT_SCHEMA, findings) if content else None
    if table is None:
        return
    if table.num_rows != entry.pairs:
        findings.add(path, f"has {table.num_rows:,} rows, {entry.pairs:,} by the manifest")
    tokens = 0
    keys: list[str] = []
    for number, row in enumerate(table.to_pylist()):
        if not (row["text"] and row["keys"] and row["tokens"]):
            findings.add(path, f"row {number:,} has no text, no documents or no tokens")
        tokens += row["tokens"] or 0
        keys += row["keys"] or ()
    if findings.report and tokens != findings.report.tokens:
        findings.add(path, f"has {tokens:,} tokens, {findings.report.tokens:,} by the report")
    for before, after in pairwise(keys):
        if before > after:  # equal keys: a long document continues in the next row
            findings.add(
                path, f"has documents in another order than that of keys: {after} is after {before}"
            )
    if keys:
        findings.keys = keys[0], keys[-1]
