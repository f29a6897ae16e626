"""What the handlers call: every component, as the composition root made them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from mcp_control.agents.breakers import Breakers
from mcp_control.agents.service import AgentManager
from mcp_control.api.admission import Gate
from mcp_control.api.open_sockets import OpenSockets
from mcp_control.artifacts.service import Artifacts
from mcp_control.configuration.settings import Settings
from mcp_control.coordination.leadership import Leadership
from mcp_control.coordination.nodes import Nodes
from mcp_control.events.broadcaster import Broadcaster
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.ids import IdSource
from mcp_control.monitoring.health import Health
from mcp_control.monitoring.metrics import Metrics
from mcp_control.pipelines.catalogue import Catalogue
from mcp_control.pipelines.explaining import RunExplainer
from mcp_control.pipelines.inputs import Inputs
from mcp_control.pipelines.planning import Planner
from mcp_control.pipelines.rerunning import Reruns
from mcp_control.pipelines.scheduler import Scheduler
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.plugins.manager import Plugins
from mcp_control.security.accounts import Accounts
from mcp_control.security.authenticator import Authenticator
from mcp_control.security.credentials import Credentials
from mcp_control.storage.ports import Store
from mcp_control.tasks.agent_sessions import AgentSessions
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.history import TaskHistory
from mcp_control.tasks.limit_service import LimitManager
from mcp_control.tasks.service import TaskOrchestrator
from mcp_control.tasks.shares import ShareManager
from mcp_control.tasks.spending import Spending
from mcp_control.tasks.steering import Steering


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What a server knows of the others.

    Attributes:
        store: `sqlite` or `mongodb`.
        server: id of this one; empty for a single server.
        nodes, leadership: None for a single server.
        queue: says where waiting tasks are taken from: `memory`, `redis` or `store`.
    """

    store: str
    server: str
    nodes: Nodes | None
    leadership: Leadership | None
    queue: Callable[[], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """All services of one server.

    Attributes:
        started: when, on the monotonic clock.
    """

    settings: Settings
    version: str
    node: str
    clock: Clock
    ids: IdSource
    gate: Gate
    metrics: Metrics
    health: Health
    store: Store
    started: float
    plugins: Plugins
    broadcaster: Broadcaster
    authenticator: Authenticator
    accounts: Accounts
    credentials: Credentials
    agents: AgentManager
    breakers: Breakers
    tasks: TaskOrchestrator
    steering: Steering
    spending: Spending
    history: TaskHistory
    sessions: AgentSessions
    dispatcher: Dispatcher
    pipelines: PipelineEngine
    catalogue: Catalogue
    planner: Planner
    inputs: Inputs
    reruns: Reruns
    scheduler: Scheduler
    limits: LimitManager
    shares: ShareManager
    run_explainer: RunExplainer
    artifacts: Artifacts
    cluster: Cluster
    sockets: OpenSockets = field(default_factory=OpenSockets)
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self) -> None:
        """Hear that the server is about to stop: streams and long polls end now."""
        self.health.stopping()
        self.ending.set()
        self.broadcaster.close()

    @property
    def body_stall_seconds(self) -> float:
        """Seconds a peer may stand still: one that sends a body, or one that is sent to."""
        return self.settings.limits.body_timeout_seconds

    @property
    def body_max(self) -> int:
        """Bytes a request body may have, except for uploads."""
        return self.settings.limits.max_body_bytes
