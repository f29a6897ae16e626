"""How long tasks of a type take on each agent, of late: in memory on every server, rebuilt from the store where it is not known."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from mcp_control.agents.balancing import Average, added, estimates
from mcp_control.kernel.changes import Query, Where
from mcp_control.storage.ports import Store
from mcp_control.tasks.records import read

_REMEMBERED: Final = 20_000
_LOOKED_AT: Final = 200


class Speeds:
    """Moving averages by agent and type.

    Args:
        monotonic: seconds.

    Attributes:
        asked: whether anybody wants to know; until then nothing need be added, as it is read from the store.
    """

    def __init__(self, store: Store, monotonic: Callable[[], float]) -> None:
        self._store = store
        self._monotonic = monotonic
        self._averages: OrderedDict[tuple[str, str], Average] = OrderedDict()
        self._read: OrderedDict[str, None] = OrderedDict()
        self._unknown: dict[str, None] = {}
        self.asked = False

    def ran(self, agent_id: str, task_type: str, seconds: float) -> None:
        """Add how long an attempt took that completed."""
        key = (agent_id, task_type)
        self._averages[key] = added(self._averages.get(key), seconds, self._monotonic())
        if len(self._averages) > _REMEMBERED:
            self._averages.popitem(last=False)

    def expected(self, agents: Sequence[str], task_type: str) -> list[float]:
        """Return the seconds to expect of each agent; 0 where nothing is known yet."""
        self.asked = True
        averages = [self._averages.get((agent_id, task_type)) for agent_id in agents]
        for agent_id, average in zip(agents, averages, strict=True):
            if average is None and agent_id not in self._read:
                self._unknown[agent_id] = None
        return estimates(averages, self._monotonic())

    async def once(self) -> int:
        """Read what agents did lately that were asked for and are not known; returns how many there were."""
        unknown, self._unknown = list(self._unknown), {}
        for agent_id in unknown:
            query = Query(where=[Where("agent", "eq", agent_id)], descending=True, limit=_LOOKED_AT)
            found = [read(entity) for entity in await self._store.find("task", query)]
            fresh = {task.type for task in found if (agent_id, task.type) not in self._averages}
            for task in reversed(found):
                attempt = task.attempts[-1] if task.attempts else None
                if attempt is None or attempt.agent_id != agent_id or attempt.outcome != "completed":
                    continue
                if task.type in fresh:
                    began = attempt.started_at or attempt.assigned_at
                    self.ran(agent_id, task.type, (attempt.ended_at - began) / 1000)
            self._read[agent_id] = None
            if len(self._read) > _REMEMBERED:
                self._read.popitem(last=False)
        return len(unknown)
