"""Finding and loading plugins."""

from collections.abc import Collection
from importlib.metadata import entry_points
from typing import Final

import msgspec
import pluggy

from mcp_control.pipelines.model import PipelineSpec
from mcp_control.plugins import hookspecs

GROUP: Final = "mcp_control.plugins"


class Loaded(msgspec.Struct, frozen=True):
    """A plugin that is in use."""

    name: str
    version: str


class Plugins:
    """The plugins of one server. One that does not load is left out and named; the server and the other plugins are of use without it."""

    def __init__(self, chosen: Collection[str] | None = None) -> None:
        """Load the plugins that are installed.

        Args:
            chosen: names of those to load; None loads all.
        """
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self.loaded: list[Loaded] = []
        self.failed: dict[str, str] = {}
        for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
            if chosen is not None and point.name not in chosen:
                continue
            try:
                self._manager.register(point.load(), point.name)
            # Code of others may raise anything while it loads.
            except Exception as error:
                self.failed[point.name] = f"{type(error).__name__}: {error}"
                continue
            self.loaded.append(Loaded(point.name, point.dist.version if point.dist else ""))
        for name in sorted(set(chosen or ()) - {plugin.name for plugin in self.loaded} - set(self.failed)):
            self.failed[name] = "is not installed"

    def pipelines(self) -> list[PipelineSpec]:
        """Return the pipelines that plugins bring."""
        return [spec for specs in self._manager.hook.pipelines() for spec in specs]

    def agents(self) -> list[str]:
        """Return the agents that plugins bring, as `module:attribute`."""
        return [agent for agents in self._manager.hook.agents() for agent in agents]
