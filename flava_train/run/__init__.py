"""The parts of a run: folder, ranks, initial weights, optimizer, checkpoints, loggers."""
