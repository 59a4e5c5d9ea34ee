"""Benchmarks by topic. Run one from the root of the repository: `python -m benchmarks.scan.cpu`."""
