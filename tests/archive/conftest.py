"""Tests that ask for `backend` run on a folder and on the databases of a cluster."""

from mcp_control.testing.backends import backend, pytest_generate_tests

__all__ = ["backend", "pytest_generate_tests"]
