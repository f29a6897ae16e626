"""Every test here runs on a single server's folder and on the databases of a cluster, unless it is marked otherwise."""

from mcp_control.testing.backends import backend, pytest_generate_tests

__all__ = ["backend", "pytest_generate_tests"]
