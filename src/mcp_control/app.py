"""The composition root: settings to adapters to services to the ASGI application, started and stopped in order."""

import asyncio
import gc
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog

from mcp_control import __version__
from mcp_control.agents.model import AGENT_KIND, INSTANCE_KIND, AgentState
from mcp_control.agents.service import AgentManager
from mcp_control.agents.sessions import Session, Sessions
from mcp_control.api.admission import Gate, Limits
from mcp_control.api.app import ControlApp
from mcp_control.api.assembly import application, routes
from mcp_control.api.network import NetworkServer, listening, on_signals
from mcp_control.api.services import Services
from mcp_control.artifacts.service import KINDS as ARTIFACT_KINDS
from mcp_control.artifacts.service import Artifacts
from mcp_control.configuration.settings import Settings
from mcp_control.events.broadcaster import Broadcaster
from mcp_control.events.retention import EventRetention
from mcp_control.kernel.changes import StoredFact
from mcp_control.kernel.clock import SystemClock
from mcp_control.kernel.errors import Invalid, InvalidPipeline, Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.loops import every
from mcp_control.monitoring.health import OK, Finding, Health
from mcp_control.monitoring.loop_lag import LoopLag
from mcp_control.monitoring.metrics import Metrics
from mcp_control.pipelines.catalogue import Catalogue
from mcp_control.pipelines.model import PIPELINE_KIND, RUN_KIND
from mcp_control.pipelines.retention import RunRetention
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.plugins.manager import Plugins
from mcp_control.security.accounts import Accounts
from mcp_control.security.authenticator import Authenticator
from mcp_control.security.credentials import Credentials
from mcp_control.security.model import DEFAULT_TENANT, SYSTEM
from mcp_control.security.passwords import Passwords
from mcp_control.security.records import KINDS as SECURITY_KINDS
from mcp_control.security.throttle import LoginThrottle
from mcp_control.security.tokens import AccessTokens, signing_seed
from mcp_control.security.verified import VerifiedCache
from mcp_control.storage.local.blobs import FolderBlobs
from mcp_control.storage.local.queue import LocalQueue
from mcp_control.storage.ports import Store
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.tasks.agent_sessions import AgentSessions
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.figures import TaskFigures
from mcp_control.tasks.janitors import LeaseKeeper, Reconciler, Retention, Timekeeper
from mcp_control.tasks.ledger import Ledger
from mcp_control.tasks.model import GENERATION_KIND, LOG_KIND, TASK_KIND
from mcp_control.tasks.records import generation_of
from mcp_control.tasks.service import TaskOrchestrator
from mcp_control.tasks.settling import Settler

_log = structlog.get_logger(__name__)
KINDS: Final = (
    AGENT_KIND,
    INSTANCE_KIND,
    TASK_KIND,
    LOG_KIND,
    GENERATION_KIND,
    PIPELINE_KIND,
    RUN_KIND,
    *ARTIFACT_KINDS,
    *SECURITY_KINDS,
)
_DAY_MS: Final = 86_400_000
Around = Callable[[Store], Store]


@dataclass
class Fate:
    """What ends a server early: the store's fatal error, heard from wherever it happens."""

    problem: Problem | None = None
    stop: Callable[[], None] | None = None

    def fatal(self, problem: Problem) -> None:
        """Stop the server; the process must not go on with a store in doubt."""
        self.problem = problem
        _log.critical("the store failed; the server ends", code=problem.code, detail=problem.detail)
        if self.stop is not None:
            self.stop()


@dataclass(frozen=True)
class Control:
    """A started server without its network: the application, the services, and the first administrator's password if it is new."""

    app: ControlApp
    services: Services
    one_time_password: str | None


@dataclass(frozen=True)
class Ready:
    """A server that answers.

    Attributes:
        url: where.
        one_time_password: the first administrator's, when it was made now; shown once, kept nowhere.
        services: for what the owner of the process may do, e.g. make a token.
    """

    url: str
    one_time_password: str | None
    services: Services
    _stop: Callable[[], None] = field(repr=False)

    def stop(self) -> None:
        """End the server in good order."""
        self._stop()


