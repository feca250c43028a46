"""Build the Public Multimodal Datasets: nine sources to shards, manifest and statistics."""
