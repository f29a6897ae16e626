"""Losing Redis costs time only: killed, emptied, hanging or full, servers go on from the store and come back by themselves."""

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mcp_control.kernel.changes import Change, Entity, Key, Query
from mcp_control.kernel.clock import SystemClock
from mcp_control.kernel.errors import StoreUnavailable
from mcp_control.storage.claims import StoreQueue
from mcp_control.storage.local.bus import LocalBus
from mcp_control.storage.local.cache import LocalCache
from mcp_control.storage.ports import Queued, waiting_value
from mcp_control.storage.redis.bus import RedisBus
from mcp_control.storage.redis.cache import RedisCache
from mcp_control.storage.redis.link import RedisLink
from mcp_control.storage.redis.queue import RedisQueue
from mcp_control.storage.redis.resilient import ResilientQueue
from mcp_control.storage.sqlite.store import SqliteStore
from mcp_control.tasks.model import TASK_KIND
from mcp_control.testing.databases import RedisSentinel, RedisServer
from tests.storage.redis_clients import linked, until

LIMIT = 0.05
LANE = "tenant/type"


class Server:
    """What one server has of the queue, over a store that it may share with others."""

    def __init__(self, store: SqliteStore, link: RedisLink) -> None:
        clock = SystemClock()
        self.store = store
        self.link = link
        self.redis = RedisQueue(link.client, "test")
        self.queue = ResilientQueue(self.redis, StoreQueue(store, clock), link, clock)

    async def submit(self, first: int, last: int) -> None:
        """Have tasks wait: in the store first, then in the queue."""
        names = [f"t{number:05d}" for number in range(first, last)]
        index = {"waiting": waiting_value(LANE, 50), "tenant": "tenant", "state": "queued"}
        changes = [Change([Entity("task", name, 0, index, b"{}")]) for name in names]
        assert await self.store.commit(changes) == [None] * len(names)
        await self.queue.push([Queued(LANE, name, number) for number, name in enumerate(names, first)])

    async def work(self, limit: int) -> list[str]:
        """Take some and claim them in the store, which says which of them still waited."""
        entries = await self.queue.take(LANE, limit)
        outcomes = await self.store.commit([Change(deletes=[Key("task", entry.id, 1)]) for entry in entries])
        return [entry.id for entry, outcome in zip(entries, outcomes, strict=True) if outcome is None]

    async def work_off(self) -> list[str]:
        """Work until the store says that nothing waits."""
        done: list[str] = []

        async def finished() -> bool:
            done.extend(await self.work(20))
            return await self.store.count("task", (), 1) == 0

        await until(finished, "all that waits is worked off")
        return done

    async def refill(self) -> bool:
        """The leader's duty: push all that waits when Redis lacks something; say whether it counts."""
        if not await self.queue.needs_refill():
            return False
        waiting = await self.store.find("task", Query(limit=5000))
        await self.queue.push([Queued(LANE, entity.id, int(entity.id[1:])) for entity in waiting])
        return await self.queue.refilled()

    async def on_redis(self) -> bool:
        """Whether Redis is whole again, having looked."""
        await self.refill()
        await self.queue.depths()
        return self.queue.state == "redis"

    async def close(self) -> None:
        await self.queue.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "store", fatal=lambda problem: None)
    await store.open([TASK_KIND], lambda facts: None)
    yield store
    await store.close()


@pytest.fixture
async def server(store: SqliteStore, redis_server: RedisServer) -> AsyncIterator[Server]:
    server = Server(store, await linked(redis_server.url, "test", seconds=LIMIT))
    await until(server.on_redis, "an empty Redis is filled at the start")
    yield server
    redis_server.resume()
    await server.close()


def _hang(redis: RedisServer) -> Callable[[], object]:
    redis.command("CLIENT", "PAUSE", 10_000, "ALL")
    return redis.restart


def _freeze(redis: RedisServer) -> Callable[[], object]:
    redis.pause()
    return redis.resume


def _kill(redis: RedisServer) -> Callable[[], object]:
    redis.kill()
    return redis.start


def _fill(redis: RedisServer) -> Callable[[], object]:
    redis.config("maxmemory", "1mb")
    return lambda: redis.config("maxmemory", "0")


FAULTS = pytest.mark.parametrize("fault", [_hang, _freeze, _kill, _fill], ids=["pause", "sigstop", "kill", "full"])


