"""Training data: manifests to batches, the same for any number of ranks and workers."""
