"""Agents, their running instances, and what they say to the server about themselves.

An agent is a logical identity with a name; its running instances hold sessions, leases and heartbeats (architecture, section 4).
"""

from datetime import datetime
from enum import StrEnum
from typing import Final, Literal

import msgspec

from mcp_control.kernel.breaker_rules import State, Statuses
from mcp_control.kernel.changes import Field, Index, Kind
from mcp_control.security.model import DEFAULT_TENANT

PROTOCOL_VERSION: Final = 1
MAX_CAPABILITIES: Final = 500


class AgentState(StrEnum):
    """What an agent is doing; the glossary of agent states.

    online: a session is live and slots are free · busy: live, no slot free · stalled: heartbeats come, the work loop does not move ·
    draining: finishes what it has and gets nothing new · offline: no live session · quarantined: kept from work because it failed too
    often · retired: gone for good, its name is free for a new identity.
    """

    ONLINE = "online"
    BUSY = "busy"
    STALLED = "stalled"
    DRAINING = "draining"
    OFFLINE = "offline"
    QUARANTINED = "quarantined"
    RETIRED = "retired"


Strategy = Literal["least_loaded", "fastest", "round_robin"]
AgentKind = Literal["worker", "ai_agent", "script", "http", "mcp_server", "a2a_agent"]


class Capability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Something an agent can do: a name (task types are capability names) and a version, with optional JSON Schemas.

    Attributes:
        limit: how many tasks of this type each instance of the agent works on at once, 1 to 10,000; None is as many as it has slots.
    """

    name: str
    version: str = "1"
    description: str = ""
    input_schema: dict[str, object] | None = None
    output_schema: dict[str, object] | None = None
    limit: int | None = None


class Resources(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """What an agent has, or a task needs: cores, mebibytes of memory, GPUs. Zero means none stated."""

    cpu: float = 0.0
    memory_mb: int = 0
    gpu: int = 0


class AgentSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an agent says of itself when it registers. Registering the same name again resumes the identity.

    Attributes:
        slots: tasks it works on at once, 1 to 10,000.
        lease_seconds: how long its session lives without a heartbeat, 2 to 3,600.
        endpoints: addresses by name, for people and for push; never opened by the server on its own.
    """

    name: str
    kind: AgentKind = "worker"
    capabilities: list[Capability] = []
    labels: dict[str, str] = {}
    resources: Resources = Resources()
    slots: int = 1
    lease_seconds: float = 30.0
    endpoints: dict[str, str] = {}
    description: str = ""
    version: str = ""
    owner: str = ""


class Drain(msgspec.Struct, frozen=True, kw_only=True):
    """A request to take no new work: when, by whom and why."""

    at: int
    by: str
    note: str = ""


Verdict = Literal["ok", "slow", "silent", "stuck", "flapping"]
VERDICTS: Final[tuple[Verdict, ...]] = ("ok", "slow", "silent", "stuck", "flapping")
SYSTEM_ORDER: Final = "system"  # who ordered a quarantine that followed from a verdict


class Health(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an agent does, by what it gets done (`health.py`). Times are wall milliseconds.

    Attributes:
        since: of the verdict.
        trips: quarantines in a row that followed from verdicts.
        until: end of the present one; None while it is in none.
        probing: it is out on trial, one task at a time in each instance.
    """

    verdict: Verdict = "ok"
    since: int = 0
    reason: str = ""
    trips: int = 0
    until: int | None = None
    probing: bool = False


class Agent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The stored agent. `version` is the version of this value in the store; times are wall milliseconds."""

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    spec: AgentSpec
    state: AgentState = AgentState.OFFLINE
    state_at: int = 0
    created_at: int
    updated_at: int = 0
    last_beat_at: int = 0
    drain: Drain | None = None
    quarantine: Drain | None = None
    health: Health = Health()
    retired_at: int | None = None
    completed: int = 0
    failed: int = 0
    lost: int = 0


class Beat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Resource figures and work-loop progress in a heartbeat.

    Attributes:
        tick: a number the work loop raises; one that stands still while tasks run means stalled.
        cpu_percent: of the whole process, 100 is one core.
        memory_mb: resident memory.
        free_slots: slots without a task.
        running: ids of the tasks in hand.
        draining: it takes nothing new and will leave.
        breakers: how those stand that guard what its handlers call; None: as it said last.
    """

    tick: int = 0
    cpu_percent: float = 0.0
    memory_mb: float = 0.0
    load: float = 0.0
    free_slots: int = 0
    running: list[str] = []
    draining: bool = False
    breakers: Statuses | None = None


class Instance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A running process of an agent and its session. `ended_at` set means that its lease is over and its tasks were queued again.

    `server` is the id of the server it is connected to, where several share the store; empty while it is connected to none.
    """

    id: str
    version: int
    tenant: str = DEFAULT_TENANT
    agent_id: str
    started_at: int
    lease_ms: int
    lease_until: int
    beat: Beat = Beat()
    beat_at: int = 0
    tick_at: int = 0
    slots: int = 1
    software: str = ""
    address: str = ""
    server: str = ""
    ended_at: int | None = None
    end_reason: str = ""


class HealthView(msgspec.Struct, frozen=True, kw_only=True):
    """How an agent does: `ok`, `slow`, `silent`, `stuck` or `flapping`, since when and why.

    `until` is when it may show with one task that it is well, null while it is not kept from work; `probing` is True while it does so.
    """

    verdict: Verdict
    since: datetime
    reason: str
    until: datetime | None
    probing: bool


class AgentView(msgspec.Struct, frozen=True, kw_only=True):
    """An agent as callers see it."""

    id: str
    name: str
    kind: AgentKind
    state: AgentState
    state_since: datetime
    health: HealthView
    capabilities: list[Capability]
    labels: dict[str, str]
    resources: Resources
    slots: int
    free_slots: int
    running: int
    instances: int
    completed: int
    failed: int
    lost: int
    cpu_percent: float
    memory_mb: float
    description: str
    version: str
    owner: str
    endpoints: dict[str, str]
    lease_seconds: float
    note: str
    created_at: datetime
    updated_at: datetime
    last_beat_at: datetime | None
    etag: str


class BreakerView(msgspec.Struct, frozen=True, kw_only=True):
    """A circuit breaker: who has it, around what, and how it stands.

    Attributes:
        owner: name of the server or agent.
        instance: id of the server's or the agent's process.
        name: what it guards.
        since: when it last opened, or closed again.
        failures: failed calls in a row.
        opened: how often it opened since the process began.
        probe_at: when the next call goes through as a probe; null while it is closed.
        error: the kind of the last failure.
        fallback: what is done instead of a call.
    """

    owner: str
    owner_kind: Literal["server", "agent"]
    instance: str
    name: str
    state: State
    since: datetime
    failures: int
    opened: int
    probe_at: datetime | None
    error: str
    fallback: str


AGENT_KIND: Final = Kind(
    name="agent",
    fields=(Field("tenant"), Field("name"), Field("state"), Field("type"), Field("retired", "int")),
    indexes=(
        Index("agent_name", ("name", "tenant"), unique=True),
        Index("agent_state", ("state", "id")),
    ),
)
INSTANCE_KIND: Final = Kind(
    name="instance",
    fields=(Field("agent"), Field("lease_until", "int")),
    indexes=(Index("instance_agent", ("agent", "id")), Index("instance_lease", ("lease_until", "id"))),
)
