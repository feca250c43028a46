"""Train FLAVA from the shards that `pmd_pipeline` builds."""