@FAULTS
async def test_servers_go_on_from_the_store_and_come_back(
    server: Server, redis_server: RedisServer, fault: Callable[[RedisServer], Callable[[], object]]
) -> None:
    """No task is lost or done twice, nothing fails, at most three calls are slow, and Redis is used again when it is back."""
    await server.submit(0, 300)
    done = await server.work(20)
    assert (len(done), server.queue.state) == (20, "redis")
    heal = await asyncio.to_thread(fault, redis_server)

    slow = 0
    for turn in range(12):
        began = time.monotonic()
        done += await server.work(10)
        await server.submit(300 + turn, 301 + turn)
        taken = time.monotonic() - began
        slow += taken > LIMIT * 0.8
        assert taken < 1
    assert slow <= 3
    if fault is not _fill:  # a full Redis says so at once, and answers what changes nothing
        assert server.link.breaker.opened == 1
    assert server.queue.state == "store"
    assert len(done) > 100

    await asyncio.to_thread(heal)
    await until(server.on_redis, "Redis is used again")
    before = server.queue.taken_from_redis
    done += await server.work_off()
    assert server.queue.taken_from_redis > before
    assert sorted(done) == [f"t{number:05d}" for number in range(312)]


async def test_an_empty_redis_is_noticed_though_it_answers(server: Server, redis_server: RedisServer) -> None:
    """Started anew and empty between two calls, or flushed, it does not pass for a lane in which nothing waits."""
    await server.submit(0, 60)
    done: list[str] = []
    for lose in (redis_server.restart, lambda: redis_server.command("FLUSHALL")):
        await until(server.on_redis, "Redis is used")
        await asyncio.to_thread(lose)
        done += await until_some(server)
        assert server.queue.incomplete
    done += await server.work_off()
    assert sorted(done) == [f"t{number:05d}" for number in range(60)]


async def until_some(server: Server) -> list[str]:
    """Work until something was found, which must not take longer than a completeness may be trusted."""
    done: list[str] = []

    async def found() -> bool:
        done.extend(await server.work(10))
        return bool(done)

    await until(found, "what waits in the store is found", 2)
    return done


async def test_older_data_does_not_pass_for_complete(store: SqliteStore, tmp_path: Path) -> None:
    """A Redis that comes back with a snapshot from before still holds the mark, and yet counts as incomplete."""
    with RedisServer(tmp_path / "redis") as redis:
        server = Server(store, await linked(redis.url, "test"))
        await until(server.on_redis, "Redis is filled")
        await server.submit(0, 10)
        await asyncio.to_thread(redis.command, "SAVE")
        await server.submit(10, 20)
        assert await server.redis.complete()
        await asyncio.to_thread(redis.restart)
        assert redis.command("EXISTS", "{test:queue}:ranked") == 1
        assert not await server.redis.complete()
        assert sorted(await server.work_off()) == [f"t{number:05d}" for number in range(20)]
        await server.close()
        await server.link.close()


async def test_a_change_of_master_is_noticed(store: SqliteStore, tmp_path: Path) -> None:
    """After Sentinel made the replica master, which may lack the last writes, Redis counts as incomplete until it is filled."""
    with RedisSentinel(tmp_path / "sentinel") as redis:
        server = Server(store, await linked(redis.url, "test", seconds=LIMIT))
        await until(server.on_redis, "Redis is filled")
        await server.submit(0, 50)
        await asyncio.to_thread(redis.master().kill)
        done = await server.work(10)
        await until(server.on_redis, "the new master is filled and used", 30)
        assert server.queue.refills == 2
        done += await server.work_off()
        assert sorted(done) == [f"t{number:05d}" for number in range(50)]
        await server.close()
        await server.link.close()


async def test_a_refill_during_which_something_was_lost_does_not_count(
    server: Server, redis_server: RedisServer
) -> None:
    """Neither after another server's doubt, nor after a restart, nor when another refill was begun later."""
    other = Server(server.store, await linked(redis_server.url, "test"))
    await server.redis.mark_incomplete()
    assert await server.queue.needs_refill()
    await other.redis.mark_incomplete()
    assert not await server.queue.refilled()

    assert await server.queue.needs_refill()
    assert await other.queue.needs_refill()
    assert not await server.queue.refilled()
    assert await other.queue.refilled()

    await server.redis.mark_incomplete()
    assert await server.queue.needs_refill()
    await asyncio.to_thread(redis_server.restart)
    assert not await server.queue.refilled()
    assert await other.queue.needs_refill()


