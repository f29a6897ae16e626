"""MCP Server (Management Control Panel): a durable control plane for tasks, pipelines and agents."""

__version__ = "0.1.0"
