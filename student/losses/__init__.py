"""The embedding losses: `embedding` is what a task calls, the rest is how they are computed."""
