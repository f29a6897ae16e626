"""What waits in a lane, explained: the agents, who holds their slots, what is ahead, and when the task may begin."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec

from mcp_control.agents.matching import misfit
from mcp_control.agents.model import AgentSpec, AgentState
from mcp_control.agents.service import AgentManager
from mcp_control.kernel.changes import Query, Where
from mcp_control.kernel.clock import Clock, to_datetime
from mcp_control.storage.ports import LANE_END, Queue, Store, waiting_value
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.explain import Seen, explain
from mcp_control.tasks.fairness import Share
from mcp_control.tasks.history import TaskHistory
from mcp_control.tasks.lanes import Lane, demand_of
from mcp_control.tasks.limiting import missing
from mcp_control.tasks.limits import Limits
from mcp_control.tasks.model import Task
from mcp_control.tasks.outlook import expected_start, turns_before
from mcp_control.tasks.records import read
from mcp_control.tasks.rooms import rooms_of
from mcp_control.tasks.view_model import Explanation

_LINE: Final = 500
_LINE_MAX: Final = 20_000
_THERE: Final = (AgentState.ONLINE, AgentState.BUSY)


class Explainer:
    """Looks at what the dispatcher looks at, in its order. For people: it asks the store more than the dispatcher does."""

    def __init__(
        self,
        store: Store,
        queue: Queue,
        clock: Clock,
        manager: AgentManager,
        dispatcher: Dispatcher,
        history: TaskHistory,
    ) -> None:
        self._store = store
        self._queue = queue
        self._clock = clock
        self._manager = manager
        self._dispatcher = dispatcher
        self._history = history

    async def explain(self, task: Task) -> Explanation:
        """Explain a task that waits in its lane."""
        await self._manager.look()
        demand = demand_of(task)
        registry = self._manager.registry
        rooms = await rooms_of(
            self._store, [each for each in registry.known(task.tenant) if misfit(*each, demand) is None]
        )
        agents = [
            Seen(shown.id, agent.spec, shown.state, shown.free_slots, agent.state_at, rooms.get(shown.id, ()))
            for agent in registry.registered(task.tenant)
            for shown in (self._manager.view(agent),)
        ]
        ahead = await self._queue.ahead(task.lane, task.id) or 0
        there = [agent for agent in agents if agent.state in _THERE and misfit(agent.id, agent.spec, demand) is None]
        before = await self._elsewhere(task, ahead, [(agent.id, agent.spec) for agent in there])
        found = explain(task, demand, agents, ahead, sum(count for _, count in before))
        if not there or found.code == "resources-short":
            return found
        full = {agent.id for agent in there if agent.full_of(task.type)}
        running = [
            each
            for agent in there
            for room in agent.rooms
            for each in room.running
            # Where the type is limited, only the end of one of its kind makes room.
            if agent.id not in full or each[0] == task.type
        ]
        line = [*before, (task.type, ahead)]
        times = await self._history.times(task.tenant, {name for name, _ in [*running, *line]})
        at = expected_start(
            self._clock.now(), sum(agent.free for agent in there if agent.id not in full), running, line, times
        )
        return found if at is None else msgspec.structs.replace(found, expected_start=to_datetime(at))

    async def blocked(self, task: Task, found: Explanation, limits: Limits) -> Explanation:
        """Add to the explanation of a task that waits at a limit who holds it, since when, and when the limit may let it on.

        For a concurrency limit that follows from how long the types of those that hold it and of those before it usually take, as if
        each got an agent at once; for a rate, from when time frees a start.
        """
        holders, since, at = await limits.holding(task)
        gate = next((gate for name, gate in missing(task) if name == task.waits_at), None)
        if gate is not None and gate.rate is None:
            at = await self._let_through(task, gate.slots, holders)
        return msgspec.structs.replace(
            found,
            held_by=holders[:10],
            since=found.since if since is None else to_datetime(since),
            expected_start=None if at is None else to_datetime(at),
        )

    async def _let_through(self, task: Task, slots: int, holders: Sequence[str]) -> int | None:
        now = self._clock.now()
        running: list[tuple[str, int]] = []
        for entity in await self._store.get("task", holders):
            if entity is not None:
                holder = read(entity)
                running.append((holder.type, now if holder.lease is None else holder.lease.since))
        mine = waiting_value(task.waits_at, task.rank)
        before = [Where("gate", "ge", task.waits_at + LANE_END), Where("gate", "lt", mine)]
        first = await self._store.find("task", Query(where=before, order="gate", limit=_LINE))
        ahead = Counter(str(entity.index["type"]) for entity in first)
        if len(first) == _LINE:
            # Of a long line the beginning says of which types it is made.
            in_all = await self._store.count("task", before, _LINE_MAX)
            ahead = Counter({name: round(count * in_all / _LINE) for name, count in ahead.items()})
        times = await self._history.times(task.tenant, {*ahead, *(name for name, _ in running)})
        return expected_start(now, max(0, slots - len(holders)), running, list(ahead.items()), times)

    async def _elsewhere(
        self, task: Task, ahead: int, agents: Sequence[tuple[str, AgentSpec]]
    ) -> list[tuple[str, int]]:
        """Return the tasks of other lanes that come first with these agents: type, and how many.

        Of its own share these are the ones with a lower rank; of other shares all of a higher class, and of its own class as many turns
        as their weight gives them until this task's.
        """
        mine = self._dispatcher.lane(task)
        found: list[tuple[str, int]] = []
        rivals: dict[Share, list[tuple[Lane, int]]] = {}
        for depth in await self._queue.depths():
            lane = self._dispatcher.known(depth.lane)
            if lane is None or lane is mine or not any(misfit(*agent, lane.demand) is None for agent in agents):
                continue
            line = lane.line
            if line.share is mine.line.share:
                if depth.rank < task.rank:
                    found.append((lane.demand.type, await self._queue.before(lane.key, task.rank)))
            elif line.grade > mine.line.grade:
                found.append((lane.demand.type, depth.waiting))
            elif line.grade == mine.line.grade:
                rivals.setdefault(line.share, []).append((lane, depth.waiting))
        own = ahead + sum(count for _, count in found)
        weights = [(share.weight, sum(waiting for _, waiting in lanes)) for share, lanes in rivals.items()]
        for lanes, turns in zip(rivals.values(), turns_before(own, mine.line.share.weight, weights), strict=True):
            if turns:
                found.append((lanes[0][0].demand.type, turns))
        return [(name, count) for name, count in found if count]