async def test_the_doubt_of_one_server_is_heard_by_all(server: Server, redis_server: RedisServer) -> None:
    """A push that one server lost makes the others take from the store until Redis is filled again."""
    other = Server(server.store, await linked(redis_server.url, "test"))
    await until(other.on_redis, "the other uses Redis")
    await server.submit(0, 5)
    await server.redis.remove(LANE, ["t00003"])  # as if its push had not arrived
    server.queue.doubt()
    assert sorted(await other.work_off()) == [f"t{number:05d}" for number in range(5)]
    await other.close()


async def test_trouble_with_the_store_is_told(server: Server, redis_server: RedisServer) -> None:
    """Without Redis and store a take raises StoreUnavailable; it does not look like an empty lane."""
    redis_server.kill()
    await server.store.close()
    with pytest.raises(StoreUnavailable):
        await server.queue.take(LANE, 1)


@FAULTS
async def test_the_bus_and_the_cache_never_fail_and_never_wait_long(
    redis_server: RedisServer, fault: Callable[[RedisServer], Callable[[], object]]
) -> None:
    """Own subscribers are reached, limits count on, values are absent; and other servers are heard again afterwards."""
    link = await linked(redis_server.url, "test", seconds=LIMIT)
    other_link = await linked(redis_server.url, "test", seconds=LIMIT)
    bus, other = RedisBus(link, "test", LocalBus()), RedisBus(other_link, "test", LocalBus())
    cache = RedisCache(link, "test", LocalCache(SystemClock()))
    reader, distant = bus.subscribe("topic"), other.subscribe("topic")
    await asyncio.wait_for(other.connected(), 10)
    await bus.publish("topic", b"first")
    assert await asyncio.wait_for(anext(distant), 10) == await anext(reader) == b"first"
    await cache.set("key", b"value", 60)
    assert await cache.get("key") == b"value"
    heal = await asyncio.to_thread(fault, redis_server)

    slow = 0
    for turn in range(4):
        for work in (bus.publish("topic", b"%d" % turn), cache.set("key", b"new", 60), cache.add("hits", 1, 60)):
            began = time.monotonic()
            answer = await work
            slow += time.monotonic() - began > LIMIT * 0.8
        assert answer == turn + 1
    assert slow <= 3
    assert [await anext(reader) for _ in range(4)] == [b"0", b"1", b"2", b"3"]
    if fault is not _fill:  # a full Redis says so at once, still passes messages on, and shows what it has
        assert link.breaker.opened == 1
        assert await cache.get("key") is None
        assert bus.dropped == 4

    await asyncio.to_thread(heal)

    async def heard() -> bool:
        await bus.publish("topic", b"again")
        await cache.set("key", b"back", 60)
        try:
            while await asyncio.wait_for(anext(distant), 0.1) != b"again":
                pass
        except TimeoutError:
            return False
        return await cache.get("key") == b"back"

    await until(heard, "bus and cache work again")
    await bus.close()
    await other.close()


async def test_subscribers_hear_others_again_after_every_restart(redis_server: RedisServer) -> None:
    """The connection is made again each time, and nobody has to subscribe again."""
    bus = RedisBus(await linked(redis_server.url, "test"), "test", LocalBus())
    reader = bus.subscribe("topic")
    for turn in range(3):
        await asyncio.wait_for(bus.connected(), 10)
        assert redis_server.command("PUBLISH", "test:bus:topic", b"another!" + b"%d" % turn) == 1
        assert await asyncio.wait_for(anext(reader), 10) == b"%d" % turn
        connects = bus.connects
        await asyncio.to_thread(redis_server.restart)

        async def connected(before: int = connects) -> bool:
            return bus.connects > before

        await until(connected, "the bus has connected again")
    await bus.close()


def _taken_by_processes(redis: RedisServer, way: str) -> Counter[str]:
    command = [sys.executable, "-m", "tests.storage.taking", redis.url, "test", LANE, way]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for each in processes:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    taken = Counter[str]()
    for each in processes:
        taken.update(each.communicate(timeout=60)[0].split())
        assert each.returncode == 0
    return taken


async def test_servers_that_take_at_once_never_get_the_same(redis_server: RedisServer) -> None:
    """Three processes with four takers each share out 3,000 entries; taking in two steps, as a control, hands many out twice."""
    queue = RedisQueue((await linked(redis_server.url, "test")).client, "test")
    entries = [Queued(LANE, f"t{number}", number) for number in range(3000)]
    await queue.push(entries)
    taken = await asyncio.to_thread(_taken_by_processes, redis_server, "together")
    assert taken == Counter(entry.id for entry in entries)
    await queue.push(entries)
    taken = await asyncio.to_thread(_taken_by_processes, redis_server, "naive")
    assert max(taken.values()) > 1
