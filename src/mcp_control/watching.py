"""Watching over agents, wired: what they get done, and whether what they are counted to hold is what the leases say."""

from collections import Counter
from collections.abc import Awaitable, Callable

from mcp_control.agents.health import Rules
from mcp_control.agents.model import VERDICTS
from mcp_control.agents.registry import Registry
from mcp_control.agents.service import AgentManager
from mcp_control.agents.verdicts import Verdicts
from mcp_control.configuration.settings import Settings
from mcp_control.kernel.clock import Clock
from mcp_control.monitoring.metrics import Metrics
from mcp_control.security.model import DEFAULT_TENANT
from mcp_control.storage.ports import Store
from mcp_control.tasks.agent_sessions import AgentSessions
from mcp_control.tasks.choosing import Chooser
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.drift import DriftKeeper
from mcp_control.tasks.health import HealthKeeper
from mcp_control.tasks.history import TaskHistory
from mcp_control.tasks.janitors import LeaseKeeper
from mcp_control.tasks.ledger import Ledger
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.speeds import Speeds

Once = Callable[[int], Awaitable[object]]
_DRIFT_PACE = 5.0
_PROBE_PACE = 0.5
_SPEED_PACE = 1.0


def chooser_for(settings: Settings, store: Store, clock: Clock, registry: Registry) -> Chooser:
    """Return who chooses agents for tasks, by the strategy of the settings."""
    return Chooser(settings.dispatch.strategy, registry, Speeds(store, clock.monotonic))


class AgentWatch:
    """Builds who watches and tells them of all they have to hear.

    Attributes:
        every_server, one_server: the loops: name, pace in seconds, what to do.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        store: Store,
        clock: Clock,
        manager: AgentManager,
        agents: AgentSessions,
        leases: LeaseKeeper,
        ledger: Ledger,
        settler: Settler,
        dispatcher: Dispatcher,
        history: TaskHistory,
    ) -> None:
        wanted = settings.health
        rules = Rules(
            least_history=wanted.least_history,
            slow_factor=wanted.slow_factor,
            stuck_factor=wanted.stuck_factor,
            stuck_seconds=wanted.stuck_seconds,
            silent_seconds=wanted.silent_seconds,
            flapping_losses=wanted.flapping_losses,
            flapping_connects=wanted.flapping_connects,
            window_seconds=wanted.window_seconds,
            probe_seconds=wanted.probe_seconds,
            probe_longest_seconds=wanted.probe_longest_seconds,
        )
        verdicts = Verdicts(clock, manager.registry, rules)
        keeper = HealthKeeper(
            clock,
            manager.sessions,
            ledger,
            settler,
            dispatcher,
            verdicts,
            history.times,
            rules,
            fence=wanted.fence,
            quarantine=wanted.quarantine,
        )
        manager.sessions.greeting.append(keeper.connected)
        agents.tried = keeper.ended
        leases.lost = keeper.lost
        pace = settings.leases.drift_seconds
        drift = DriftKeeper(
            store, clock, manager.sessions, ledger, dispatcher, settler.handing, pace, metrics.violation
        )
        self.every_server: list[tuple[str, float, Once]] = [
            ("agent-health", wanted.interval_seconds, keeper.once),
            ("drift", min(_DRIFT_PACE, pace), lambda _: drift.once()),
        ]
        if (speeds := dispatcher.chooser.speeds) is not None:
            agents.speeds = speeds
            self.every_server.append(("speeds", _SPEED_PACE, lambda _: speeds.once()))
        self.one_server: list[tuple[str, float, Once]] = [("agent-probes", _PROBE_PACE, verdicts.once)]

        def health() -> dict[str, float]:
            return dict(Counter(agent.health.verdict for agent in manager.registry.registered(DEFAULT_TENANT)))

        metrics.watch_states("agent_health", "agents, by verdict on what they get done", VERDICTS, health)
        metrics.watch_total(
            "reports_refused",
            "reports under a lease that was not the live one, or after the end",
            lambda: agents.refused,
        )
        metrics.watch_total("tasks_fenced", "tasks taken from agents that did not move them on", lambda: keeper.fenced)
        metrics.watch(
            "slot_drift", "slots counted wrongly when all were last looked at; must be 0", lambda: drift.drift
        )
        metrics.watch_total(
            "slot_drift_healed", "slots that were counted wrongly and were set right", lambda: drift.healed
        )
