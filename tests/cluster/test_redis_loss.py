"""Redis is killed, emptied, frozen or full under load (fault matrix, rows 18 and 19): it costs time, and never a task."""

import asyncio
import statistics
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import httpx2
import pytest

from mcp_control.storage.claims import StoreQueue
from mcp_control.storage.ports import Queued
from mcp_control.testing.databases import MongoSet, RedisServer
from mcp_control.testing.server import on_databases, running_server
from tests.cluster.harness import Cluster, Follower, Submits, read_tasks, running_cluster
from tests.cluster.history import History, check
from tests.integration.support import (
    API,
    admin,
    agents_online,
    all_final,
    enrolment,
    in_state,
    journal,
    say,
    settled,
    started_agents,
    submit,
    task,
    until,
    violations,
)

RATE = 20.0
CLAIM_SECONDS = 1.0  # what losing Redis may cost a claim
BUSY = 1.0  # what a machine that runs other tests at the same time may cost


class Load:
    """Submits at a rate to one server, agents of the other, so that work goes through Redis; and a reader of the event stream."""

    def __init__(self, folder: Path, cluster: Cluster, client: httpx2.AsyncClient) -> None:
        self._folder = folder
        self.history = History()
        self._written = folder / "journal"
        body = {"type": "it.hold", "payload": {"until": "/", "journal": str(self._written)}}
        self.submits = Submits(self.history, RATE, lambda: body)
        self._cluster = cluster
        self._client = client
        self._ends = asyncio.Event()

    async def start(self) -> None:
        """Begin, and return when the load goes on."""
        url = self._cluster.servers[1].url
        self._cluster.agents += started_agents(
            self._folder, url, await enrolment(self._client), ["one", "two"], slots=20, lease=10
        )
        await agents_online(self._client, ["one", "two"], 30)
        self._follower = await Follower(self.history).start(self._client)
        self._running = asyncio.create_task(self.submits.run(self._client, self._ends))
        await self.more(2.0)

    async def more(self, seconds: float) -> None:
        """Return after so many seconds' worth of further submits were acknowledged."""
        wanted = len(self.history.acknowledged) + seconds * RATE
        await until(lambda: self._running.done() or len(self.history.acknowledged) >= wanted, 30, "the load goes on")
        assert not self._running.done(), self._running.result()

    async def end(self) -> None:
        """Finish all of it and check what the clients saw."""
        self._ends.set()
        await self._running
        await all_final(self._client, 40)
        await self._follower.caught_up(self._client)
        await self._follower.stop()
        await read_tasks(self._client, self.history)
        self.history.journal(journal(self._written))
        check(self.history)

    async def claims(self, after: float, before: float) -> list[float]:
        """Return the seconds from submit to hand-out of the tasks that were submitted in this time (wall seconds)."""
        found: list[float] = []
        for reads in self.history.reads.values():
            one = reads[-1]
            made, given = one["created_at"], one["attempts"][0]["assigned_at"]
            if after <= _seconds(made) < before:
                found.append(_seconds(given) - _seconds(made))
        return sorted(found)


def _seconds(moment: str | int) -> float:
    """Times are RFC 3339 text, those of attempts milliseconds since the epoch."""
    return moment / 1000 if isinstance(moment, int) else datetime.fromisoformat(moment).timestamp()


