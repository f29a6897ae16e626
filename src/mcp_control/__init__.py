"""MCP Server (Management Control Panel): a durable control plane for tasks, pipelines and agents.

What programs use is importable from here. Names are loaded when first used, so that a command starts without loading the runtime.
"""

from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mcp_control.pipelines.builder import PipelineBuilder as Pipeline
    from mcp_control.sdk.agent import Agent
    from mcp_control.sdk.client import AsyncClient, Client
    from mcp_control.sdk.context import Context, SyncContext
    from mcp_control.sdk.errors import (
        ApiProblem,
        Cancelled,
        Critical,
        Permanent,
        RunFailed,
        SdkError,
        TaskFailed,
        Temporary,
        Unavailable,
        Unreachable,
        WaitTimeout,
    )
    from mcp_control.tasks.model import Needs, RetryPolicy, TaskSpec

_WHERE: Final = {
    "Agent": "mcp_control.sdk.agent",
    "AsyncClient": "mcp_control.sdk.client",
    "Client": "mcp_control.sdk.client",
    "Context": "mcp_control.sdk.context",
    "SyncContext": "mcp_control.sdk.context",
    "Pipeline": "mcp_control.pipelines.builder:PipelineBuilder",
    "Needs": "mcp_control.tasks.model",
    "RetryPolicy": "mcp_control.tasks.model",
    "TaskSpec": "mcp_control.tasks.model",
    **dict.fromkeys(
        (
            "ApiProblem",
            "Cancelled",
            "Critical",
            "Permanent",
            "RunFailed",
            "SdkError",
            "TaskFailed",
            "Temporary",
            "Unavailable",
            "Unreachable",
            "WaitTimeout",
        ),
        "mcp_control.sdk.errors",
    ),
}

__all__ = [
    "Agent",
    "ApiProblem",
    "AsyncClient",
    "Cancelled",
    "Client",
    "Context",
    "Critical",
    "Needs",
    "Permanent",
    "Pipeline",
    "RetryPolicy",
    "RunFailed",
    "SdkError",
    "SyncContext",
    "TaskFailed",
    "TaskSpec",
    "Temporary",
    "Unavailable",
    "Unreachable",
    "WaitTimeout",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used (PEP 562)."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, _, attribute = _WHERE[name].partition(":")
    found = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = found
    return found
