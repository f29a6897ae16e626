"""Two servers on one store: whatever is said to one holds at the other, with Redis at once and without it a moment later."""

import asyncio
import hashlib
import random
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
import pytest_asyncio

from mcp_control.testing.databases import MongoSet, RedisServer
from tests.cluster.harness import Cluster, running_cluster
from tests.cluster.peer import Peer, Socket
from tests.integration.pipelines import completed, parts_pipeline, started
from tests.integration.support import (
    API,
    AgentProcess,
    agents_online,
    enrolment,
    in_state,
    say,
    settled,
    submit,
    task,
    until,
)

# What is promised of a machine with nothing else to do, and what is given to one that runs other tests at the same time.
WITH_REDIS, WITHOUT_REDIS, BUSY = 0.1, 1.0, 3

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Pair:
    """Two servers, a client of each, and agents by hand."""

    def __init__(self, cluster: Cluster, a: httpx2.AsyncClient, b: httpx2.AsyncClient) -> None:
        self.cluster = cluster
        self.a = a
        self.b = b
        self.url_a, self.url_b = (server.url for server in cluster.servers)
        self._peers = 0

    async def peer(self, slots: int = 1) -> tuple[Peer, str]:
        """Enrol an agent for a task type of its own; returns it and the type."""
        self._peers += 1
        name = f"peer{self._peers}"
        return await Peer.registered(self.a, name, f"it.{name}", slots), f"it.{name}"

    async def at_b(self, slots: int = 1) -> tuple[Socket, str]:
        """Return an agent connected to B, and the task type that it alone does."""
        peer, kind = await self.peer(slots)
        return await Socket.opened(peer, self.url_b), kind


@asynccontextmanager
async def _pair(folder: Path, mongo_uri: str, redis_url: str | None) -> AsyncIterator[Pair]:
    async with (
        running_cluster(folder, mongo_uri, redis_url, count=2) as cluster,
        cluster.direct(0, trust_env=False) as a,
        cluster.direct(1, trust_env=False) as b,
    ):
        await settled(a)
        await settled(b)
        yield Pair(cluster, a, b)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(
    mongo_set: MongoSet, shared_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pair]:
    mongo_set.heal()
    shared_redis.heal()
    async with _pair(tmp_path_factory.mktemp("pair"), mongo_set.uri("two_servers"), shared_redis.url) as made:
        yield made
    mongo_set.drop("two_servers")


async def _times_to_start(pair: Pair, count: int) -> list[float]:
    """Return the seconds from a submit's answer at A to the task's arrival at an agent of B."""
    socket, kind = await pair.at_b()
    found = []
    for _ in range(count):
        await submit(pair.a, kind)
        answered = time.monotonic()
        given = await socket.task()
        found.append(time.monotonic() - answered)
        await socket.done(given)
    await socket.close()
    return found


async def test_without_redis_work_for_an_agent_of_another_server_starts_within_a_second(
    mongo_uri: str, tmp_path: Path
) -> None:
    """Servers look at the lanes themselves."""
    async with _pair(tmp_path, mongo_uri, None) as pair:
        found = await _times_to_start(pair, 10)
        say(f"without Redis: median {statistics.median(found) * 1000:.0f} ms, longest {max(found) * 1000:.0f} ms")
        assert statistics.median(found) <= WITHOUT_REDIS
        assert max(found) <= WITHOUT_REDIS * BUSY


async def test_work_for_an_agent_of_another_server_starts_at_once(pair: Pair) -> None:
    """The server that takes a task tells the others of it."""
    found = await _times_to_start(pair, 20)
    say(f"with Redis: median {statistics.median(found) * 1000:.0f} ms, longest {max(found) * 1000:.0f} ms")
    assert statistics.median(found) <= WITH_REDIS * BUSY
    # Looking at the lanes alone would take half a look's pace and more.
    assert min(found) <= WITH_REDIS


