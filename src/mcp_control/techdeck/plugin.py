"""What techdeck adds to a control panel: its pipeline, and the agent that does the pipeline's tasks.

Light on purpose: the server imports this module without the data libraries.
"""

from importlib.resources import files

from mcp_control.pipelines.definition import from_yaml
from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.plugins.hookspecs import hookimpl

AGENT = "mcp_control.techdeck.agent:agent"
"""Where `mcpctl agents start` finds the agent."""


@hookimpl
def pipelines() -> list[PipelineSpec]:
    """The definition of the pipeline `techdeck`."""
    return [from_yaml(files("mcp_control.techdeck").joinpath("pipeline.yaml").read_bytes())]


@hookimpl
def agents() -> list[str]:
    """The agents as `module:attribute`."""
    return [AGENT]
