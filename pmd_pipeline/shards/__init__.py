"""What a shard is: its tar and its ledger, written and read, and what lies beside them."""
