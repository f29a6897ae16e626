"""Whether an agent can take a task: pure, one lane against one agent, never one task at a time (architecture, section 4, "Lanes")."""

from collections.abc import Iterable, Mapping
from functools import lru_cache

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from mcp_control.agents.model import AgentSpec, Resources, Strategy


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """What a lane of tasks asks of an agent.

    Attributes:
        type, type_version: the capability that does the work and the range its version must be in.
        capabilities: further capabilities and their version ranges.
        slots: how many slots a task takes.
        agent: id or name of the only agent allowed.
        bucket: of the key that tasks of the lane share; they belong to one agent (`balancing.home_of`). None without a key.
        waits: for that agent, rather than go elsewhere while it has no room.
        strategy: how to choose among agents; None is the server's.
    """

    type: str
    type_version: str = "*"
    capabilities: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}
    resources: Resources = Resources()
    slots: int = 1
    agent: str | None = None
    bucket: int | None = None
    waits: bool = False
    strategy: Strategy | None = None


@lru_cache(maxsize=4096)
def parse_range(text: str) -> SpecifierSet | None:
    """Return the version range a text means; None is any version.

    `*` is any; `2` or `1.4` is that version and everything below it (`2.*`); else comparisons as in `>=1.2,<2` (PEP 440).

    Raises:
        ValueError: it is no range.
    """
    if text in ("*", ""):
        return None
    try:
        return SpecifierSet(f"=={text}.*" if text[0].isdigit() else text)
    except InvalidSpecifier as error:
        raise ValueError("not a version range") from error


@lru_cache(maxsize=4096)
def in_range(version: str, wanted: str) -> bool:
    """Say whether a version lies in a range. A version that is no version number is only in `*`, or in the range that equals it."""
    try:
        found = parse_range(wanted)
        return found is None or found.contains(Version(version), prereleases=True)
    except (InvalidVersion, ValueError):
        return version == wanted


def misfit(agent_id: str, spec: AgentSpec, demand: Demand) -> str | None:
    """Return why this agent can never take such tasks, as a short sentence; None when it can."""
    if demand.agent is not None and demand.agent not in (agent_id, spec.name):
        return f"pinned to agent {demand.agent}"
    offered = {capability.name: capability.version for capability in spec.capabilities}
    for name, wanted in ((demand.type, demand.type_version), *demand.capabilities.items()):
        version = offered.get(name)
        if version is None:
            return f"lacks the capability {name}"
        if not in_range(version, wanted):
            return f"has {name} {version}, wanted {wanted}"
    for label, value in demand.labels.items():
        if spec.labels.get(label) != value:
            return f"label {label} is not {value}"
    if demand.slots > spec.slots:
        return f"has {spec.slots} slots, wanted {demand.slots}"
    needed, there = demand.resources, spec.resources
    if needed.cpu > there.cpu or needed.memory_mb > there.memory_mb or needed.gpu > there.gpu:
        return "too few resources"
    return None


def fitting(agents: Iterable[tuple[str, AgentSpec]], demand: Demand) -> list[str]:
    """Return the ids of the agents that can take such tasks."""
    return [agent_id for agent_id, spec in agents if misfit(agent_id, spec, demand) is None]
