"""What a run stands on: its folder, its ranks, its checkpoints, and what it says of itself."""
