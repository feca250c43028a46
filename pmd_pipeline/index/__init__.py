"""First stage: upstream's rows, chosen and ordered by key, become the records of an index."""
