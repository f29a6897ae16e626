"""AgentManager: registration, discovery, health and orders for agents (seed, "Agent Management Service")."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.agents.instances import Instances
from mcp_control.agents.model import (
    SYSTEM_ORDER,
    Agent,
    AgentKind,
    AgentSpec,
    AgentState,
    AgentView,
    Drain,
    Health,
    Instance,
)
from mcp_control.agents.records import read_agent, view_agent
from mcp_control.agents.registration import check
from mcp_control.agents.registry import TRIES, Registry, agent_fact
from mcp_control.agents.sessions import Sessions
from mcp_control.kernel.changes import Entity, Query, Where
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import (
    AgentSuspended,
    Conflict,
    Duplicate,
    Forbidden,
    InvalidTransition,
    NameTaken,
    NotFound,
    VersionConflict,
)
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.paging import Page, decode_cursor, encode_cursor
from mcp_control.security.model import Actor
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store

_LOOK_SECONDS: Final = 0.5


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
    """Knows every agent. Keeps those that are not retired in memory; every write carries the version it read.

    Args:
        server: id of this server where several share the store; see `Registry`.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        ids: IdSource,
        sessions: Sessions,
        grace_ms: int = 5000,
        server: str = "",
    ) -> None:
        self._store = store
        self._clock = clock
        self._ids = ids
        self.sessions = sessions
        self._remote: dict[str, list[Instance]] = {}
        self._looked_at = float("-inf")
        self.registry = Registry(store, clock, sessions, server)
        self.instances = Instances(store, clock, ids, self.registry, grace_ms)

    async def look(self) -> None:
        """Learn which instances are connected to other servers; what `view` tells of them is at most half a second old."""
        now = self._clock.monotonic()
        if self.registry.server and now - self._looked_at > _LOOK_SECONDS:
            self._looked_at = now
            self._remote = await self.instances.remote()

    async def session_of(self, actor: Actor, spec: AgentSpec) -> Agent:
        """Return the agent that opens a session with this specification, which becomes its own where it differs.

        Raises:
            Forbidden: the credential is not that of this agent.
            AgentSuspended: the agent is retired.
        """
        agent = self.registry.by_id(actor.id)
        if agent is None:
            agent = await self.registry.fetch(actor.id)
            if agent is not None and agent.retired_at is not None:
                raise AgentSuspended("the agent is retired")
        if agent is None or spec.name != agent.spec.name:
            raise Forbidden("the credential is not that of this agent")
        return agent if agent.spec == spec else (await self.register(actor, spec)).agent

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
        """
        check(spec)
        for _ in range(TRIES):
            now = self._clock.now()
            before = self.registry.by_name(actor.tenant, spec.name)
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
                saved = await self.registry.save(agent, [agent_fact(kind, agent, actor.id, now)], extra)
            except Duplicate as problem:
                known = str(problem.data["existing"])
                if before is None and self.registry.by_id(known) is None and await self.registry.fetch(known):
                    continue  # another server registered it a moment ago
                raise NameTaken(f"an agent named {spec.name} exists") from None
            except Conflict:
                await self.registry.reload(agent.id)
                continue
            return Registered(saved, before is not None)
        raise Conflict

    def find(self, actor: Actor, id_or_name: str) -> Agent:
        """Return an agent by id or name. Raises NotFound."""
        agent = self.registry.by_id(id_or_name) or self.registry.by_name(actor.tenant, id_or_name)
        allow(actor, "agents.get", agent.id if agent is not None else id_or_name)
        if agent is None or agent.tenant != actor.tenant:
            raise NotFound("no such agent")
        return agent

    async def get(self, actor: Actor, id_or_name: str) -> Agent:
        """Return an agent by id or name, retired ones by id. Raises NotFound."""
        await self.look()
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
        await self.look()
        rows = self.registry.registered(actor.tenant)
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
        here, remote = self._instances(agent.id)
        # An agent that polls is not busy because it is between two polls.
        free = sum(max(0, session.slots - session.taken) for session in sessions if session.accepting)
        running = sum(len(session.held) for session in sessions)
        if agent.drain is None and agent.quarantine is None:
            free += sum(
                max(0, instance.slots - len(instance.beat.running)) for instance in remote if not instance.beat.draining
            )
        running += sum(len(instance.beat.running) for instance in remote)
        state = agent.state
        if state in (AgentState.ONLINE, AgentState.BUSY) and (sessions or remote):
            state = AgentState.ONLINE if free else AgentState.BUSY
        return view_agent(agent, state, free, running, [*here, *remote])

    def running(self, agent_id: str) -> Sequence[Instance]:
        """Return the live instances of an agent, wherever they are connected; those of other servers as of the last `look`."""
        here, remote = self._instances(agent_id)
        return [*here, *remote]

    def _instances(self, agent_id: str) -> tuple[Sequence[Instance], Sequence[Instance]]:
        """Return those connected to this server, and those connected to others."""
        here = [session.instance for session in self.sessions.of_agent(agent_id)]
        ids = {instance.id for instance in here}
        return here, [instance for instance in self._remote.get(agent_id, ()) if instance.id not in ids]

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
            return await self.registry.save(after, [agent_fact("agent.updated", after, actor.id, now)])
        except Conflict:
            await self.registry.reload(agent.id)
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
        for _ in range(TRIES):
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
                # An operator's word holds until it is taken back; one that followed from a verdict ends by itself.
                ordered = agent.quarantine is not None and agent.quarantine.by != SYSTEM_ORDER
                health = agent.health if ordered else replace(agent.health, until=None, probing=False)
                kept = agent.quarantine if ordered else order
                after, kind = replace(agent, quarantine=kept, health=health), "agent.quarantined"
            elif verb == "resume":
                health = Health(since=now) if agent.health != Health() else agent.health
                after, kind = replace(agent, drain=None, quarantine=None, health=health), "agent.resumed"
            else:
                after, kind = replace(agent, retired_at=now, drain=agent.drain or order), "agent.retired"
            if after == agent:
                return agent
            after = self.registry.settled(after, now, await self.registry.elsewhere(agent.id))
            try:
                return await self.registry.save(after, [agent_fact(kind, after, actor.id, now, note=note)])
            except Conflict:
                await self.registry.reload(agent.id)
        raise Conflict


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