async def test_a_redis_that_is_killed_and_comes_back_empty_costs_time_only(
    mongo_uri: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Row 18: I1 to I9 hold, no request fails, and the slowest claim is at most a second slower."""
    async with (
        running_cluster(tmp_path, mongo_uri, redis_server.url, count=2, overload__loop_lag_seconds=10) as cluster,
        cluster.direct(0) as client,
    ):
        await settled(client)
        load = Load(tmp_path, cluster, client)
        await load.start()
        began = time.time()
        await asyncio.to_thread(redis_server.kill)
        await load.more(3.0)
        await asyncio.to_thread(redis_server.start)
        await load.more(3.0)
        ended = time.time()
        await load.end()
        waits = await load.claims(began, ended)
        usual = await load.claims(began - 1.5, began)
        slowest, before = waits[int(len(waits) * 0.99)], usual[int(len(usual) * 0.99)]
        say(
            f"claims without Redis: median {statistics.median(waits) * 1000:.0f} ms, p99 {slowest * 1000:.0f} ms "
            f"(before: {before * 1000:.0f} ms), refused {load.submits.refused}"
        )
        assert load.submits.refused == {}
        assert slowest <= before + CLAIM_SECONDS + BUSY
        for place in range(2):
            async with cluster.direct(place) as direct:
                await settled(direct)
                assert await violations(direct) == {}


def _pause(redis: RedisServer) -> Callable[[], None]:
    redis.command("CLIENT", "PAUSE", 10_000, "ALL")
    return redis.restart


def _freeze(redis: RedisServer) -> Callable[[], None]:
    redis.pause()
    return redis.resume


def _fill(redis: RedisServer) -> Callable[[], None]:
    redis.config("maxmemory-policy", "noeviction")
    redis.config("maxmemory", "1mb")

    def heal() -> None:
        redis.config("maxmemory", "0")

    return heal


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(_pause, id="paused"),
        pytest.param(_freeze, id="frozen", marks=[pytest.mark.long]),
        pytest.param(_fill, id="full"),
    ],
)
async def test_a_redis_that_hangs_or_is_full_is_left_alone(
    harm: Callable[[RedisServer], Callable[[], None]], mongo_uri: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Row 19: after three slow calls nobody waits for it; no request fails, and all is as before when it is healthy again."""
    async with (
        running_cluster(tmp_path, mongo_uri, redis_server.url, count=2, overload__loop_lag_seconds=10) as cluster,
        cluster.direct(0) as client,
    ):
        await settled(client)
        load = Load(tmp_path, cluster, client)
        await load.start()
        began = time.time()
        heal = await asyncio.to_thread(harm, redis_server)
        try:
            for place in range(2):
                async with cluster.direct(place) as direct:
                    await until(lambda there=direct: _takes_from(there, "store"), 5, "the server goes on without Redis")
            await load.more(3.0)
        finally:
            await asyncio.to_thread(heal)
        ended = time.time()
        for place in range(2):
            async with cluster.direct(place) as direct:
                await until(lambda there=direct: _takes_from(there, "redis"), 20, "the server uses Redis again")
        await load.end()
        waits = await load.claims(began, ended)
        slowest = waits[int(len(waits) * 0.99)]
        say(f"{harm.__name__}: claims p99 {slowest * 1000:.0f} ms, refused {load.submits.refused}")
        assert load.submits.refused == {}
        assert slowest <= CLAIM_SECONDS + 2 * BUSY


async def _takes_from(client: httpx2.AsyncClient, queue: str) -> bool:
    found = (await client.get(f"{API}/status")).json()["cluster"]["queue"]
    assert found in ("redis", "store")
    return bool(found == queue)


async def _nothing(self: StoreQueue, lane: str, limit: int, floor: int = 0) -> list[Queued]:
    return []


@pytest.mark.parametrize("control", [False, True], ids=["product", "control"])
async def test_what_waited_in_a_redis_that_is_gone_is_found_in_the_store(
    control: bool, mongo_set: MongoSet, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks that wait are handed out with Redis gone for good; a server that asked Redis alone would forget them (control)."""
    if control:
        monkeypatch.setattr(StoreQueue, "take", _nothing)
    with on_databases(mongo_set.uri("DATABASE"), redis_server.url):
        async with running_server(tmp_path / "server") as server, admin(server) as client:
            await settled(client)
            ids = [await submit(client, "it.echo", number) for number in range(10)]
            await asyncio.to_thread(redis_server.kill)
            [agent] = started_agents(tmp_path, server.url, await enrolment(client), ["one"])
            try:
                if not control:
                    for task_id in ids:
                        await in_state(client, task_id, "completed")
                    return
                seen = time.monotonic()
                await until(lambda: time.monotonic() > seen + 3, 4, "time enough for any look at the store")
                assert {(await task(client, task_id))["state"] for task_id in ids} == {"queued"}
            finally:
                agent.kill()
