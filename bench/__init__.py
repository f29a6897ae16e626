"""Benchmarks of the whole product: `python -m bench` (see README.md)."""