async def test_a_caller_waits_at_any_server(pair: Pair) -> None:
    """Waiting at A ends when an agent of B is done."""
    socket, kind = await pair.at_b()
    task_id = await submit(pair.a, kind)
    given = await socket.task()
    waiting = asyncio.create_task(pair.a.get(f"{API}/tasks/{task_id}", params={"wait": 15}))
    await in_state(pair.b, task_id, "assigned")
    await socket.done(given, result=7)
    told = time.monotonic()
    found = (await waiting).json()
    assert (found["state"], found["result"]) == ("completed", 7)
    assert time.monotonic() - told <= WITH_REDIS * BUSY + 1
    await socket.close()


async def test_a_cancellation_reaches_the_agent_of_another_server(pair: Pair) -> None:
    """Cancelled at A, the agent at B hears of it at once and not with its next heartbeat; it ends cancelled, once."""
    socket, kind = await pair.at_b()
    task_id = await submit(pair.a, kind)
    given = await socket.task()
    await socket.started(given)
    assert (await pair.a.post(f"{API}/tasks/{task_id}/cancel", json={})).status_code == 200
    await socket.one(lambda frame: frame["op"] == "cancel" and task_id in frame["task_ids"], 3)
    assert "refused" not in await socket.done(given, "cancelled")
    assert (await task(pair.a, task_id))["state"] == "cancelled"
    await socket.close()


async def test_a_drain_reaches_the_agent_of_another_server(pair: Pair) -> None:
    """Drained at A, the agent at B gets no new work and is told so; resumed at A, it gets what waited."""
    socket, kind = await pair.at_b()
    name = f"{API}/agents/{socket.peer.spec['name']}"
    assert (await pair.a.post(f"{name}/drain", json={})).status_code == 200

    async def drained() -> bool:
        return bool((await socket.beat()).get("drain"))

    await until(drained, 5, "the agent is told")
    task_id = await submit(pair.a, kind)
    await until(_after(1.0), 2, "longer than any look at the lanes")
    assert (await task(pair.b, task_id))["state"] == "queued"
    assert not [frame for frame in socket.frames if frame["op"] == "tasks"]
    assert (await pair.a.post(f"{name}/resume", json={})).status_code == 200
    assert (await socket.task())["task_id"] == task_id
    await socket.close()


def _after(seconds: float) -> Any:
    ends = time.monotonic() + seconds
    return lambda: time.monotonic() >= ends


async def test_an_agent_takes_its_lease_and_its_work_to_another_server(pair: Pair) -> None:
    """Its connection to A breaks, it goes on at B under the same lease, and what it did counts as one attempt."""
    peer, kind = await pair.peer()
    before = await Socket.opened(peer, pair.url_a)
    task_id = await submit(pair.a, kind)
    given = await before.task()
    await before.started(given)
    before.connection.transport.abort()
    after = await Socket.opened(peer, pair.url_b)
    assert after.welcome["resumed"] == [task_id]
    assert after.welcome["instance_id"] == before.welcome["instance_id"]
    assert "gone" not in await after.beat()
    assert "refused" not in await after.done(given, result="kept")
    found = await task(pair.a, task_id)
    assert (found["state"], found["attempt"], found["result"]) == ("completed", 1, "kept")
    again = await submit(pair.a, kind)
    assert (await after.task())["task_id"] == again
    await after.close()


