"""Third stage: image codes beside shards, and shards with the codes inside."""
