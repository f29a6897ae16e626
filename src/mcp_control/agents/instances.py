"""Running instances of agents: their sessions' leases, heartbeats, and their end."""

from contextlib import suppress
from typing import Final

from msgspec.structs import replace

from mcp_control.agents.breaker_news import news_of
from mcp_control.agents.model import Agent, Beat, Instance
from mcp_control.agents.records import read_instance, write_instance
from mcp_control.agents.registry import TRIES, Registry
from mcp_control.agents.sessions import Session
from mcp_control.kernel.changes import Change, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import AgentSuspended, Conflict, Forbidden, LeaseSuperseded
from mcp_control.kernel.ids import IdSource
from mcp_control.security.model import Actor
from mcp_control.storage.ports import Store

STALL_LEASES: Final = 2
_REMOTE_MAX: Final = 5000


class Instances:
    """Opens, renews and ends the sessions of agent instances. A lease is ended by a committed write, never by time passing."""

    def __init__(self, store: Store, clock: Clock, ids: IdSource, registry: Registry, grace_ms: int) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._registry = registry
        self._grace_ms = grace_ms

    async def open(self, actor: Actor, agent: Agent, instance_id: str | None, software: str, address: str) -> Instance:
        """Begin or resume the session of an instance; its lease is durable on return.

        Raises:
            Forbidden: the actor is not this agent.
            AgentSuspended: the agent is retired or quarantined.
        """
        if agent.id != actor.id:
            raise Forbidden("the credential is not that of this agent")
        if agent.quarantine is not None:
            raise AgentSuspended("the agent is quarantined")
        for _ in range(TRIES):
            try:
                return await self._open(agent, instance_id, software, address)
            except Conflict:
                continue
        raise Conflict

    async def _open(self, agent: Agent, instance_id: str | None, software: str, address: str) -> Instance:
        now = self._clock.now()
        lease_ms = round(agent.spec.lease_seconds * 1000)
        instance: Instance | None = None
        if instance_id is not None:
            instance = await self.read(instance_id)
            if instance is not None and (instance.agent_id != agent.id or instance.ended_at is not None):
                instance = None
        if instance is None:
            instance = Instance(
                id=self._ids.new("inst"),
                version=0,
                tenant=agent.tenant,
                agent_id=agent.id,
                started_at=now,
                lease_ms=lease_ms,
                lease_until=now,
            )
        instance = replace(
            instance,
            lease_ms=lease_ms,
            lease_until=now + lease_ms,
            beat_at=now,
            tick_at=now,
            slots=agent.spec.slots,
            software=software,
            address=address,
            server=self._registry.server,
        )
        saved, entity = write_instance(instance)
        await self._registry.commit(Change(writes=[entity]))
        return saved

    async def connected(self, session: Session) -> None:
        """Record that an agent has a live session."""
        await self._registry.restate(session.agent.id, last_beat_at=self._clock.now())

    async def disconnected(self, session: Session) -> None:
        """Record that a session of an agent is gone."""
        if self._registry.server:
            await self._part(session.instance.id)
        await self._registry.restate(session.agent.id)

    async def _part(self, instance_id: str) -> None:
        """Record that an instance is connected to no server, unless it has gone to another one."""
        for _ in range(TRIES):
            instance = await self.read(instance_id)
            if instance is None or instance.ended_at is not None or instance.server != self._registry.server:
                return
            _, entity = write_instance(replace(instance, server=""))
            with suppress(Conflict):
                await self._registry.commit(Change(writes=[entity]))
                return

    async def connected_here(self, instance_id: str) -> bool:
        """Say whether the store has an instance as live and connected to this server."""
        instance = await self.read(instance_id)
        return instance is not None and instance.ended_at is None and instance.server == self._registry.server

    async def remote(self) -> dict[str, list[Instance]]:
        """Return the live instances that are connected to other servers, by agent."""
        found = await self._store.find(
            "instance", Query(where=[Where("lease_until", "gt", 0)], order="lease_until", limit=_REMOTE_MAX)
        )
        remote: dict[str, list[Instance]] = {}
        for instance in map(read_instance, found):
            if instance.server not in ("", self._registry.server):
                remote.setdefault(instance.agent_id, []).append(instance)
        return remote

    async def beat(self, session: Session, beat: Beat) -> None:
        """Renew a session's lease and keep what the heartbeat says.

        Raises:
            LeaseSuperseded: the session's lease has ended; the instance must connect anew.
        """
        for _ in range(TRIES):
            now = self._clock.now()
            before = session.instance
            facts = news_of(session.agent, before, beat, now)
            told = beat if beat.breakers is not None else replace(beat, breakers=before.beat.breakers)
            moved = beat.tick != before.beat.tick or not beat.running
            instance = replace(
                before,
                lease_until=now + before.lease_ms,
                beat=told,
                beat_at=now,
                tick_at=now if moved or not before.tick_at else before.tick_at,
            )
            saved, entity = write_instance(instance)
            try:
                await self._registry.commit(Change(writes=[entity], facts=facts))
            except Conflict:
                stored = await self.read(before.id)
                if stored is None or stored.ended_at is not None:
                    raise LeaseSuperseded("the session's lease has ended") from None
                session.instance = stored
                continue
            session.instance = saved
            break
        else:
            raise Conflict
        stalled = now - saved.tick_at > STALL_LEASES * saved.lease_ms
        if stalled != session.stalled:
            session.stalled = stalled
            self._registry.sessions.refresh(session.agent)
        await self._registry.restate(session.agent.id, last_beat_at=now)

    async def end(self, instance_id: str, reason: str, unless_alive_at: int | None = None) -> bool:
        """End an instance: its lease is over for good. Its tasks must have been taken back before. Says whether it has ended.

        Args:
            unless_alive_at: leave an instance alone whose lease was renewed beyond this moment.
        """
        now = self._clock.now()
        for _ in range(TRIES):
            instance = await self.read(instance_id)
            if instance is None or instance.ended_at is not None:
                self._gone(instance_id)
                return True
            if unless_alive_at is not None and instance.lease_until > unless_alive_at:
                return False
            _, entity = write_instance(replace(instance, ended_at=now, end_reason=reason))
            try:
                await self._registry.commit(Change(writes=[entity]))
            except Conflict:
                continue
            self._gone(instance_id)
            await self._registry.restate(instance.agent_id)
            return True
        raise Conflict

    def _gone(self, instance_id: str) -> None:
        session = self._registry.sessions.drop(instance_id)
        if session is not None:
            session.leaving = True

    async def overdue(self, now: int, limit: int = 200) -> list[Instance]:
        """Return instances whose lease ended more than the grace ago."""
        found = await self._store.find(
            "instance",
            Query(where=[Where("lease_until", "lt", now - self._grace_ms)], order="lease_until", limit=limit),
        )
        return [read_instance(entity) for entity in found]

    async def read(self, instance_id: str) -> Instance | None:
        """Return an instance as the store has it."""
        entity = (await self._store.get("instance", [instance_id]))[0]
        return None if entity is None else read_instance(entity)
