"""Routes about the server itself: health, status, lanes, metrics."""

from datetime import datetime
from enum import StrEnum
from typing import Final

import msgspec

from mcp_control.api.call import Call, Reply, reply
from mcp_control.api.routing import Endpoint
from mcp_control.api.services import Cluster, Services
from mcp_control.kernel.changes import Where
from mcp_control.kernel.clock import to_datetime
from mcp_control.monitoring.health import HealthReport
from mcp_control.monitoring.metrics import CONTENT_TYPE
from mcp_control.pipelines.model import RunState
from mcp_control.security.policy import allow
from mcp_control.storage.ports import Store
from mcp_control.tasks.model import TaskState


class Alive(msgspec.Struct, frozen=True, kw_only=True):
    """The process answers."""

    status: str = "ok"


class LaneView(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks that wait and agents that could take them: same type and needs, so one line."""

    type: str
    waiting: int
    agents: int
    free_slots: int


class Lanes(msgspec.Struct, frozen=True, kw_only=True):
    """The lanes in which something waits."""

    items: list[LaneView]
    next_cursor: str | None = None


class ServerView(msgspec.Struct, frozen=True, kw_only=True):
    """A server of the cluster. `url` is empty where it does not say how it is reached."""

    id: str
    name: str
    url: str
    version: str
    started_at: datetime
    leader: bool


class ClusterView(msgspec.Struct, frozen=True, kw_only=True):
    """Where the data is, where waiting tasks are taken from (`memory`, `redis`, `store`), and the servers; none for a single one."""

    store: str
    queue: str
    servers: list[ServerView]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The server at a glance. Counts of tasks and runs end at 100,000 per state; `problems` says in words what is wrong."""

    version: str
    node: str
    uptime_seconds: float
    store: dict[str, object]
    agents: dict[str, int]
    tasks: dict[str, int]
    runs: dict[str, int]
    lanes: list[LaneView]
    problems: list[str]
    cluster: ClusterView


class PluginView(msgspec.Struct, frozen=True, kw_only=True):
    """A plugin that is loaded."""

    name: str
    version: str


class Plugins(msgspec.Struct, frozen=True, kw_only=True):
    """The plugins of this server."""

    items: list[PluginView]
    next_cursor: str | None = None


_TOLD: Final = 5
# Counting is a walk over an index; beyond this the exact number tells a person nothing more.
_COUNT_MAX: Final = 100_000


async def live(_call: Call) -> Reply:
    """Say that the process answers."""
    return reply(Alive())


async def ready(call: Call) -> Reply:
    """Say whether the server takes work: 503 while it cannot write."""
    report = await call.services.health.report()
    return reply(report, 200 if report.ready else 503)


async def status(call: Call) -> Reply:
    """Show the server at a glance."""
    services = call.services
    allow(call.actor, "system.status")
    health = await services.health.report()
    await services.agents.look()
    agents: dict[str, int] = {}
    for agent in services.agents.registry.registered(call.actor.tenant):
        state = services.agents.view(agent).state.value
        agents[state] = agents.get(state, 0) + 1
    return reply(
        Status(
            version=services.version,
            node=services.node,
            uptime_seconds=round(services.clock.monotonic() - services.started, 3),
            store={
                "waiting": services.gate.waiting(),
                "events": services.broadcaster.newest,
            },
            agents=agents,
            tasks=await _by_state(services.store, "task", TaskState),
            runs=await _by_state(services.store, "run", RunState),
            lanes=_lanes(services),
            problems=[
                *(f"{part.name}: {part.detail}" for part in health.components if part.state != "ok"),
                *_stuck(services),
            ],
            cluster=await _cluster(services.cluster),
        )
    )


async def _cluster(cluster: Cluster) -> ClusterView:
    leader = "" if cluster.leadership is None else cluster.leadership.holder
    nodes = [] if cluster.nodes is None else await cluster.nodes.all()
    servers = [
        ServerView(
            id=node.id,
            name=node.name,
            url=node.url,
            version=node.software,
            started_at=to_datetime(node.started_at),
            leader=node.id == leader,
        )
        for node in nodes
    ]
    return ClusterView(store=cluster.store, queue=cluster.queue(), servers=servers)


def _stuck(services: Services) -> list[str]:
    """Return what waits while no agent is there that could take it, the longest rows first."""
    stuck = sorted((lane.waiting, lane.type) for lane in _lanes(services) if not lane.agents)
    told = [
        f"tasks: {waiting} of type {name} wait and no agent online takes them"
        for waiting, name in stuck[: -_TOLD - 1 : -1]
    ]
    return [*told, f"tasks: {len(stuck) - _TOLD} more lanes wait for agents"] if len(stuck) > _TOLD else told


async def _by_state(store: Store, kind: str, states: type[StrEnum]) -> dict[str, int]:
    counts = {
        state.value: await store.count(kind, (Where("state", "eq", state.value),), _COUNT_MAX) for state in states
    }
    return {state: count for state, count in counts.items() if count}


def _lanes(services: Services) -> list[LaneView]:
    return [
        LaneView(
            type=lane.demand.type,
            waiting=lane.waiting,
            agents=len({session.agent.id for session in lane.sessions}),
            free_slots=sum(session.free for session in lane.sessions),
        )
        for lane in services.dispatcher.lanes()
        if lane.waiting
    ]


async def lanes(call: Call) -> Reply:
    """List the lanes in which tasks wait."""
    allow(call.actor, "system.lanes")
    return reply(Lanes(items=_lanes(call.services)))


async def plugins(call: Call) -> Reply:
    """List the plugins that are loaded."""
    allow(call.actor, "system.plugins")
    return reply(
        Plugins(items=[PluginView(name=plugin.name, version=plugin.version) for plugin in call.services.plugins.loaded])
    )


async def metrics(call: Call) -> Reply:
    """Return the figures for Prometheus."""
    allow(call.actor, "system.metrics")
    return Reply(200, call.services.metrics.render(), ((b"content-type", CONTENT_TYPE.encode()),))


ENDPOINTS: Final = (
    Endpoint(
        method="GET", path="/health/live", handler=live, summary="Is the process alive?", tag="system", access="open", weight="keep",
        returns=Alive, absolute=True,
    ),
    Endpoint(
        method="GET", path="/health/ready", handler=ready, summary="Does it take work?", tag="system", access="open", weight="keep",
        returns=HealthReport, statuses=(503,), absolute=True,
    ),
    Endpoint(method="GET", path="/status", handler=status, summary="Status", tag="system", returns=Status),
    Endpoint(method="GET", path="/lanes", handler=lanes, summary="Lanes", tag="system", returns=Lanes),
    Endpoint(method="GET", path="/plugins", handler=plugins, summary="Plugins", tag="system", returns=Plugins),
    Endpoint(
        method="GET", path="/metrics", handler=metrics, summary="Figures for Prometheus", tag="system", weight="keep", absolute=True,
        produces=("text/plain",), any_media=True,
    ),
)  # fmt: skip
