"""Second stage: a part of an index becomes a shard, resumed, in order and within memory."""
