"""Third stage: image codes beside shards, made by an image tokenizer."""
