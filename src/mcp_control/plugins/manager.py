"""Finding and loading plugins."""

from collections.abc import Collection
from importlib.metadata import entry_points
from typing import Any, Final

import msgspec
import pluggy

from mcp_control.pipelines.definition_model import PipelineSpec
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

    def pipelines(self) -> list[tuple[str, PipelineSpec]]:
        """Return the pipelines that plugins bring, each with the plugin's name."""
        return [(name, spec) for name, specs in self._each("pipelines") for spec in specs]

    def agents(self) -> list[tuple[str, str]]:
        """Return the agents that plugins bring, each as `module:attribute` with the plugin's name."""
        return [(name, target) for name, targets in self._each("agents") for target in targets]

    def leave_out(self, name: str, why: str) -> None:
        """Name a plugin as one that is of no use here, or not wholly."""
        self.loaded = [plugin for plugin in self.loaded if plugin.name != name]
        self.failed[name] = why

    def _each(self, hook: str) -> list[tuple[str, list[Any]]]:
        """Return what each plugin in use answers to a hook, by the plugins' names; one that fails is left out from then on."""
        answers: list[tuple[str, list[Any]]] = []
        for filled in sorted(getattr(self._manager.hook, hook).get_hookimpls(), key=lambda filled: filled.plugin_name):
            name: str = filled.plugin_name
            if name in self.failed:
                continue
            try:
                answers.append((name, list(filled.function())))
            # Code of others may raise anything.
            except Exception as error:
                self.leave_out(name, f"{type(error).__name__}: {error}")
        return answers
