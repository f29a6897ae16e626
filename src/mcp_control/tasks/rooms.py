"""What agents have left of what they declared, as the leases in the store say: for explanations, wherever the agents are connected."""

from collections.abc import Sequence
from typing import Final

from mcp_control.agents.model import AgentSpec
from mcp_control.agents.reserving import Account, Load, capacity, load_of
from mcp_control.kernel.changes import Query, Where
from mcp_control.storage.ports import Store
from mcp_control.tasks.explain import Room
from mcp_control.tasks.records import read

_AGENTS: Final = 20
_INSTANCES: Final = 50
_TASKS: Final = 1000


async def rooms_of(store: Store, agents: Sequence[tuple[str, AgentSpec]]) -> dict[str, list[Room]]:
    """Return what each live instance of the first 20 of these agents has left, by agent."""
    found: dict[str, list[Room]] = {}
    for agent_id, spec in agents[:_AGENTS]:
        query = Query(where=[Where("agent", "eq", agent_id)], limit=_INSTANCES)
        for instance in await store.find("instance", query):
            found.setdefault(agent_id, []).append(await _room(store, instance.id, spec))
    return found


async def _room(store: Store, instance_id: str, spec: AgentSpec) -> Room:
    held = Query(where=[Where("holder", "eq", instance_id)], limit=_TASKS)
    account = Account()
    holders: list[str] = []
    running: list[tuple[str, int]] = []
    since = slots = 0
    for task in map(read, await store.find("task", held)):
        slots += task.needs.slots
        if (load := load_of(task.needs.slots, task.needs.resources)) is not None:
            account.take(task.id, load)
        if task.lease is not None:
            holders.append(task.id)
            since = max(since, task.lease.since)
            running.append((task.type, task.lease.since))
    left = account.left(capacity(spec.slots, spec.resources))
    return Room(Load(spec.slots - slots, left.cpu, left.memory_mb, left.gpu), holders, since, running)
