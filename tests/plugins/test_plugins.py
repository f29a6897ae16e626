"""Plugins: found by entry point, used through hooks alone."""

from mcp_control.pipelines.definition_model import PipelineSpec
from mcp_control.plugins.hookspecs import hookimpl
from mcp_control.plugins.manager import Plugins


def test_the_built_in_pipeline_comes_through_the_public_hooks() -> None:
    """techdeck is a plugin like any other: its pipeline and its agent are what its hooks return."""
    plugins = Plugins()
    assert [plugin.name for plugin in plugins.loaded] == ["techdeck"]
    assert [(name, spec.metadata.name) for name, spec in plugins.pipelines()] == [("techdeck", "techdeck")]
    assert plugins.agents() == [("techdeck", "mcp_control.techdeck.agent:agent")]


def test_a_plugin_that_is_asked_for_and_not_there_is_named() -> None:
    """A name nobody installed does not stop the server; it is listed with the reason."""
    plugins = Plugins(["absent"])
    assert plugins.loaded == []
    assert plugins.failed == {"absent": "is not installed"}
    assert plugins.pipelines() == []


class _Broken:
    """A plugin whose hook raises."""

    @staticmethod
    @hookimpl
    def pipelines() -> list[PipelineSpec]:
        raise RuntimeError("no data")


def test_a_plugin_that_fails_is_left_out_and_the_others_go_on() -> None:
    """One hook that raises costs that plugin only, and its name and reason are told."""
    plugins = Plugins()
    plugins._manager.register(_Broken, "broken")
    assert [name for name, _ in plugins.pipelines()] == ["techdeck"]
    assert plugins.failed == {"broken": "RuntimeError: no data"}
    assert [name for name, _ in plugins.agents()] == ["techdeck"]
