"""The task component on a real store, and an agent that speaks to it without a socket."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from mcp_control.agents.model import AGENT_KIND, INSTANCE_KIND, AgentSpec, Beat, Capability, Resources
from mcp_control.agents.service import AgentManager
from mcp_control.agents.sessions import Session, Sessions
from mcp_control.kernel.changes import StoredFact
from mcp_control.kernel.clock import Clock
from mcp_control.kernel.errors import Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.pipelines.asks import settled
from mcp_control.pipelines.input_model import APPROVAL_KIND
from mcp_control.security.model import Actor
from mcp_control.storage.local.bus import LocalBus
from mcp_control.storage.local.queue import LocalQueue
from mcp_control.storage.ports import Bus, Queue, Store
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.tasks.agent_sessions import AgentSessions
from mcp_control.tasks.budget_model import BUDGET_KIND
from mcp_control.tasks.choosing import Chooser
from mcp_control.tasks.dispatcher import Dispatcher
from mcp_control.tasks.group_model import GROUP_KIND
from mcp_control.tasks.history import TaskHistory
from mcp_control.tasks.janitors import LeaseKeeper, Reconciler, Retention, Timekeeper
from mcp_control.tasks.keyed import KeyedSubmission
from mcp_control.tasks.ledger import Ledger
from mcp_control.tasks.limit_model import KINDS as LIMIT_KINDS
from mcp_control.tasks.limit_rules import Rules
from mcp_control.tasks.limits import Limits
from mcp_control.tasks.model import LOG_KIND, TASK_KIND, Origin, Task, TaskSpec
from mcp_control.tasks.operation_model import OPERATION_KIND
from mcp_control.tasks.peers import Hint, Peers
from mcp_control.tasks.service import Submitted, TaskOrchestrator
from mcp_control.tasks.settling import Settler
from mcp_control.tasks.speeds import Speeds
from mcp_control.tasks.spending import Spending
from mcp_control.tasks.statistics import STATISTIC_KIND
from mcp_control.tasks.steering import Steering
from mcp_control.tasks.wire import Ack, Assignment, Cancel, Done, Hello, Report, Started, Tasks, Welcome
from mcp_control.testing.clock import FakeClock

ADMIN = Actor(id="user_admin", kind="user", display="admin", roles=("administrator",))
KINDS = (
    *LIMIT_KINDS,
    BUDGET_KIND,
    TASK_KIND,
    LOG_KIND,
    OPERATION_KIND,
    GROUP_KIND,
    AGENT_KIND,
    INSTANCE_KIND,
    STATISTIC_KIND,
    APPROVAL_KIND,
)


class World:
    """Everything of the task component, wired as the product wires it.

    Args:
        server: id of the server among those that share store, queue and bus; empty for a single one.
    """

    def __init__(
        self, store: Store, clock: Clock, *, server: str = "", queue: Queue | None = None, bus: Bus | None = None
    ) -> None:
        self.store = store
        self.clock = clock
        self.facts: list[StoredFact] = []
        self.ids = IdSource(clock)
        self.queue = queue or LocalQueue()
        self.peers = Peers(bus, server)
        self.sessions = Sessions()
        self.manager = AgentManager(store, clock, self.ids, self.sessions, server=server)
        self.ledger = Ledger(store, shared=bool(server))
        self.ledger.questions = settled
        self.speeds = Speeds(store, clock.monotonic)
        chooser = Chooser(fleet=self.manager.registry, speeds=self.speeds)
        self.dispatcher = Dispatcher(
            self.queue, self.sessions, self._hand_out, self.peers, self._look_up, chooser=chooser
        )
        self.history = TaskHistory(store, clock)
        self.settler = Settler(
            self.ledger,
            self.sessions,
            self.dispatcher,
            clock,
            self.ids,
            peers=self.peers,
            expected=self.history.expected,
        )
        self.spending = Spending(store, self.ledger, self.settler, clock)
        self.tasks = TaskOrchestrator(
            store,
            self.queue,
            clock,
            self.ids,
            self.manager,
            self.ledger,
            self.settler,
            self.dispatcher,
            self.history,
            self.spending,
        )
        self.limits = Limits(store, clock, self.ids, self.ledger, Rules(store))
        self.limits.attach(self.settler.handing, self.dispatcher)
        self.tasks.keyed = KeyedSubmission(store, clock, self.ledger, self.settler, self.dispatcher, self.limits)
        self.steering = Steering.of(
            store,
            clock,
            self.ids,
            self.manager,
            self.ledger,
            self.settler,
            self.dispatcher,
            self.tasks,
            self.spending,
            [],
        )
        self.control = self.steering.control
        self.agents = AgentSessions(
            store, clock, self.manager, self.ledger, self.settler, self.dispatcher, self.spending, peers=self.peers
        )
        self.agents.speeds = self.speeds
        self.timekeeper = Timekeeper(store, clock, self.settler)
        self.leases = LeaseKeeper(clock, self.manager, self.agents)
        self.reconciler = Reconciler(store, clock, self.ledger, self.settler, self.dispatcher)
        self.retention = Retention(store, clock, keep_ms=30 * 86_400_000)

    def advance(self, seconds: float) -> None:
        """Let so much time pass."""
        assert isinstance(self.clock, FakeClock)
        self.clock.advance(seconds)

    async def _hand_out(self, pairs: list[tuple[str, Session]]) -> None:
        await self.settler.handing.hand_out(pairs)

    async def _look_up(self, task_id: str) -> Task | None:
        return (await self.ledger.load([task_id], fresh=True))[0]

    def heard(self, facts: Sequence[StoredFact]) -> None:
        """Hear what was committed, as every server of a store does."""
        self.facts.extend(facts)
        self.manager.registry.heard(facts)
        self.tasks.heard(facts)
        self.steering.operations.heard(facts)
        self.steering.groups.heard(facts)

    async def hint(self, hint: Hint) -> None:
        """Hear what another server says in passing."""
        await self.dispatcher.heard(hint.lanes)
        await self.settler.tell_local(hint.cancel)
        await self.agents.taken_over(hint.opened)

    async def submit(self, task_type: str = "echo", **fields: object) -> Task:
        """Submit one task that must be accepted."""
        spec = msgspec.convert({"type": task_type, **fields}, TaskSpec)
        (result,) = await self.tasks.submit(ADMIN, [spec], Origin(principal=ADMIN.id))
        assert isinstance(result, Submitted), result
        return result.task

    async def task(self, task_id: str) -> Task:
        """Read a task as the store has it."""
        self.ledger.forget([task_id])
        return await self.tasks.one(ADMIN, task_id)

    async def until(self, done: Callable[[], Awaitable[bool]], seconds: float = 5.0) -> None:
        """Wait until a condition holds that what runs in the background brings about."""
        async with asyncio.timeout(seconds):
            while not await done():  # noqa: ASYNC110 - the condition is the store's content, which has no event to wait for
                await asyncio.sleep(0.001)

    async def agent(
        self,
        name: str = "worker",
        *types: str,
        slots: int = 1,
        lease_seconds: float = 30.0,
        resources: Resources | None = None,
        limits: dict[str, int] | None = None,
    ) -> "Peer":
        """Register an agent and connect an instance of it."""
        spec = AgentSpec(
            name=name,
            capabilities=[
                Capability(name=task_type, limit=(limits or {}).get(task_type)) for task_type in types or ("echo",)
            ],
            slots=slots,
            lease_seconds=lease_seconds,
            resources=resources or Resources(),
        )
        registered = await self.manager.register(ADMIN, spec)
        actor = Actor(id=registered.agent.id, kind="agent", roles=("agent",))
        peer = Peer(self, actor, spec)
        await peer.connect()
        return peer


class Peer:
    """An agent instance whose frames arrive in a list."""

    def __init__(self, world: World, actor: Actor, spec: AgentSpec) -> None:
        self.world = world
        self.actor = actor
        self.spec = spec
        self.given: dict[str, Assignment] = {}
        self.cancelled: list[str] = []
        self.instance_id: str | None = None
        self.session: Session | None = None
        self._arrived = asyncio.Event()
        self._reports = 0

    def _receive(self, frames: Sequence[object]) -> None:
        for frame in frames:
            match frame:
                case Welcome():
                    self.instance_id = frame.instance_id
                case Tasks():
                    self.given.update({task.task_id: task for task in frame.tasks})
                case Cancel():
                    self.cancelled += frame.task_ids
                case _:
                    raise AssertionError(frame)
        self._arrived.set()

    @property
    def live(self) -> Session:
        """The session, which must be there."""
        assert self.session is not None
        return self.session

    async def connect(self, *running: str) -> None:
        """Connect, or reconnect as the same instance."""
        hello = Hello(agent=self.spec, instance_id=self.instance_id, beat=Beat(running=list(running)))
        self.session = await self.world.agents.connect(self.actor, hello, self._receive)

    async def until_given(self, count: int = 1) -> list[Assignment]:
        """Wait until so many tasks have arrived in all."""
        async with asyncio.timeout(5):
            while len(self.given) < count:
                self._arrived.clear()
                await self._arrived.wait()
        return list(self.given.values())

    async def report(self, **fields: object) -> Ack:
        """Send a report."""
        self._reports += 1
        return await self.world.agents.report(self.live, Report(id=self._reports, **fields))  # type: ignore[arg-type]

    async def start(self, assignment: Assignment) -> Ack:
        """Say that work has begun."""
        return await self.report(started=[Started(task_id=assignment.task_id, lease_token=assignment.lease_token)])

    async def done(self, assignment: Assignment, outcome: str = "completed", **fields: object) -> Ack:
        """Say how work ended."""
        done = Done(task_id=assignment.task_id, lease_token=assignment.lease_token, outcome=outcome, **fields)  # type: ignore[arg-type]
        return await self.report(done=[done])


@asynccontextmanager
async def world_at(folder: Path, clock: Clock | None = None, store: Store | None = None) -> AsyncIterator[World]:
    """Open a world on a data folder."""

    def fatal(problem: Problem) -> None:
        raise problem

    inner = store or SqliteStore(folder, fatal=fatal)
    world = World(inner, clock or FakeClock())
    await inner.open(KINDS, world.facts.extend)
    await world.manager.registry.start()
    await world.reconciler.rebuild()
    running = asyncio.create_task(world.dispatcher.run())
    letting = asyncio.create_task(world.limits.run())
    try:
        yield world
    finally:
        running.cancel()
        letting.cancel()
        await world.settler.handing.background.close()
        await inner.close()


@asynccontextmanager
async def two_servers_at(folder: Path, clock: Clock | None = None) -> AsyncIterator[tuple[World, World]]:
    """Open two servers in this process that share a store, a queue and a bus."""

    def fatal(problem: Problem) -> None:
        raise problem

    store, queue, bus = SqliteStore(folder, fatal=fatal), LocalQueue(), LocalBus()
    given = clock or FakeClock()
    one, two = (World(store, given, server=name, queue=queue, bus=bus) for name in ("server-1", "server-2"))

    def committed(facts: Sequence[StoredFact]) -> None:
        one.heard(facts)
        two.heard(facts)

    await store.open(KINDS, committed)
    running: list[asyncio.Task[None]] = []
    for world in (one, two):
        await world.manager.registry.start()
        running.append(asyncio.create_task(world.limits.run()))
        running += [asyncio.create_task(world.dispatcher.run()), asyncio.create_task(world.peers.run(world.hint))]
    try:
        yield one, two
    finally:
        for each in running:
            each.cancel()
        for world in (one, two):
            await world.settler.handing.background.close()
        await bus.close()
        await store.close()