async def test_a_polling_agent_may_ask_another_server_each_time(pair: Pair) -> None:
    """Without sticky sessions: requests of an agent without socket go to either server, and all its work gets done once."""
    peer, kind = await pair.peer(slots=2)
    servers = [pair.a, pair.b]
    turns = random.Random(5)

    async def ask(method: str, path: str, body: object = None, **params: object) -> dict[str, Any]:
        client = servers[turns.randrange(2)]
        answer = await client.request(method, path, json=body, params=params, headers=peer.headers, timeout=20)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        found: dict[str, Any] = answer.json()
        return found

    welcome = await ask("POST", f"{API}/agents/session", peer.hello())
    peer.instance_id = welcome["instance_id"]
    session = f"{API}/agents/session/{peer.instance_id}"
    ids = [await submit(servers[number % 2], kind, number) for number in range(20)]
    seen: list[str] = []
    ends = time.monotonic() + 60
    while len(seen) < len(ids):
        assert time.monotonic() < ends, f"{len(seen)} of {len(ids)}"
        for given in (await ask("POST", f"{session}/claim", wait=2, limit=2))["tasks"]:
            if given["task_id"] in peer.running:
                continue
            peer.running.append(given["task_id"])
            report = peer.report(given, "completed", given["payload"])
            while (answer := await ask("POST", f"{session}/report", report)).get("retry"):
                pass
            assert not answer.get("refused"), answer
            peer.running.remove(given["task_id"])
            seen.append(given["task_id"])
        assert not (await ask("POST", f"{session}/heartbeat", {"beat": peer.beat()})).get("gone")
    assert sorted(seen) == sorted(ids)
    found = [await task(pair.a, task_id) for task_id in ids]
    assert [(one["state"], one["attempt"], one["result"]) for one in found] == [
        ("completed", 1, number) for number in range(len(ids))
    ]


async def test_a_cursor_of_one_server_is_good_at_the_other(pair: Pair) -> None:
    """Events are the same everywhere and in the same order: what happens at A is streamed at B, from where a reader of A left off."""
    first = [await submit(pair.a, "it.nobody") for _ in range(5)]
    start: str | None = None
    seen: list[tuple[str, str]] = []

    async def page(client: httpx2.AsyncClient) -> bool:
        nonlocal start
        params = {"type": "task.queued", "limit": 3} | ({} if start is None else {"after": start})
        found = (await client.get(f"{API}/events", params=params)).json()
        seen.extend((event["id"], event["subject"]) for event in found["items"])
        start = found["next"]
        return {subject for _, subject in seen} >= set(first)

    await until(lambda: page(pair.a), 5, "A tells of all of it")
    second = [await submit(pair.a, "it.nobody") for _ in range(5)]
    stream = pair.b.stream(
        "GET",
        f"{API}/events?type=task.queued",
        headers={"Accept": "text/event-stream", "Last-Event-ID": str(start)},
        timeout=10,
    )
    live: list[str] = []
    third: list[str] = []
    async with stream as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                live.append(msgspec.json.decode(line[6:])["subject"])
            if len(live) == len(second) and not third:
                third = [await submit(pair.a, "it.nobody") for _ in range(3)]
            if len(live) == 8:
                break
    assert live == [*second, *third]
    from_b = (await pair.b.get(f"{API}/events", params={"type": "task.queued", "limit": 500})).json()["items"]
    ids = [(event["id"], event["subject"]) for event in from_b]
    assert ids[: len(seen)] == seen, "both servers show one order"


async def test_failed_logins_count_at_all_servers(pair: Pair) -> None:
    """Guesses at A slow down guesses at B."""
    wrong = {"username": "nobody-knows", "password": "certainly not this one"}
    codes = [(await pair.a.post(f"{API}/auth/login", json=wrong)).status_code for _ in range(6)]
    assert codes[:5] == [401] * 5
    refused = await pair.b.post(f"{API}/auth/login", json=wrong)
    assert (refused.status_code, refused.json()["code"]) == (429, "rate-limited")
    assert int(refused.headers["retry-after"]) >= 1


async def test_a_token_revoked_at_one_server_is_refused_at_the_other(pair: Pair) -> None:
    """Within 5 s, also where it was used a moment ago (G14)."""
    made = (await pair.a.post(f"{API}/auth/tokens", json={"name": "short"})).json()
    headers = {"Authorization": f"Bearer {made['token']}"}
    assert (await pair.b.get(f"{API}/auth/me", headers=headers)).status_code == 200
    assert (await pair.a.delete(f"{API}/auth/tokens/{made['id']}")).status_code == 204

    async def refused() -> bool:
        return (await pair.b.get(f"{API}/auth/me", headers=headers)).status_code == 401

    await until(refused, 5, "B refuses the token")


