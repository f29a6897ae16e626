"""What a server stands on: the data folder of a single one, or MongoDB and Redis for several. Part of the composition root."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final, Literal

import structlog

from mcp_control import __version__
from mcp_control.configuration.settings import Settings
from mcp_control.coordination.clock import StoreClock
from mcp_control.coordination.identity import identity_of
from mcp_control.coordination.leadership import Leadership
from mcp_control.coordination.model import Node
from mcp_control.coordination.nodes import Nodes
from mcp_control.kernel.breaker import Breaker
from mcp_control.kernel.breaker_rules import BreakerStatus
from mcp_control.kernel.changes import Kind
from mcp_control.kernel.clock import Clock, SystemClock
from mcp_control.kernel.errors import Problem
from mcp_control.kernel.ids import IdSource
from mcp_control.kernel.loops import every
from mcp_control.storage.local.blobs import FolderBlobs
from mcp_control.storage.local.bus import LocalBus
from mcp_control.storage.local.cache import LocalCache
from mcp_control.storage.local.queue import LocalQueue
from mcp_control.storage.ports import Blobs, Bus, Cache, Committed, Queue, Store
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.tasks.ranking import ranks

if TYPE_CHECKING:
    from mcp_control.storage.mongo.store import MongoStore
    from mcp_control.storage.redis.resilient import ResilientQueue

_log = structlog.get_logger(__name__)
_ANNOUNCED: Final = 1000
_NEAR_MS: Final = 1000  # tasks so close in rank may be taken in any order where the store itself is the queue
Around = Callable[[Store], Store]
Fatal = Callable[[Problem], None]


class Backend:
    """The adapters of one server, and what it shares with others.

    Attributes:
        server: id of this server among those that share the store; empty for a single one.
        waiting: returns how many changes wait for a commit.
        writable: says whether the store takes writes, as far as this server knows.
        bus: None for a single server, which has nobody to talk to.
        leadership, nodes, resilient: None for a single server; `resilient` also without Redis.
        breakers: those around what this server calls.
    """

    def __init__(
        self, store: Store, queue: Queue, bus: Bus | None, cache: Cache, blobs: Blobs | None, clock: Clock
    ) -> None:
        self.kind: Literal["sqlite", "mongodb"] = "sqlite"
        self.store = store
        self.queue = queue
        self.bus = bus
        self.cache = cache
        self._blobs = blobs
        self.clock = clock
        self.server = ""
        self.waiting: Callable[[], int] = lambda: 0
        self.writable: Callable[[], bool] = lambda: True
        self.elections: Callable[[], int] = lambda: 0
        self.leadership: Leadership | None = None
        self.nodes: Nodes | None = None
        self.resilient: ResilientQueue | None = None
        self.breakers: list[Breaker] = []
        self._open: Callable[[Sequence[Kind], Committed], Awaitable[None]] = store.open

    @property
    def shared(self) -> bool:
        """Whether other servers use the same store."""
        return self.nodes is not None

    @property
    def blobs(self) -> Blobs:
        """Where artifacts are; those of a shared store once it is open."""
        if self._blobs is None:
            raise RuntimeError("the store is not open")
        return self._blobs

    def statuses(self) -> list[BreakerStatus]:
        """Say how the breakers stand around what this server calls."""
        return [one.status() for one in self.breakers]

    def queue_state(self) -> str:
        """Say where waiting tasks are taken from: `memory`, `redis` or `store`."""
        if self.resilient is not None:
            return self.resilient.state
        return "store" if self.shared else "memory"

    @property
    def leading(self) -> bool:
        """Whether this server does what only one should do; a single one always does."""
        return self.leadership is None or self.leadership.leading

    async def open(self, kinds: Sequence[Kind], committed: Committed) -> None:
        """Open the store and, where it is shared, join the others. See `Store.open`."""
        await self._open(kinds, committed)


@asynccontextmanager
async def backend(settings: Settings, name: str, fatal: Fatal, around: Around | None) -> AsyncIterator[Backend]:
    """Make the adapters that the settings ask for; close them at the end.

    Args:
        name: of this server, for people.
        fatal: called when the store must not be used any more.
        around: puts something around the store.

    Raises:
        StoreUnavailable: the data folder or the database cannot be used.
    """
    async with AsyncExitStack() as stack:
        if settings.mongo.uri is None:
            yield _embedded(settings, fatal, around, stack)
        else:
            yield _clustered(settings, name, fatal, around, stack)


def _embedded(settings: Settings, fatal: Fatal, around: Around | None, stack: AsyncExitStack) -> Backend:
    disk = SqliteStore(settings.data, fatal=fatal, max_waiting=settings.queues.store_changes)
    store: Store = disk if around is None else around(disk)
    stack.push_async_callback(store.close)
    clock = SystemClock()
    made = Backend(store, LocalQueue(), None, LocalCache(clock), FolderBlobs(settings.data), clock)
    made.waiting = lambda: disk.waiting
    made.writable = lambda: disk.writable
    return made


def _clustered(settings: Settings, name: str, fatal: Fatal, around: Around | None, stack: AsyncExitStack) -> Backend:
    # A single server needs neither driver, and starts faster without them.
    from mcp_control.storage.claims import StoreQueue
    from mcp_control.storage.mongo.blobs import GridFsBlobs
    from mcp_control.storage.mongo.store import MongoStore
    from mcp_control.storage.redis.bus import RedisBus
    from mcp_control.storage.redis.cache import RedisCache
    from mcp_control.storage.redis.connection import connect
    from mcp_control.storage.redis.link import RedisLink, breaker
    from mcp_control.storage.redis.queue import RedisQueue
    from mcp_control.storage.redis.resilient import ResilientQueue

    assert settings.mongo.uri is not None
    system = SystemClock()
    ids = IdSource(system)
    server = ids.new("node")
    mongo = MongoStore(
        settings.mongo.uri.get_secret_value(),
        node=server,
        max_waiting=settings.queues.store_changes,
        fatal=fatal,
        single=settings.mongo.allow_single_member,
    )
    store: Store = mongo if around is None else around(mongo)
    stack.push_async_callback(store.close)
    clock = StoreClock(system, mongo.offset_ms)
    claims = StoreQueue(store, clock, near=ranks(_NEAR_MS), random=random.Random())  # noqa: S311  spreads servers, protects nothing
    local_bus, local_cache = LocalBus(), LocalCache(clock)
    made = Backend(store, claims, local_bus, local_cache, None, clock)
    seconds = settings.cluster.leader_seconds
    me = Node(
        id=server,
        name=name,
        url=settings.cluster.advertise,
        port=settings.port,
        software=__version__,
        started_at=system.now(),
        until=0,
    )
    made.kind = "mongodb"
    made.server = server
    made.waiting = lambda: mongo.waiting
    made.writable = lambda: mongo.writable
    made.elections = lambda: mongo.elections
    nodes = made.nodes = Nodes(store, clock, me, seconds, mongo.session_ids, mongo.end_sessions, made.statuses)
    leadership = made.leadership = Leadership(store, clock, server, seconds)

    async def lead(_: int) -> None:
        mongo.lead = await leadership.once()

    async def bury(_: int) -> None:
        # Every server does so: a leader that was killed may hold up the order of the facts until its transaction is ended.
        if await nodes.bury() and made.resilient is not None:
            # A server that died between a commit and its push left Redis without the entry.
            made.resilient.doubt()

    async def join(kinds: Sequence[Kind], committed: Committed) -> None:
        await store.open(kinds, committed)
        made._blobs = GridFsBlobs(mongo.database)
        bus: Bus = local_bus
        if settings.redis.url is not None:
            # Two clusters may use one Redis: what one says must mean nothing to the other.
            namespace = f"{settings.redis.namespace}:{await identity_of(store, ids)}"
            client = connect(settings.redis.url.get_secret_value())
            made.breakers.append(breaker(clock))
            link = RedisLink(client, namespace, made.breakers[-1], seconds=settings.redis.timeout_seconds)
            stack.push_async_callback(link.close)
            made.resilient = ResilientQueue(RedisQueue(client, namespace), claims, link, clock)
            stack.push_async_callback(made.resilient.close)
            made.queue = made.resilient
            bus = made.bus = RedisBus(link, namespace, local_bus)
            made.cache = RedisCache(link, namespace, local_cache)
        stack.push_async_callback(bus.close)
        announcer = Announcer(bus)
        stack.push_async_callback(announcer.close)
        mongo.announce = announcer.put
        await clock.once()
        earlier = await nodes.succeed()
        leadership.heir_of = frozenset(earlier)
        if earlier and made.resilient is not None:
            made.resilient.doubt()
        await nodes.once()
        await lead(0)
        for topic in ("pending", "facts"):
            listening = asyncio.create_task(_listen(bus, topic, mongo))
            stack.push_async_callback(_cancelled, listening)
        # In the opposite order of this, a server that ends gives up what it has.
        stack.push_async_callback(nodes.leave)
        stack.push_async_callback(leadership.release)
        for loop, pace, once in (
            ("cluster-clock", 5.0, lambda _: clock.once()),
            ("cluster-node", seconds / 4, lambda _: nodes.once()),
            ("cluster-leader", seconds / 4, lead),
            ("cluster-gone", seconds / 5, bury),
        ):
            stack.push_async_callback(every(pace, once, name=loop, clock=clock).stop)

    made._open = join
    return made


class Announcer:
    """Puts the store's announcements on the bus, in order; what does not keep up is dropped, since the store has it all."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._waiting: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(_ANNOUNCED)
        self._task = asyncio.create_task(self._run())
        self._pending = False

    def put(self, topic: str, message: bytes) -> None:
        """Send a message soon."""
        if self._waiting.full() or (topic == "pending" and self._pending):
            return
        self._pending = self._pending or topic == "pending"
        self._waiting.put_nowait((topic, message))

    async def _run(self) -> None:
        while True:
            topic, message = await self._waiting.get()
            if topic == "pending":
                self._pending = False
            await self._bus.publish(topic, message)

    async def close(self) -> None:
        """Stop sending."""
        await _cancelled(self._task)


async def _listen(bus: Bus, topic: str, mongo: "MongoStore") -> None:
    async for message in bus.subscribe(topic):
        mongo.hear(topic, message)


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])
