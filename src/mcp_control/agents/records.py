"""Agents and instances to and from the store, and the view callers get."""

from typing import Final

import msgspec
from msgspec.structs import replace

from mcp_control.agents.model import Agent, AgentState, AgentView, HealthView, Instance
from mcp_control.kernel.changes import Entity
from mcp_control.kernel.clock import to_datetime

_encode: Final = msgspec.msgpack.Encoder().encode
_decode_agent: Final = msgspec.msgpack.Decoder(Agent).decode
_decode_instance: Final = msgspec.msgpack.Decoder(Instance).decode


def write_agent(agent: Agent) -> tuple[Agent, Entity]:
    """Return the agent as it is after this write, and the entity that writes it over the version it was read at."""
    after = replace(agent, version=agent.version + 1)
    retired = after.retired_at is not None
    index = {
        "tenant": after.tenant,
        # A retired agent gives its name free: the unique index leaves out rows without one.
        "name": None if retired else after.spec.name,
        "state": after.state.value,
        "type": after.spec.kind,
        "retired": after.retired_at,
    }
    return after, Entity("agent", after.id, agent.version, index, _encode(after))


def read_agent(entity: Entity) -> Agent:
    """Return the agent in a stored entity."""
    return _decode_agent(entity.hot)


def write_instance(instance: Instance) -> tuple[Instance, Entity]:
    """Return the instance as it is after this write, and its entity. An ended instance leaves the indexes."""
    after = replace(instance, version=instance.version + 1)
    live = after.ended_at is None
    index = {"agent": after.agent_id if live else None, "lease_until": after.lease_until if live else None}
    return after, Entity("instance", after.id, instance.version, index, _encode(after))


def read_instance(entity: Entity) -> Instance:
    """Return the instance in a stored entity."""
    return _decode_instance(entity.hot)


def view_agent(agent: Agent, state: AgentState, free: int, running: int, instances: list[Instance]) -> AgentView:
    """Return an agent as callers see it, with what its live instances last said of themselves."""
    spec = agent.spec
    note = agent.drain or agent.quarantine
    beats = [instance.beat for instance in instances]
    last_beat = max([agent.last_beat_at, *(instance.beat_at for instance in instances)])
    return AgentView(
        id=agent.id,
        name=spec.name,
        kind=spec.kind,
        state=state,
        state_since=to_datetime(agent.state_at),
        health=HealthView(
            verdict=agent.health.verdict,
            since=to_datetime(agent.health.since or agent.created_at),
            reason=agent.health.reason,
            until=None if agent.health.until is None else to_datetime(agent.health.until),
            probing=agent.health.probing,
        ),
        capabilities=spec.capabilities,
        labels=spec.labels,
        resources=spec.resources,
        slots=spec.slots,
        free_slots=free,
        running=running,
        instances=len(instances),
        completed=agent.completed,
        failed=agent.failed,
        lost=agent.lost,
        cpu_percent=sum(beat.cpu_percent for beat in beats),
        memory_mb=sum(beat.memory_mb for beat in beats),
        description=spec.description,
        version=spec.version,
        owner=spec.owner,
        endpoints=spec.endpoints,
        lease_seconds=spec.lease_seconds,
        note=note.note if note else "",
        created_at=to_datetime(agent.created_at),
        updated_at=to_datetime(agent.updated_at or agent.created_at),
        last_beat_at=to_datetime(last_beat) if last_beat else None,
        etag=str(agent.version),
    )
