"""What lies on disk and what both packages agree on; `flava_train` imports nothing else of us."""
