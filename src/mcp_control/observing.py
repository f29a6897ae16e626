"""What the health report and the metrics show of a running server."""

from collections import Counter
from collections.abc import Sequence

from mcp_control.agents.breakers import Breakers
from mcp_control.agents.model import AgentState
from mcp_control.agents.service import AgentManager
from mcp_control.backend import Backend
from mcp_control.events.broadcaster import Broadcaster
from mcp_control.kernel.background import Background
from mcp_control.kernel.breaker_rules import STATES
from mcp_control.monitoring.health import OK, Finding, Health
from mcp_control.monitoring.metrics import Metrics
from mcp_control.plugins.manager import Plugins
from mcp_control.security.model import DEFAULT_TENANT
from mcp_control.tasks.janitors import LeaseKeeper, Reconciler
from mcp_control.tasks.parking import Parking


def watch_health(health: Health, base: Backend, plugins: Plugins, metrics: Metrics, lease_keeper: LeaseKeeper) -> None:
    """Add the components of a server to its health report."""

    async def writable() -> Finding:
        if base.nodes is not None and base.nodes.cut_off:
            return Finding("failed", "has not answered for seconds")
        return OK if base.writable() else Finding("failed", "takes no writes")

    async def complete() -> Finding:
        left_out = ", ".join(f"{name} {why}" for name, why in plugins.failed.items())
        return Finding("degraded", left_out) if left_out else OK

    async def kept() -> Finding:
        broken = ", ".join(f"{name} {count} times" for name, count in metrics.violations().items())
        return Finding("degraded", f"broken promises: {broken}") if broken else OK

    async def steady() -> Finding:
        return Finding("degraded", "leases hold one term longer, for a while") if lease_keeper.holding else OK

    async def redis() -> Finding:
        queue = base.resilient
        if queue is None or queue.state == "redis":
            return OK
        return Finding("degraded", "not there or being filled; work is taken from the database, more slowly")

    health.add("store", writable)
    health.add("clock", steady, critical=False)
    health.add("invariants", kept, critical=False)
    health.add("plugins", complete, critical=False)
    if base.resilient is not None:
        health.add("redis", redis, critical=False)


def watch_breakers(metrics: Metrics, breakers: Breakers) -> None:
    """Show how the circuit breakers stand."""
    metrics.watch_states(
        "breakers", "circuit breakers of this server and the agents connected to it, by state", STATES, breakers.counts
    )


def watch_figures(
    metrics: Metrics,
    base: Backend,
    broadcaster: Broadcaster,
    manager: AgentManager,
    reconciler: Reconciler,
    lease_keeper: LeaseKeeper,
    parking: Parking,
    beside: Sequence[Background],
) -> None:
    """Show what is read when the figures are."""
    metrics.watch_total(
        "tasks_parked", "stored tasks that could not be decoded and were parked", lambda: parking.parked
    )

    def agents() -> dict[str, float]:
        return dict(Counter(agent.state.value for agent in manager.registry.registered(DEFAULT_TENANT)))

    metrics.watch_states("agents", "agents, by state", [state.value for state in AgentState], agents)
    metrics.watch("store_waiting", "changes that wait for a commit", base.waiting)
    metrics.watch("sessions", "connected agent instances", lambda: len(manager.sessions))
    metrics.watch("subscriptions", "open event subscriptions", lambda: broadcaster.subscribers)
    metrics.watch("leading", "whether this server does what only one should do", lambda: base.leading)
    metrics.watch_total("facts", "facts recorded", lambda: broadcaster.newest)
    metrics.watch_total(
        "background_failures",
        "work beside the calls that failed; each is in the log",
        lambda: sum(background.failures for background in beside),
    )
    metrics.watch_total("orphans", "tasks whose holder had ended without them", lambda: reconciler.orphans)
    metrics.watch_total("clock_holds", "times a clock jump made leases hold longer", lambda: lease_keeper.holds)
