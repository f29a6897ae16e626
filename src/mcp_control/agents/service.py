"""AgentManager: registration, discovery, health and orders for agents (seed, "Agent Management Service")."""

import builtins
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.agents.model import Agent, AgentKind, AgentSpec, AgentState, AgentView, Beat, Drain, Instance
from mcp_control.agents.records import read_agent, read_instance, view_agent, write_agent, write_instance
from mcp_control.agents.registration import check, settle
from mcp_control.agents.sessions import Session, Sessions
from mcp_control.events.log import fact
from mcp_control.kernel.changes import Change, Entity, Fact, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import (
    AgentSuspended,
    Conflict,
    Duplicate,
    Forbidden,
    InvalidTransition,
    LeaseSuperseded,
    NameTaken,
    NotFound,
    Problem,
    VersionConflict,
)
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store

_TRIES: Final = 10
STALL_LEASES: Final = 2


class AgentFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which agents: all conditions given must hold. `free` asks for agents with a free slot."""

    capability: str | None = None
    kind: AgentKind | None = None
    state: AgentState | None = None
    labels: Mapping[str, str] = {}
    free: bool = False


class Registered(msgspec.Struct, frozen=True):
    """The agent, and whether the name resumed an identity that was there."""

    agent: Agent
    resumed: bool


class AgentEdit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person may change of an agent; what is not given stays."""

    description: str | None = None
    owner: str | None = None
    labels: dict[str, str] | None = None
    slots: int | None = None


