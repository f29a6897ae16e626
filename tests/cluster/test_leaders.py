"""Two leaders at once, and facts that nobody put in order yet (fault matrix, rows 20 and 21)."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pymongo
import pytest

from mcp_control.coordination.leadership import Leadership
from mcp_control.kernel.changes import Change
from mcp_control.kernel.errors import Conflict, Problem
from mcp_control.storage.mongo import writer
from mcp_control.storage.mongo.store import MongoStore
from mcp_control.testing.databases import MongoSet, RedisServer
from mcp_control.testing.server import on_databases, running_server
from tests.cluster.harness import Cluster, running_cluster
from tests.cluster.peer import Peer, Socket
from tests.cluster.unguarded import unguarded
from tests.integration.support import API, admin, in_state, say, submit, task, tasks_by_state, until, violations

LEADER_SECONDS = 1.0


async def _events(client: httpx2.AsyncClient, *types: str) -> list[tuple[str, str]]:
    """Return type and subject of all events there are, in their order; fails where the order has gaps."""
    found: list[tuple[str, str]] = []
    numbers: list[int] = []
    after: dict[str, str] = {}
    while True:
        page = (await client.get(f"{API}/events", params={"limit": 500, **after})).json()
        if not page["items"]:
            break
        found += [(event["type"], event["subject"]) for event in page["items"]]
        numbers += [int(event["id"].removeprefix("evt_")) for event in page["items"]]
        after = {"after": page["next"]}
    assert numbers == [*range(1, len(numbers) + 1)], "a gap in the events"
    return [one for one in found if not types or one[0] in types]


async def _leader(client: httpx2.AsyncClient) -> str | None:
    answer = await client.get(f"{API}/status")
    if answer.status_code != 200:  # one that just woke up has not yet looked at its store
        return None
    servers = answer.json()["cluster"]["servers"]
    return next((server["name"] for server in servers if server["leader"]), None)


async def _delayed(client: httpx2.AsyncClient, count: int, seconds: float) -> list[str]:
    due = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
    specs = [{"type": "it.nobody", "payload": number, "run_at": due} for number in range(count)]

    async def taken() -> httpx2.Response | None:
        answer = await client.post(f"{API}/tasks/batch", json={"tasks": specs})
        assert answer.status_code in (200, 503), answer.text
        return answer if answer.status_code == 200 else None

    answer = await until(taken, 10, "a server that woke up takes work again")
    assert answer is not None
    ids = [item["id"] for item in answer.json()["items"]]
    assert len(ids) == count, answer.text
    return ids


@pytest.mark.parametrize("guarded", [True, pytest.param(False, id="control-no-version", marks=[pytest.mark.long])])
async def test_two_leaders_make_conflicts_and_never_duplicates(
    guarded: bool, mongo_set: MongoSet, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 20: both servers believe that they lead and do everything a leader does: each task is queued once, each lease lost once.

    With no version in the filters, as the control, they do it twice.
    """
    conflicts: list[Conflict] = []
    commit = MongoStore.commit

    async def counting(self: MongoStore, changes: Sequence[Change]) -> list[Problem | None]:
        outcomes = await commit(self, changes)
        conflicts.extend(outcome for outcome in outcomes if isinstance(outcome, Conflict))
        return outcomes

    monkeypatch.setattr(MongoStore, "commit", counting)
    monkeypatch.setattr(Leadership, "leading", property(lambda self: True))
    if not guarded:
        monkeypatch.setattr(writer, "steps", unguarded)
    peers: list[Socket] = []
    with on_databases(mongo_set.uri("DATABASE"), redis_server.url):
        async with (
            running_server(tmp_path / "server", node="one") as one,
            running_server(tmp_path / "server", node="two") as two,
            admin(one) as client,
            admin(two) as other,
        ):
            held: list[str] = []
            for number in range(5):
                peer = await Peer.registered(client, f"peer{number}", f"it.peer{number}", lease=2)
                socket = await Socket.opened(peer, (one, two)[number % 2].url)
                held.append(await submit(client, f"it.peer{number}"))
                await socket.started(await socket.task())
                peers.append(socket)
            delayed = await _delayed(client, 200, 2.0)
            for socket in peers:
                socket.connection.transport.abort()

            async def all_queued() -> bool:
                return await tasks_by_state(other) == {"queued": len(delayed) + len(held)}

            await until(all_queued, 40, "both leaders have queued what was due, and ended the leases")
            await asyncio.gather(*[in_state(other, task_id, "queued") for task_id in held])

            async def told() -> bool:
                facts = await _events(client, "task.queued")
                return len(facts) >= len(delayed) + len(held)

            await until(told, 10, "all of it is told")
            if not guarded:

                async def twice() -> bool:
                    return max(Counter(await _events(client, "task.queued")).values()) > 1

                await until(twice, 10, "something was queued twice")
                return
            counts = Counter(await _events(client))
            assert {counts["task.queued", task_id] for task_id in delayed} == {1}
            for task_id in held:
                outcomes = [attempt["outcome"] for attempt in (await task(client, task_id))["attempts"]]
                assert outcomes == ["lost"], outcomes
                assert [counts[kind, task_id] for kind in ("task.assigned", "task.completed")] == [1, 0]
            assert [conflict for conflict in conflicts if conflict.data.get("kind") == "task"], (
                "only one of them did anything"
            )
            say(f"{len(conflicts)} conflicts")
            assert await violations(client) == {}
            assert await violations(other) == {}


