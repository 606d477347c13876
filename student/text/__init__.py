"""Prompts: templates, conversations and what of them is supervised."""