async def test_artifacts_uploaded_at_one_server_are_read_at_the_other(pair: Pair) -> None:
    """Whole and in part, at once."""
    data = b"0123456789" * 50_000
    made = await pair.a.post(f"{API}/artifacts", params={"name": "a.bin"}, content=data)
    assert made.status_code == 201, made.text
    path = f"{API}/artifacts/{made.json()['id']}"
    assert made.json()["sha256"] == hashlib.sha256(data).hexdigest()
    assert (await pair.b.get(f"{path}/content")).content == data
    part = await pair.b.get(f"{path}/content", headers={"Range": "bytes=300005-300009"})
    assert (part.status_code, part.content) == (206, b"56789")
    assert (await pair.b.delete(path)).status_code == 204
    assert (await pair.a.get(path)).status_code == 404


@pytest.mark.parametrize("parts", [200])
async def test_a_run_whose_tasks_are_done_by_agents_of_two_servers_completes(
    parts: int, pair: Pair, tmp_path: Path
) -> None:
    """A fan-out over agents of both servers: every part is made once, counted once, and both agents had some of it."""
    token = await enrolment(pair.a)
    agents = [
        AgentProcess(tmp_path, name, url, token, slots=10).start()
        for name, url in (("at-a", pair.url_a), ("at-b", pair.url_b))
    ]
    try:
        await agents_online(pair.a, ["at-a", "at-b"])
        definition = msgspec.json.encode(parts_pipeline())
        made = await pair.a.post(f"{API}/pipelines", content=definition, headers={"Content-Type": "application/json"})
        assert made.status_code == 201, made.text
        run_id = await started(pair.b, "parts", {"seed": "two", "parts": parts}, "once")
        assert await started(pair.a, "parts", {"seed": "two", "parts": parts}, "once") == run_id
        run = await completed(pair.a, run_id, 90)
        stages = {stage["name"]: stage for stage in run["stages"]}
        assert stages["make"]["counts"]["rows_out"] == parts * 8, stages["make"]
        assert stages["make"]["done"] == stages["make"]["total"], stages["make"]
        ids = {item["name"]: item["id"] for item in (await pair.b.get(f"{API}/agents")).json()["items"]}
        tasks: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            params = {"limit": 500} | ({"cursor": cursor} if cursor else {})
            answer = (await pair.b.get(f"{API}/runs/{run_id}/tasks", params=params)).json()
            tasks += answer["items"]
            if not (cursor := answer.get("next_cursor")):
                break
        by_agent = [sum(one["agent_id"] == ids[name] for one in tasks) for name in ("at-a", "at-b")]
        assert {one["state"] for one in tasks} == {"completed"}
        assert sum(by_agent) == len(tasks) == parts + 3, (by_agent, len(tasks))
        assert min(by_agent) > parts // 20, by_agent
        output = (await pair.a.get(f"{API}/runs/{run_id}/stages/make/output")).json()
        assert output["parts"] == parts
    finally:
        for agent in agents:
            agent.kill()


async def test_status_shows_all_servers_and_one_leader(pair: Pair) -> None:
    """Both servers name the same two, and the same one of them leads."""
    shown = [(await client.get(f"{API}/status")).json()["cluster"] for client in (pair.a, pair.b)]
    assert [cluster["store"] for cluster in shown] == ["mongodb", "mongodb"]
    assert [cluster["queue"] for cluster in shown] == ["redis", "redis"]
    assert [sorted(server["name"] for server in cluster["servers"]) for cluster in shown] == [
        ["server-0", "server-1"]
    ] * 2
    leaders = [[server["id"] for server in cluster["servers"] if server["leader"]] for cluster in shown]
    assert leaders[0] == leaders[1]
    assert len(leaders[0]) == 1
