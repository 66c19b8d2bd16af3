"""Measures what attention costs: ``python -m benchmarks.cost``, ``python -m benchmarks.gpu``."""