@asynccontextmanager
async def composed(settings: Settings, fate: Fate, around: Around | None = None) -> AsyncIterator[Control]:
    """Make and start everything but the network; stop it in the opposite order at the end.

    Args:
        around: puts something around the store, e.g. faults.

    Raises:
        StoreUnavailable: the data folder cannot be used; the message says what to do.
    """
    async with AsyncExitStack() as stack:
        clock = SystemClock()
        ids = IdSource(clock)
        disk = SqliteStore(settings.data, fatal=fate.fatal, max_waiting=settings.queues.store_changes)
        store: Store = disk if around is None else around(disk)
        plugins = Plugins(settings.plugins)
        offered = plugins.pipelines()
        types = {stage.uses for _, spec in offered for stage in spec.spec.stages}
        metrics = Metrics([endpoint.full_path for endpoint in routes(__version__)], types)
        broadcaster = Broadcaster(
            store,
            backlog=settings.queues.subscriber_events,
            limit=settings.overload.max_connections,
            broken=metrics.violation,
        )
        figures = TaskFigures(metrics, clock)

        def committed(facts: Sequence[StoredFact]) -> None:
            broadcaster.committed(facts)
            figures.heard(facts)

        await store.open(KINDS, committed)
        stack.push_async_callback(store.close)
        await broadcaster.start()
        stack.callback(broadcaster.close)

        verified = VerifiedCache()
        secret = settings.security.jwt_secret
        tokens = AccessTokens(
            signing_seed(None if secret is None else secret.get_secret_value(), settings.data),
            life_seconds=settings.security.token_seconds,
            leeway_seconds=settings.security.leeway_seconds,
        )
        throttle = LoginThrottle(store)
        accounts = Accounts(
            store,
            clock,
            ids,
            Passwords(memory_kib=settings.security.password_memory_kib),
            tokens,
            throttle,
            verified,
        )
        credentials = Credentials(store, clock, ids, verified)

        sessions = Sessions()
        manager = AgentManager(store, clock, ids, sessions)
        await manager.registry.start()
        ledger = Ledger(store)

        async def hand_out(pairs: list[tuple[str, Session]]) -> None:
            await settler.handing.hand_out(pairs)

        queue = LocalQueue()
        dispatcher = Dispatcher(queue, sessions, hand_out)
        settler = Settler(ledger, sessions, dispatcher, clock, ids, await generation_of(store))
        stack.push_async_callback(settler.handing.close)
        tasks = TaskOrchestrator(store, queue, clock, ids, manager, ledger, settler, dispatcher)
        agent_sessions = AgentSessions(store, clock, manager, ledger, settler, dispatcher)
        lease_keeper = LeaseKeeper(clock, manager, agent_sessions)
        reconciler = Reconciler(store, clock, ledger, settler, dispatcher, metrics.violation)
        catalogue = Catalogue(
            store,
            clock,
            ids,
            lambda tenant: {one.name for _, spec in manager.registry.known(tenant) for one in spec.capabilities},
        )
        engine = PipelineEngine(store, clock, ids, settler, catalogue)
        settler.follower = engine
        artifacts = Artifacts(
            store, FolderBlobs(settings.data), clock, ids, max_bytes=settings.limits.max_artifact_bytes
        )

        overload = settings.overload
        limits = Limits(
            submits=overload.max_requests,
            lag=overload.loop_lag_seconds,
            queued=overload.max_queued_tasks,
            after=overload.retry_after_seconds,
        )
        gate = Gate(lambda: disk.waiting, metrics.shed, limits)

        async def look_at_lanes(_: int) -> None:
            figures.look(await queue.depths(), dispatcher)
            gate.queued = figures.waiting

        def note_lag(seconds: float) -> None:
            gate.lag = seconds
            metrics.loop_lag(seconds)

        lag = LoopLag(clock, noted=note_lag)
        lag.start()
        stack.push_async_callback(lag.stop)
        health = Health()

        async def writable() -> Finding:
            return OK if disk.writable else Finding("failed", "takes no writes")

        async def complete() -> Finding:
            left_out = ", ".join(f"{name} {why}" for name, why in plugins.failed.items())
            return Finding("degraded", left_out) if left_out else OK

        async def kept() -> Finding:
            broken = ", ".join(f"{name} {count} times" for name, count in metrics.violations().items())
            return Finding("degraded", f"broken promises: {broken}") if broken else OK

        async def steady() -> Finding:
            return Finding("degraded", "it jumped; leases hold one term longer") if lease_keeper.holding else OK

        health.add("store", writable)
        health.add("clock", steady, critical=False)
        health.add("invariants", kept, critical=False)
        health.add("plugins", complete, critical=False)
        _watch(metrics, disk, broadcaster, manager, reconciler, lease_keeper)
        metrics.watch_lanes(figures.lanes)
        services = Services(
            settings=settings,
            version=__version__,
            node=settings.node or socket.gethostname(),
            clock=clock,
            ids=ids,
            gate=gate,
            metrics=metrics,
            health=health,
            store=store,
            started=clock.monotonic(),
            plugins=plugins,
            broadcaster=broadcaster,
            authenticator=Authenticator(store, tokens, verified),
            accounts=accounts,
            credentials=credentials,
            agents=manager,
            tasks=tasks,
            sessions=agent_sessions,
            dispatcher=dispatcher,
            pipelines=engine,
            artifacts=artifacts,
        )
        one_time_password = await accounts.ensure_administrator()
        for name, spec in offered:
            try:
                await engine.create(SYSTEM, spec)
            except (Invalid, InvalidPipeline) as problem:
                plugins.leave_out(name, f"its pipeline {spec.metadata.name}: {problem.detail}")
        await reconciler.rebuild()

        keep = settings.retention
        events = EventRetention(store, keep_ms=round(keep.events_days * _DAY_MS), keep_count=keep.events_count)
        old_tasks = Retention(store, clock, round(keep.tasks_days * _DAY_MS))
        old_runs = RunRetention(store, artifacts, round(keep.runs_days * _DAY_MS))
        timekeeper = Timekeeper(store, clock, settler)
        for name, seconds, once in (
            ("timekeeper", 0.1, lambda _: timekeeper.once()),
            ("lanes", 0.25, look_at_lanes),
            ("leases", settings.leases.sweep_seconds, lambda _: lease_keeper.once()),
            ("reconciler", 60.0, lambda _: reconciler.once()),
            ("events-retention", keep.interval_seconds, events.once),
            ("tasks-retention", keep.interval_seconds, lambda _: old_tasks.once()),
            ("runs", 1.0, engine.heal),
            ("runs-retention", keep.interval_seconds, old_runs.once),
            ("enrolments", 60.0, credentials.once),
            ("login-failures", 60.0, throttle.once),
            ("blobs", 60.0, artifacts.once),
        ):
            stack.push_async_callback(every(seconds, once, name=name, clock=clock).stop)
        stack.push_async_callback(_stopped, [asyncio.create_task(dispatcher.run())])
        yield Control(application(services), services, one_time_password)


