"""The trainer: steps, processes, checkpoints, metrics."""