async def test_a_leader_that_was_frozen_wakes_up_and_follows(
    mongo_uri: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Row 20: another server leads within the term; the one that wakes in the middle of its work does nothing twice."""
    async with (
        running_cluster(
            tmp_path, mongo_uri, redis_server.url, count=2, cluster__leader_seconds=LEADER_SECONDS
        ) as cluster,
        cluster.direct(0) as first,
        cluster.direct(1) as second,
    ):
        assert await _leader(first) == "server-0"
        delayed = await _delayed(second, 300, 1.0)
        os.kill(cluster.servers[0].pid, signal.SIGSTOP)
        frozen = time.monotonic()
        try:

            async def led() -> bool:
                return await _leader(second) == "server-1"

            await until(led, 15, "the other server leads")
            say(f"another server led after {time.monotonic() - frozen:.1f} s")
            later = await _delayed(second, 100, 0.5)
            wanted = {"queued": len(delayed) + len(later)}

            async def queued() -> bool:
                return await tasks_by_state(second) == wanted

            await until(queued, 20, "what is due is queued")
        finally:
            os.kill(cluster.servers[0].pid, signal.SIGCONT)

        async def follows() -> bool:
            return await _leader(first) == "server-1"

        await until(follows, 15, "the one that woke up knows who leads")
        last = await _delayed(first, 100, 0.5)
        wanted = {"queued": len(delayed) + len(later) + len(last)}
        await until(queued, 20, "what is due is queued")

        async def told() -> bool:
            return len(await _events(first, "task.queued")) >= wanted["queued"]

        await until(told, 10, "all of it is told")
        counts = Counter(await _events(first, "task.queued"))
        assert set(counts.values()) == {1}
        assert len(counts) == wanted["queued"]
        assert await _events(first) == await _events(second)


async def test_what_was_committed_is_told_although_the_server_died_before_it_was_put_in_order(
    mongo_set: MongoSet, mongo_uri: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    """Row 21: killed between commit and sequencing, with nobody who leads: the event is told within 5 s of a restart, once."""
    database = mongo_uri.rpartition("/")[2].partition("?")[0]
    cluster = Cluster(tmp_path, mongo_uri, redis_server.url, count=2)
    try:
        await cluster.start()
        leader, follower = cluster.servers
        async with cluster.direct(1) as client:
            await submit(client, "it.nobody", "before")
            os.kill(leader.pid, signal.SIGSTOP)
            task_id = await submit(client, "it.nobody", "in doubt")
            await cluster.kill(1)
        os.kill(leader.pid, signal.SIGCONT)
        os.kill(leader.pid, signal.SIGKILL)
        await cluster.kill(0)
        with pymongo.MongoClient[dict[str, Any]](mongo_set.uri()) as direct:
            pending = direct[database]["store.pending"].count_documents({})
        assert pending >= 1, "the fault was not hit: the fact had its place already"
        await asyncio.to_thread(follower.start)
        began = time.monotonic()
        async with cluster.direct(1) as client:

            async def told() -> bool:
                return ("task.queued", task_id) in await _events(client)

            await until(told, 5, "the event is told")
            say(f"told {time.monotonic() - began:.2f} s after the restart")
            await asyncio.to_thread(leader.start)
            assert (await _events(client)).count(("task.queued", task_id)) == 1
            assert (await task(client, task_id))["state"] == "queued"
    finally:
        await cluster.close()
