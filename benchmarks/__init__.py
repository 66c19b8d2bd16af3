"""What attention costs, measured: ``python -m benchmarks.cost``, ``python -m benchmarks.gpu``."""
