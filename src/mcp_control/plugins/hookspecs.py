"""The hooks a plugin may fill. Every hook here has a plugin that uses it: techdeck uses both.

A plugin is a module named by an entry point of the group `mcp_control.plugins`; it marks its functions with `hookimpl`.
"""

from typing import Final

import pluggy

from mcp_control.pipelines.definition_model import PipelineSpec

PROJECT: Final = "mcp_control"
hookspec: Final = pluggy.HookspecMarker(PROJECT)
hookimpl: Final = pluggy.HookimplMarker(PROJECT)


@hookspec
def pipelines() -> list[PipelineSpec]:
    """Return definitions of pipelines that every server with this plugin offers."""
    raise NotImplementedError  # a specification has no body of its own


@hookspec
def agents() -> list[str]:
    """Return agents as `module:attribute`, for `mcpctl up --agents` to start."""
    raise NotImplementedError  # a specification has no body of its own
