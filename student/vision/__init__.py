"""Base vision encoders of several libraries, and what they see of an image."""
