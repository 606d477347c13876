"""The distillation losses beside a plain implementation of their formulas: `python -m benchmarks.losses`."""
