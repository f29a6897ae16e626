"""Plugins: found by entry point, used through hooks alone."""

from mcp_control.plugins.manager import Plugins


def test_the_built_in_pipeline_comes_through_the_public_hooks() -> None:
    """techdeck is a plugin like any other: its pipeline and its agent are what its hooks return."""
    plugins = Plugins()
    assert [plugin.name for plugin in plugins.loaded] == ["techdeck"]
    assert [spec.metadata.name for spec in plugins.pipelines()] == ["techdeck"]
    assert plugins.agents() == ["mcp_control.techdeck.agent:agent"]


def test_a_plugin_that_is_asked_for_and_not_there_is_named() -> None:
    """A name nobody installed does not stop the server; it is listed with the reason."""
    plugins = Plugins(["absent"])
    assert plugins.loaded == []
    assert plugins.failed == {"absent": "is not installed"}
    assert plugins.pipelines() == []
