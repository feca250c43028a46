"""The provenance of a dataset, as an in-toto statement with an SLSA predicate."""

from typing import Any

from pmd_pipeline.contract.models import Manifest

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:pmd-flava:build:v1"
"""A build of shards from rules and upstream files; the same input gives the same bytes."""


def provenance(manifest: Manifest, wheel: tuple[str, str]) -> dict[str, Any]:
    """The subjects that were built, from which files, by which rules, with which code.

    It has no times, so that it is the same for the same dataset. It is not signed.

    Args:
        wheel: file name and sha256 of the project's wheel.
    """
    name, sha256 = wheel
    upstream = [
        _artifact(f"{source}/{file.name}", file.sha256)
        for source, entry in sorted(manifest.sources.items())
        for file in entry.upstream
    ]
    tokenizer = (
        [_artifact(f"image tokenizer {manifest.codes.tokenizer}", manifest.codes.sha256)]
        if manifest.codes
        else []
    )
    return {
        "_type": STATEMENT,
        "subject": [
            _artifact(f"dataset {manifest.name}", manifest.digest),
            *(_artifact(shard.path, shard.sha256) for shard in manifest.shards),
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "sources": {
                        source: {
                            "rules": entry.rules,
                            "rules_sha256": entry.rules_sha256,
                            "limit": entry.limit,
                            "heldout": entry.leakage,
                        }
                        for source, entry in sorted(manifest.sources.items())
                    },
                    "codes": manifest.codes.model_dump() if manifest.codes else None,
                },
                "internalParameters": {"format": manifest.format, "versions": manifest.versions},
                "resolvedDependencies": [*upstream, *tokenizer, _artifact(name, sha256)],
            },
            "runDetails": {
                "builder": {
                    "id": "urn:pmd-flava:pmd",
                    "version": {"pmd-flava": name.split("-")[1]},
                },
                "byproducts": [_artifact(s.ledger_path, s.ledger_sha256) for s in manifest.shards],
            },
        },
    }


def _artifact(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}
