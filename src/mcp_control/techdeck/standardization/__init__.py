"""Stage 2, standardization: ten conversation formats to one schema, each record by its own rule."""

from mcp_control.techdeck.standardization.standardize import standardize

__all__ = ["standardize"]
