"""Pipelines: versioned graphs of stages, and the runs that execute them."""
