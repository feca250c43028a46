"""Checks of the image codes of a shard, and of their report."""

from pmd_pipeline.codes.tensors import code_faults
from pmd_pipeline.contract.files import read_bytes
from pmd_pipeline.contract.models import CodeRules, CodesReport, ShardEntry
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.inspect.verify.findings import (
    Content,
    ShardFindings,
    check_content,
    check_size,
    load_json,
)
from pmd_pipeline.inspect.verify.samples import SampleChecker


def check_codes(
    entry: ShardEntry,
    rules: CodeRules,
    paths: ShardPaths,
    samples: SampleChecker | None,
    findings: ShardFindings,
) -> None:
    """Check codes and report against the manifest, and codes against the ledger.

    Args:
        samples: of the shard's tar, all members checked; None checks no more than the size.
    """
    report = load_json(CodesReport, paths.codes_report, findings)
    if report is None:
        return
    compared = {
        "source": (report.source, entry.source),
        "part": (report.part, entry.part),
        "images": (report.images, entry.images),
        "views": (report.views, entry.views),
        "sha256": (report.file.sha256, entry.codes_sha256),
        "rules": (report.rules, rules),
    }
    for name, (actual, expected) in compared.items():
        if actual != expected:
            findings.add(paths.codes_report, f"{name} is {actual}, in the manifest {expected}")
    if samples is None:
        check_size(paths.codes, report.file.num_bytes, findings)
        return
    with findings.catch_errors(paths.codes):
        content = read_bytes(paths.codes)
        expected_content = Content(report.file.sha256, report.file.num_bytes)
        check_content(paths.codes, Content.of(content), expected_content, findings)
        for fault in code_faults(content, rules, report.views, samples.crops(rules)):
            findings.add(paths.codes, fault)