class AgentManager:
    """Knows every agent. Keeps those that are not retired in memory; every write carries the version it read."""

    def __init__(self, store: Store, clock: Clock, ids: IdSource, sessions: Sessions, grace_ms: int = 5000) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self._grace_ms = grace_ms
        self._agents: dict[str, Agent] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._counts: dict[str, list[int]] = {}
        self.sessions = sessions

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

    async def register(
        self, actor: Actor, spec: AgentSpec, also: Callable[[Agent], Sequence[Entity]] | None = None
    ) -> Registered:
        """Register an agent, or resume the identity of its name.

        Args:
            actor: an enrolling agent (role `enrolment`), the agent itself, or a user.
            also: entities to write in the same change, such as the agent's credential.

        Raises:
            Invalid: the specification is wrong.
            NameTaken: the name belongs to an identity that this actor may not resume.
            AgentSuspended: the identity is retired.
        """
        check(spec)
        for _ in range(_TRIES):
            now = self._clock.now()
            before = self._find(actor.tenant, spec.name)
            _may_register(actor, before)
            if before is None:
                agent = Agent(
                    id=self._ids.new("agent"),
                    version=0,
                    tenant=actor.tenant,
                    spec=spec,
                    state_at=now,
                    created_at=now,
                    updated_at=now,
                )
                kind = "agent.registered"
            elif before.spec == spec and also is None:
                return Registered(before, True)
            else:
                agent = replace(before, spec=spec, updated_at=now)
                kind = "agent.updated"
            extra = also(agent) if also else ()
            try:
                saved = await self._save(agent, [self._fact(kind, agent, actor.id, now)], extra)
            except Duplicate:
                raise NameTaken(f"an agent named {spec.name} exists") from None
            except Conflict:
                await self._reload(agent.id)
                continue
            return Registered(saved, before is not None)
        raise Conflict

    def find(self, actor: Actor, id_or_name: str) -> Agent:
        """Return an agent by id or name. Raises NotFound."""
        allow(actor, "agents.get", self._names.get((actor.tenant, id_or_name), id_or_name))
        agent = self._agents.get(id_or_name) or self._find(actor.tenant, id_or_name)
        if agent is None or agent.tenant != actor.tenant:
            raise NotFound("no such agent")
        return agent

    async def get(self, actor: Actor, id_or_name: str) -> Agent:
        """Return an agent by id or name, retired ones by id. Raises NotFound."""
        try:
            return self.find(actor, id_or_name)
        except NotFound:
            entity = (await self._store.get("agent", [id_or_name]))[0]
            if entity is None or (agent := read_agent(entity)).tenant != actor.tenant:
                raise
            return agent

    async def list(
        self, actor: Actor, wanted: AgentFilter, *, cursor: str | None = None, limit: int = 50, sort: str = "created"
    ) -> Page[AgentView]:
        """Return a page of agents that match, by `created` (id), `name` or `last_beat`."""
        allow(actor, "agents.list")
        rows = [agent for agent in self._agents.values() if agent.tenant == actor.tenant]
        if wanted.state is AgentState.RETIRED:
            found = await self._store.find("agent", Query(where=[Where("state", "eq", "retired")], limit=5000))
            rows = [agent for agent in map(read_agent, found) if agent.tenant == actor.tenant]

        def key(agent: Agent) -> tuple[str, str]:
            # Sort keys are text of one length or kind, so that a cursor compares as the rows do.
            if sort == "name":
                return agent.spec.name, agent.id
            return (f"{(1 << 50) - agent.last_beat_at:020d}" if sort == "last_beat" else agent.id), agent.id

        rows.sort(key=key)
        if cursor is not None:
            position = tuple(map(str, decode_cursor(f"agents/{sort}", cursor, 2)))
            rows = [agent for agent in rows if key(agent) > position]
        views: list[AgentView] = []
        for place, agent in enumerate(rows):
            shown = self.view(agent)
            if _matches(shown, wanted):
                views.append(shown)
                if len(views) == limit and place + 1 < len(rows):
                    return Page(items=views, next_cursor=encode_cursor(f"agents/{sort}", key(agent)))
        return Page(items=views)

    def view(self, agent: Agent) -> AgentView:
        """Return an agent as callers see it, with the state its sessions show right now."""
        sessions = self.sessions.of_agent(agent.id)
        free = sum(session.free for session in sessions)
        running = sum(len(session.held) for session in sessions)
        state = agent.state
        if state in (AgentState.ONLINE, AgentState.BUSY) and sessions:
            state = AgentState.ONLINE if free else AgentState.BUSY
        return view_agent(agent, state, free, running, [session.instance for session in sessions])

    async def edit(self, actor: Actor, agent_id: str, edit: AgentEdit, version: int) -> Agent:
        """Change what a person may change. Raises VersionConflict unless `version` is the current one."""
        allow(actor, "agents.edit", agent_id)
        agent = await self.get(actor, agent_id)
        if agent.version != version:
            raise VersionConflict("the agent was changed meanwhile; read it again", current=str(agent.version))
        given = {name: value for name in edit.__struct_fields__ if (value := getattr(edit, name)) is not None}
        spec = replace(agent.spec, **given)
        check(spec)
        now = self._clock.now()
        after = replace(agent, spec=spec, updated_at=now)
        try:
            return await self._save(after, [self._fact("agent.updated", after, actor.id, now)])
        except Conflict:
            await self._reload(agent.id)
            raise VersionConflict("the agent was changed meanwhile; read it again") from None

    async def drain(self, actor: Actor, agent_id: str, note: str = "") -> Agent:
        """Let an agent finish what it has and give it nothing new. Repeating it changes nothing."""
        return await self._order(actor, agent_id, "drain", note)

    async def quarantine(self, actor: Actor, agent_id: str, note: str = "") -> Agent:
        """Keep an agent from work until it is resumed."""
        return await self._order(actor, agent_id, "quarantine", note)

    async def resume(self, actor: Actor, agent_id: str) -> Agent:
        """Undo drain and quarantine."""
        return await self._order(actor, agent_id, "resume", "")

    async def retire(self, actor: Actor, agent_id: str, note: str = "") -> Agent:
        """End an identity for good; its name becomes free, its running work is finished or handed back."""
        return await self._order(actor, agent_id, "retire", note)

    async def _order(self, actor: Actor, agent_id: str, verb: str, note: str) -> Agent:
        for _ in range(_TRIES):
            now = self._clock.now()
            agent = await self.get(actor, agent_id)
            allow(actor, f"agents.{verb}", agent.id)
            if agent.retired_at is not None:
                if verb == "retire":
                    return agent
                raise InvalidTransition(f"a retired agent cannot {verb}", state="retired", allowed=[])
            order = Drain(at=now, by=actor.id, note=note)
            if verb == "drain":
                after, kind = replace(agent, drain=agent.drain or order), "agent.draining"
            elif verb == "quarantine":
                after, kind = replace(agent, quarantine=agent.quarantine or order), "agent.quarantined"
            elif verb == "resume":
                after, kind = replace(agent, drain=None, quarantine=None), "agent.resumed"
            else:
                after, kind = replace(agent, retired_at=now, drain=agent.drain or order), "agent.retired"
            if after == agent:
                return agent
            after = self._settled(after, now)
            try:
                return await self._save(after, [self._fact(kind, after, actor.id, now, note=note)])
            except Conflict:
                await self._reload(agent.id)
        raise Conflict

    async def open(
        self, actor: Actor, spec: AgentSpec, instance_id: str | None, software: str, address: str
    ) -> tuple[Agent, Instance]:
        """Begin or resume the session of an instance; its lease is durable on return.

        Raises:
            Forbidden: the actor is not this agent.
            AgentSuspended: the agent is retired or quarantined.
        """
        agent = self._agents.get(actor.id)
        if agent is None or spec.name != agent.spec.name:
            raise Forbidden("the credential is not that of this agent")
        if agent.quarantine is not None:
            raise AgentSuspended("the agent is quarantined")
        if agent.spec != spec:
            agent = (await self.register(actor, spec)).agent
        now = self._clock.now()
        lease_ms = round(agent.spec.lease_seconds * 1000)
        instance: Instance | None = None
        if instance_id is not None:
            instance = await self._instance(instance_id)
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
        )
        saved, entity = write_instance(instance)
        await self._commit(Change(writes=[entity]))
        return agent, saved

    async def connected(self, session: Session) -> None:
        """Record that an agent has a live session."""
        await self._restate(session.agent.id, last_beat_at=self._clock.now())

    async def disconnected(self, agent_id: str) -> None:
        """Record that a session of an agent is gone."""
        await self._restate(agent_id)

    async def beat(self, session: Session, beat: Beat) -> None:
        """Renew a session's lease and keep what the heartbeat says.

        Raises:
            LeaseSuperseded: the session's lease has ended; the instance must connect anew.
        """
        now = self._clock.now()
        before = session.instance
        moved = beat.tick != before.beat.tick or not beat.running
        instance = replace(
            before,
            lease_until=now + before.lease_ms,
            beat=beat,
            beat_at=now,
            tick_at=now if moved or not before.tick_at else before.tick_at,
        )
        saved, entity = write_instance(instance)
        try:
            await self._commit(Change(writes=[entity]))
        except Conflict:
            stored = await self._instance(before.id)
            if stored is None or stored.ended_at is not None:
                raise LeaseSuperseded("the session's lease has ended") from None
            session.instance = stored
            return
        session.instance = saved
        stalled = now - saved.tick_at > STALL_LEASES * saved.lease_ms
        if stalled != session.stalled:
            session.stalled = stalled
            session.refresh(session.agent)
        await self._restate(session.agent.id, last_beat_at=now)

    async def end(self, instance_id: str, reason: str, unless_alive_at: int | None = None) -> None:
        """End an instance: its lease is over for good. Its tasks must have been taken back before.

        Args:
            unless_alive_at: leave an instance alone whose lease was renewed beyond this moment.
        """
        now = self._clock.now()
        session: Session | None = None
        for _ in range(_TRIES):
            instance = await self._instance(instance_id)
            if instance is None or instance.ended_at is not None:
                break
            if unless_alive_at is not None and instance.lease_until > unless_alive_at:
                return
            _, entity = write_instance(replace(instance, ended_at=now, end_reason=reason))
            try:
                await self._commit(Change(writes=[entity]))
            except Conflict:
                continue
            session = self.sessions.drop(instance_id)
            await self._restate(instance.agent_id)
            break
        if session is not None:
            session.leaving = True

    async def overdue(self, now: int, limit: int = 200) -> builtins.list[Instance]:
        """Return instances whose lease ended more than the grace ago."""
        found = await self._store.find(
            "instance",
            Query(where=[Where("lease_until", "lt", now - self._grace_ms)], order="lease_until", limit=limit),
        )
        return [read_instance(entity) for entity in found]

    def count(self, agent_id: str, outcome: str) -> None:
        """Add to an agent's figures; they are written with its next change."""
        row = self._counts.setdefault(agent_id, [0, 0, 0])
        row[{"completed": 0, "failed": 1, "lost": 2}[outcome]] += 1

    async def _restate(self, agent_id: str, last_beat_at: int | None = None) -> None:
        """Write an agent's state as its sessions show it, with its figures, where anything changed."""
        for _ in range(_TRIES):
            agent = self._agents.get(agent_id)
            if agent is None:
                return
            now = self._clock.now()
            completed, failed, lost = self._counts.pop(agent_id, (0, 0, 0))
            counted = replace(
                agent, completed=agent.completed + completed, failed=agent.failed + failed, lost=agent.lost + lost
            )
            after = self._settled(counted, now)
            if after == agent:
                # A beat alone is kept with the instance; writing the agent too would double the cost of every heartbeat.
                return
            after = replace(after, last_beat_at=last_beat_at or agent.last_beat_at)
            facts = (
                [] if after.state is agent.state else [self._fact(f"agent.{after.state.value}", after, "system", now)]
            )
            try:
                await self._save(after, facts)
            except Problem as problem:
                row = self._counts.setdefault(agent_id, [0, 0, 0])
                for place, number in enumerate((completed, failed, lost)):
                    row[place] += number
                if not isinstance(problem, Conflict):
                    raise
                await self._reload(agent_id)
                continue
            return

    def _settled(self, agent: Agent, now: int) -> Agent:
        sessions = self.sessions.of_agent(agent.id)
        free = sum(session.slots - len(session.held) for session in sessions)
        stalled = bool(sessions) and all(session.stalled for session in sessions)
        state = settle(agent, live=bool(sessions), free=free, stalled=stalled)
        return agent if state is agent.state else replace(agent, state=state, state_at=now)

    async def _instance(self, instance_id: str) -> Instance | None:
        entity = (await self._store.get("instance", [instance_id]))[0]
        return None if entity is None else read_instance(entity)

    async def _save(self, agent: Agent, facts: Sequence[Fact], extra: Iterable[Entity] = ()) -> Agent:
        saved, entity = write_agent(agent)
        await self._commit(Change(writes=[entity, *extra], facts=facts))
        self._remember(saved)
        self.sessions.refresh(saved)
        return saved

    async def _commit(self, change: Change) -> None:
        outcome = (await self._store.commit([change]))[0]
        if outcome is not None:
            raise outcome

    async def _reload(self, agent_id: str) -> None:
        entity = (await self._store.get("agent", [agent_id]))[0]
        if entity is not None:
            self._remember(read_agent(entity))

    def _remember(self, agent: Agent) -> None:
        before = self._agents.pop(agent.id, None)
        if before is not None:
            self._names.pop((before.tenant, before.spec.name), None)
        if agent.retired_at is None:
            self._agents[agent.id] = agent
            self._names[agent.tenant, agent.spec.name] = agent.id

    def _find(self, tenant: str, name: str) -> Agent | None:
        agent_id = self._names.get((tenant, name))
        return None if agent_id is None else self._agents[agent_id]

    def _fact(self, kind: str, agent: Agent, actor: str, now: int, **more: object) -> Fact:
        data = {"name": agent.spec.name, "state": agent.state.value, **more}
        return fact(kind, agent.id, actor, now, data, tenant=agent.tenant)


def _matches(shown: AgentView, wanted: AgentFilter) -> bool:
    return (
        (wanted.capability is None or any(capability.name == wanted.capability for capability in shown.capabilities))
        and (wanted.kind is None or shown.kind == wanted.kind)
        and (wanted.state is None or shown.state is wanted.state)
        and (not wanted.free or shown.free_slots > 0)
        and all(shown.labels.get(label) == value for label, value in wanted.labels.items())
    )


def _may_register(actor: Actor, before: Agent | None) -> None:
    enrolling = "enrolment" in actor.roles
    if actor.kind == "agent" and not enrolling:
        if before is None or before.id != actor.id:
            raise NameTaken("an agent's credential registers that agent alone")
    elif before is not None and enrolling:
        raise NameTaken(f"an agent named {before.spec.name} exists; it resumes with its own credential")
    allow(actor, "agents.register", before.id if before is not None else None)
