"""The commands: extract, train, generate, cache tools, report, demo and tiny checkpoints."""
