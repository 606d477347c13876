"""The losses: `embedding` and `text` are what is called, the rest is how the embedding losses are computed."""
