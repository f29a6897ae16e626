"""The control of what versions guard: a store that writes whatever it finds."""

from collections.abc import Mapping
from typing import Any

from mcp_control.storage.mongo.batch import Place, Plan, Shapes
from mcp_control.storage.mongo.commands import Step, steps


def unguarded(shapes: Shapes, plan: Plan, before: Mapping[Place, dict[str, Any]]) -> list[Step]:
    """Return the commands of a plan with no version in their filters."""
    found = steps(shapes, plan, before)
    for step in found:
        for update in step.command.get("updates", ()):
            update["q"].pop("v", None)
    return found