def _watch(
    metrics: Metrics,
    store: SqliteStore,
    broadcaster: Broadcaster,
    manager: AgentManager,
    reconciler: Reconciler,
    lease_keeper: LeaseKeeper,
) -> None:
    """Show what is read when the figures are."""

    def agents() -> dict[str, float]:
        return dict(Counter(agent.state.value for agent in manager.registry.registered(DEFAULT_TENANT)))

    metrics.watch_states("agents", "agents, by state", [state.value for state in AgentState], agents)
    metrics.watch("store_waiting", "changes that wait for a commit", lambda: store.waiting)
    metrics.watch("sessions", "connected agent instances", lambda: len(manager.sessions))
    metrics.watch("subscriptions", "open event subscriptions", lambda: broadcaster.subscribers)
    metrics.watch_total("facts", "facts recorded", lambda: broadcaster.newest)
    metrics.watch_total("orphans", "tasks whose holder had ended without them", lambda: reconciler.orphans)
    metrics.watch_total("clock_holds", "times a clock jump made leases hold longer", lambda: lease_keeper.holds)


async def _stopped(loops: list[asyncio.Task[None]]) -> None:
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)


async def serve(
    settings: Settings, ready: Callable[[Ready], Awaitable[None]] | None = None, around: Around | None = None
) -> int:
    """Run a server until SIGINT, SIGTERM, `Ready.stop` or a fatal error of the store.

    Args:
        ready: called once it answers; when it raises, the server ends and the exception goes to the caller.
        around: puts something around the store; see `composed`.

    Returns:
        The exit code of the process: 0 after an orderly end, 1 after a fatal error of the store.

    Raises:
        StoreUnavailable: the data folder cannot be used.
        OSError: the address is taken.
    """
    listener = listening(settings)
    try:
        fate = Fate()
        async with composed(settings, fate, around) as control:
            server = NetworkServer(control.app, settings, control.services.broadcaster.close)

            def stop() -> None:
                server.should_exit = True

            def stop_now() -> None:
                server.should_exit = server.force_exit = True

            fate.stop = stop_now
            _spare_collections()
            with on_signals(stop):
                running = asyncio.create_task(server.serve([listener]))
                try:
                    answering = asyncio.create_task(server.answering.wait())
                    await asyncio.wait((answering, running), return_when=asyncio.FIRST_COMPLETED)
                    answering.cancel()
                    if ready is not None:
                        scheme = "http" if settings.tls_cert is None else "https"
                        host = f"[{settings.host}]" if ":" in settings.host else settings.host
                        url = f"{scheme}://{host}:{listener.getsockname()[1]}"
                        await ready(Ready(url, control.one_time_password, control.services, stop))
                    await asyncio.shield(running)
                finally:
                    stop()
                    await running
        return 0 if fate.problem is None else 1
    finally:
        listener.close()


def _spare_collections() -> None:
    """Keep what the start has made out of garbage collection, and collect less often: full collections were the longest pauses."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
