"""The composition root: settings to adapters to services to the ASGI application, started and stopped in order."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog

from mcp_control import __version__
from mcp_control.agents.breakers import Breakers
from mcp_control.agents.service import AgentManager
from mcp_control.agents.sessions import Session, Sessions
from mcp_control.api.admission import Gate, Limits
from mcp_control.api.app import ControlApp
from mcp_control.api.assembly import application, routes
from mcp_control.api.services import Cluster, Services
from mcp_control.artifacts.service import Artifacts
from mcp_control.backend import Around, backend
from mcp_control.configuration.settings import Settings
from mcp_control.events.broadcaster import Broadcaster
from mcp_control.keeping import Once, retention_loops
from mcp_control.kernel.changes import StoredFact
from mcp_control.kernel.errors import Invalid, InvalidPipeline, Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.loops import every
from mcp_control.kinds import KINDS as KINDS
from mcp_control.member import Member, led
from mcp_control.monitoring.health import Health
from mcp_control.monitoring.loop_lag import LoopLag
from mcp_control.monitoring.metrics import Metrics
from mcp_control.observing import watch_breakers, watch_figures, watch_health
from mcp_control.pipelines.asks import settled as questions
from mcp_control.pipelines.capacity import Capacity
from mcp_control.pipelines.catalogue import Catalogue
from mcp_control.pipelines.explaining import RunExplainer
from mcp_control.pipelines.firing import Firing
from mcp_control.pipelines.healing import RunHealer
from mcp_control.pipelines.inputs import Inputs
from mcp_control.pipelines.nesting import Nesting
from mcp_control.pipelines.planning import Planner
from mcp_control.pipelines.rerunning import Reruns
from mcp_control.pipelines.results import StageResults
from mcp_control.pipelines.scheduler import Scheduler
from mcp_control.pipelines.service import PipelineEngine
from mcp_control.pipelines.timekeeping import ScheduleKeeper
from mcp_control.plugins.manager import Plugins
from mcp_control.security.accounts import Accounts
from mcp_control.security.authenticator import Authenticator
from mcp_control.security.credentials import Credentials
from mcp_control.security.model import SYSTEM
from mcp_control.security.passwords import Passwords
from mcp_control.security.throttle import LoginThrottle
from mcp_control.security.tokens import AccessTokens, shared_seed, signing_seed
from mcp_control.security.verified import VerifiedCache
from mcp_control.tasks.agent_sessions import AgentSessions
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.figures import TaskFigures
from mcp_control.tasks.history import TaskHistory
from mcp_control.tasks.janitors import LeaseKeeper, Reconciler, Timekeeper
from mcp_control.tasks.ledger import Ledger
from mcp_control.tasks.limit_service import LimitManager
from mcp_control.tasks.model import Task
from mcp_control.tasks.peers import Peers
from mcp_control.tasks.records import generation_of
from mcp_control.tasks.reports import LogCap
from mcp_control.tasks.service import TaskOrchestrator
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.shares import ShareManager
from mcp_control.tasks.spending import Spending
from mcp_control.tasks.steering import Steering
from mcp_control.watching import AgentWatch, chooser_for

_log = structlog.get_logger(__name__)


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


@asynccontextmanager
async def composed(settings: Settings, fate: Fate, around: Around | None = None) -> AsyncIterator[Control]:
    """Make and start everything but the network; stop it in the opposite order at the end.

    Args:
        around: puts something around the store, e.g. faults.

    Raises:
        StoreUnavailable: the data folder cannot be used; the message says what to do.
    """
    async with AsyncExitStack() as stack:
        name = settings.node or socket.gethostname()
        base = await stack.enter_async_context(backend(settings, name, fate.fatal, around))
        clock, store, shared = base.clock, base.store, base.shared
        ids = IdSource(clock)
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
        history = TaskHistory(store, clock)
        figures = TaskFigures(metrics, clock, ran=history.ran)

        hearing: list[Callable[[Sequence[StoredFact]], None]] = [broadcaster.committed, figures.heard]

        def committed(facts: Sequence[StoredFact]) -> None:
            for hear in hearing:
                hear(facts)

        await base.open(KINDS, committed)
        queue = base.queue
        await broadcaster.start()
        stack.callback(broadcaster.close)

        verified = VerifiedCache()
        secret = settings.security.jwt_secret
        if secret is None and shared:
            seed = await shared_seed(store, ids, clock)
        else:
            seed = signing_seed(None if secret is None else secret.get_secret_value(), settings.data)
        tokens = AccessTokens(
            seed,
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
        manager = AgentManager(store, clock, ids, sessions, server=base.server)
        await manager.registry.start()
        ledger = Ledger(store, shared=shared)
        ledger.questions = questions
        peers = Peers(base.bus, base.server)

        async def hand_out(pairs: list[tuple[str, Session]]) -> None:
            await settler.handing.hand_out(pairs)

        async def look_up(task_id: str) -> Task | None:
            return (await ledger.load([task_id], fresh=True))[0]

        point_ms = round(settings.queues.priority_seconds * 1000)
        chooser = chooser_for(settings, store, clock, manager.registry)
        dispatcher = Dispatcher(queue, sessions, hand_out, peers, look_up, point_ms, chooser=chooser)
        shares = ShareManager(store, clock, queue, dispatcher, figures)
        await shares.start()
        settler = Settler(
            ledger, sessions, dispatcher, clock, ids, await generation_of(store), peers, point_ms, history.expected
        )
        stack.push_async_callback(settler.handing.background.close)
        spending = Spending(store, ledger, settler, clock)
        tasks = TaskOrchestrator(store, queue, clock, ids, manager, ledger, settler, dispatcher, history, spending)
        steering = Steering.of(store, clock, ids, manager, ledger, settler, dispatcher, tasks, spending, hearing)
        agent_sessions = AgentSessions(store, clock, manager, ledger, settler, dispatcher, spending, peers=peers)
        agent_sessions.log_cap = LogCap(settings.limits.max_log_lines, settings.limits.max_log_bytes)
        limiting = LimitManager(store, clock, ids, ledger, settler, dispatcher, tasks, metrics)
        stack.push_async_callback(limiting.stop)
        await limiting.start()
        lease_keeper = LeaseKeeper(clock, manager, agent_sessions)
        reconciler = Reconciler(store, clock, ledger, settler, dispatcher, metrics.violation)
        watch = AgentWatch(
            settings, metrics, store, clock, manager, agent_sessions, lease_keeper, ledger, settler, dispatcher, history
        )
        catalogue = Catalogue(
            store,
            clock,
            ids,
            lambda tenant: {one.name for _, spec in manager.registry.known(tenant) for one in spec.capabilities},
            shared,
        )
        kept = StageResults(store, clock, manager.registry.registered, round(settings.retention.runs_days * 86_400_000))
        stack.push_async_callback(kept.background.close)
        engine = PipelineEngine(store, clock, ids, settler, catalogue, shared, Capacity(manager).free, kept)
        settler.follower = engine
        nested = Nesting(store, clock, engine).background
        stack.push_async_callback(nested.close)
        firing = Firing(store, clock, engine, settler)
        limit = settings.limits.max_artifact_bytes
        artifacts = Artifacts(store, base.blobs, clock, ids, max_bytes=limit, shared=shared)
        if shared:
            hearing += [manager.registry.heard, tasks.heard, limiting.heard, shares.heard, engine.heard]

        overload = settings.overload
        limits = Limits(
            submits=overload.max_requests,
            lag=overload.loop_lag_seconds,
            queued=overload.max_queued_tasks,
            after=overload.retry_after_seconds,
        )
        gate = Gate(base.waiting, metrics.shed, limits)

        async def look_at_lanes(_: int) -> None:
            depths = await queue.depths()
            figures.look(depths, await ledger.load([depth.first for depth in depths]))
            gate.queued = figures.waiting

        def note_lag(seconds: float) -> None:
            gate.lag = seconds
            metrics.loop_lag(seconds)

        lag = LoopLag(clock, noted=note_lag)
        lag.start()
        stack.push_async_callback(lag.stop)
        health = Health()

        watch_health(health, base, plugins, metrics, lease_keeper)
        beside = (settler.handing.background, kept.background, nested)
        watch_figures(metrics, base, broadcaster, manager, reconciler, lease_keeper, steering.parking, beside)
        metrics.watch_lanes(figures.lanes)
        breakers = Breakers(store, name, base.server, base.statuses, base.nodes, manager)
        watch_breakers(metrics, breakers)
        services = Services(
            settings=settings,
            version=__version__,
            node=name,
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
            breakers=breakers,
            tasks=tasks,
            steering=steering,
            spending=spending,
            history=history,
            catalogue=catalogue,
            planner=Planner(clock, catalogue, manager, history, figures.lanes),
            sessions=agent_sessions,
            dispatcher=dispatcher,
            pipelines=engine,
            inputs=Inputs(store, clock, ids, engine, settler),
            reruns=Reruns(engine),
            scheduler=Scheduler(store, clock, ids, firing),
            limits=limiting,
            shares=shares,
            run_explainer=RunExplainer(store, engine, tasks),
            artifacts=artifacts,
            cluster=Cluster(
                store=base.kind,
                server=base.server,
                nodes=base.nodes,
                leadership=base.leadership,
                queue=base.queue_state,
            ),
        )
        one_time_password = await accounts.ensure_administrator()
        for name, spec in offered:
            try:
                await engine.create(SYSTEM, spec)
            except (Invalid, InvalidPipeline) as problem:
                plugins.leave_out(name, f"its pipeline {spec.metadata.name}: {problem.detail}")
        if not shared:
            await reconciler.rebuild()

        timekeeper = Timekeeper(store, clock, settler)
        one_server: list[tuple[str, float, Once]] = [
            *limiting.loops(),
            ("timekeeper", 0.1, lambda _: timekeeper.once()),
            ("budgets", 1.0, spending.once),
            ("leases", settings.leases.sweep_seconds, lambda _: lease_keeper.once()),
            *watch.one_server,
            ("reconciler", 60.0, lambda _: reconciler.once()),
            ("runs", 1.0, RunHealer(store, engine).once),
            ("schedules", 0.25, ScheduleKeeper(store, clock, firing).once),
            *retention_loops(settings.retention, store, clock, artifacts, history, shares),
            ("enrolments", 60.0, credentials.once),
            ("login-failures", 60.0, throttle.once),
            ("blobs", 60.0, artifacts.once),
            *steering.leading(settings.retention),
        ]
        every_server: list[tuple[str, float, Once]] = [
            ("lanes", 0.25, look_at_lanes),
            *watch.every_server,
            ("statistics", 2.0, lambda now: history.once(now, leading=base.leading)),
            ("shares", 1.0, lambda now: shares.once(now, leading=base.leading)),
            ("breakers", 1.0, breakers.once),
        ]
        if shared:
            member = Member(
                base, peers, dispatcher, agent_sessions, settler, lease_keeper, reconciler, services.sockets
            )
            one_server.append(("refill", 0.5, member.refill))
            every_server += [
                ("other-lanes", 0.5, member.look),
                ("silence", 0.5, member.silence),
                ("cut-off", 1.0, member.cut_off),
            ]
            stack.push_async_callback(_stopped, [asyncio.create_task(peers.run(member.heard))])
        for loop, pace, once in (*every_server, *((loop, pace, led(base, once)) for loop, pace, once in one_server)):
            stack.push_async_callback(every(pace, once, name=loop, clock=clock).stop)
        stack.push_async_callback(_stopped, [asyncio.create_task(dispatcher.run())])
        yield Control(application(services), services, one_time_password)


async def _stopped(loops: list[asyncio.Task[None]]) -> None:
    for loop in loops:
        loop.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
