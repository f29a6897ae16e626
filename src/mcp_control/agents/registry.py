"""The registry: every agent that is not retired, in memory, and the one place where agents are written."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

from msgspec.structs import replace

from mcp_control.agents.model import Agent, AgentSpec, Instance
from mcp_control.agents.records import read_agent, read_instance, write_agent
from mcp_control.agents.registration import settle
from mcp_control.agents.sessions import Sessions
from mcp_control.events.log import fact
from mcp_control.kernel.changes import Change, Entity, Fact, Query, StoredFact, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Conflict, Problem
from mcp_control.storage.ports import Store

TRIES: Final = 10
_INSTANCES_MAX: Final = 1000


class Registry:
    """Reads and writes agents; every write carries the version it read, so a stale copy ends in `Conflict`.

    Attributes:
        revision: raised when an agent comes, goes, or says something else of itself.

    Args:
        server: id of this server where several share the store; it then hears from the facts what the others wrote. Empty on a single one.
    """

    def __init__(self, store: Store, clock: Clock, sessions: Sessions, server: str = "") -> None:
        self.server = server
        self._stale: set[str] = set()
        self._refreshing: asyncio.Task[None] | None = None
        self._store = store
        self._clock = clock
        self._agents: dict[str, Agent] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._counts: dict[str, list[int]] = {}
        self.sessions = sessions
        self.revision = 0

    async def start(self) -> None:
        """Load the agents that are not retired."""
        after: list[str] | None = None
        while True:
            page = await self._store.find("agent", Query(after=after, limit=1000))
            for entity in page:
                self._remember(read_agent(entity))
            if len(page) < 1000:
                return
            after = [page[-1].id]

    def known(self, tenant: str) -> list[tuple[str, AgentSpec]]:
        """Return id and specification of every agent of a tenant that is not retired."""
        return [(agent.id, agent.spec) for agent in self._agents.values() if agent.tenant == tenant]

    def registered(self, tenant: str) -> list[Agent]:
        """Return every agent of a tenant that is not retired."""
        return [agent for agent in self._agents.values() if agent.tenant == tenant]

    def everybody(self) -> list[Agent]:
        """Return every agent of every tenant that is not retired."""
        return list(self._agents.values())

    def by_id(self, agent_id: str) -> Agent | None:
        """Return an agent that is not retired, None where there is none."""
        return self._agents.get(agent_id)

    def by_name(self, tenant: str, name: str) -> Agent | None:
        """Return the agent of a tenant that has this name, None where there is none."""
        agent_id = self._names.get((tenant, name))
        return None if agent_id is None else self._agents[agent_id]

    async def save(self, agent: Agent, facts: Sequence[Fact], extra: Iterable[Entity] = ()) -> Agent:
        """Write an agent with its facts, and other entities in the same change; returns it as stored.

        Raises:
            Conflict: it was changed meanwhile; `reload` it and decide again. Duplicate: the name is taken.
        """
        saved, entity = write_agent(agent)
        await self.commit(Change(writes=[entity, *extra], facts=facts))
        self._remember(saved)
        self.sessions.refresh(saved)
        return saved

    async def commit(self, change: Change) -> None:
        """Commit one change; raises the problem it ended with."""
        outcome = (await self._store.commit([change]))[0]
        if outcome is not None:
            raise outcome

    async def reload(self, agent_id: str) -> None:
        """Read an agent again."""
        entity = (await self._store.get("agent", [agent_id]))[0]
        if entity is not None:
            self._remember(read_agent(entity))

    def heard(self, facts: Sequence[StoredFact]) -> None:
        """Read agents again of which other servers may have written. Called with all facts, on the loop."""
        if not self.server:
            return
        self._stale.update(stored.fact.subject for stored in facts if stored.fact.type.startswith("agent."))
        if self._stale and self._refreshing is None:
            self._refreshing = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        try:
            while self._stale:
                ids, self._stale = list(self._stale), set()
                try:
                    found = await self._store.get("agent", ids)
                except Problem:
                    self._stale.update(ids)  # with the next fact
                    return
                for entity in found:
                    if entity is not None:
                        self._newer(read_agent(entity))
        finally:
            self._refreshing = None

    def _newer(self, agent: Agent) -> None:
        """Take over an agent just read, unless a newer one is known."""
        known = self._agents.get(agent.id)
        if known is None or known.version < agent.version:
            self._remember(agent)
            self.sessions.refresh(agent)

    async def fetch(self, agent_id: str) -> Agent | None:
        """Return an agent as the store has it, retired or not; None where there is none."""
        entity = (await self._store.get("agent", [agent_id]))[0]
        if entity is None:
            return None
        agent = read_agent(entity)
        self._newer(agent)
        return agent

    async def elsewhere(self, agent_id: str) -> list[Instance]:
        """Return the live instances of an agent that are connected to other servers, where it has none here."""
        if not self.server or self.sessions.of_agent(agent_id):
            return []
        found = await self._store.find("instance", Query(where=[Where("agent", "eq", agent_id)], limit=_INSTANCES_MAX))
        return [one for one in map(read_instance, found) if one.server not in ("", self.server)]

    def count(self, agent_id: str, outcome: str) -> None:
        """Add to an agent's figures; they are written with its next change."""
        row = self._counts.setdefault(agent_id, [0, 0, 0])
        row[{"completed": 0, "failed": 1, "lost": 2}[outcome]] += 1

    async def restate(self, agent_id: str, last_beat_at: int | None = None) -> None:
        """Write an agent's state as its sessions show it, with its figures, where anything changed."""
        for _ in range(TRIES):
            agent = self._agents.get(agent_id)
            if agent is None:
                return
            now = self._clock.now()
            completed, failed, lost = self._counts.pop(agent_id, (0, 0, 0))
            counted = replace(
                agent, completed=agent.completed + completed, failed=agent.failed + failed, lost=agent.lost + lost
            )
            after = self.settled(counted, now, await self.elsewhere(agent_id))
            if after == agent:
                # A beat alone is kept with the instance; writing the agent too would double the cost of every heartbeat.
                return
            after = replace(after, last_beat_at=last_beat_at or agent.last_beat_at)
            facts = (
                [] if after.state is agent.state else [agent_fact(f"agent.{after.state.value}", after, "system", now)]
            )
            try:
                await self.save(after, facts)
            except Problem as problem:
                row = self._counts.setdefault(agent_id, [0, 0, 0])
                for place, number in enumerate((completed, failed, lost)):
                    row[place] += number
                if not isinstance(problem, Conflict):
                    raise
                await self.reload(agent_id)
                continue
            return

    def settled(self, agent: Agent, now: int, elsewhere: Sequence[Instance] = ()) -> Agent:
        """Return the agent in the state that orders, its sessions here and its instances elsewhere put it in."""
        sessions = self.sessions.of_agent(agent.id)
        free = sum(session.slots - session.taken for session in sessions)
        free += sum(instance.slots - len(instance.beat.running) for instance in elsewhere)
        stalled = bool(sessions) and all(session.stalled for session in sessions)
        live = bool(sessions) or bool(elsewhere)
        leaving = all(session.leaving for session in sessions) and all(one.beat.draining for one in elsewhere)
        state = settle(agent, live=live, free=free, stalled=stalled, leaving=leaving)
        return agent if state is agent.state else replace(agent, state=state, state_at=now)

    def _remember(self, agent: Agent) -> None:
        before = self._agents.pop(agent.id, None)
        if before is None or before.spec != agent.spec or agent.retired_at is not None:
            self.revision += 1
        if before is not None:
            self._names.pop((before.tenant, before.spec.name), None)
        if agent.retired_at is None:
            self._agents[agent.id] = agent
            self._names[agent.tenant, agent.spec.name] = agent.id


def agent_fact(kind: str, agent: Agent, actor: str, now: int, **more: object) -> Fact:
    """Return the fact that `kind` happened to an agent."""
    data = {"name": agent.spec.name, "state": agent.state.value, **more}
    return fact(kind, agent.id, actor, now, data, tenant=agent.tenant)
