"""Benchmarks: each speed that Atoll promises, as a ratio in one run."""
