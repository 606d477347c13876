"""Probes: what each layer of a frozen model represents of a teacher's features."""
