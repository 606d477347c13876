"""Samples to micro-batches: which, in what order, and where their targets and features come from."""
