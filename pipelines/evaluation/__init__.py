"""Scores that can be compared: benchmarks, their exact protocols, and models of any kind asked through lmms-eval."""
