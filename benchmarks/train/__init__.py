"""One PT step without distillation, with cached targets, and with teachers in the loop."""
