"""How cost grows with the tasks that wait: claims, with Redis and without, and the first page of every list."""

import asyncio
import json
import secrets
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final
from urllib.request import urlopen

import msgspec
import pymongo

from bench.cluster_stand import Cluster, Databases, cluster, new_database
from bench.http import Connection, Refused, connections
from bench.loads import TEXT
from bench.statistics import Line, percentile, rounded
from mcp_control.app import KINDS
from mcp_control.kernel.changes import Change, Entity
from mcp_control.kernel.clock import SystemClock
from mcp_control.kernel.ids import IdSource
from mcp_control.storage.mongo.store import MongoStore
from mcp_control.tasks.model import TASK_KIND, Origin, TaskSpec
from mcp_control.tasks.records import write
from mcp_control.tasks.submission import new_task
from mcp_control.testing.loading import load_mongo

TYPE: Final = "bench.queued"
_FILL: Final = 500
_THROUGH: Final = 10_000  # more than are ever claimed
_SINGLE: Final = 100
_BATCH: Final = 100
_SPARE: Final = 10  # no more than this part of what waits is claimed by the hundred
_SHIFT: Final = 20
_FILTERS: Final = (
    "/tasks?state=queued",
    "/tasks?state=completed",
    f"/tasks?type={TYPE}",
    f"/tasks?state=queued&type={TYPE}&order=asc",
    "/tasks?limit=200",
)


async def fill(uri: str, count: int) -> float:
    """Put so many waiting tasks into a database; return how many the store took in a second. Beyond 10,000 they go straight into it."""
    store = MongoStore(uri, node="bench")
    await store.open(KINDS, lambda _: None)
    clock = SystemClock()
    tasks = _waiting(clock, count)
    through = min(count, _THROUGH)
    began = time.perf_counter()
    try:
        while changes := [Change([entity]) for entity in islice(tasks, min(_FILL, through))]:
            through -= len(changes)
            if any(await store.commit(changes)):
                raise AssertionError("a task was refused")
        rate = min(count, _THROUGH) / (time.perf_counter() - began)
    finally:
        await store.close()
    if count <= _THROUGH:
        return rate
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        rows = ((one.id, one.index, one.hot) for one in tasks)
        await asyncio.to_thread(load_mongo, client.get_default_database(), TASK_KIND, rows)
    return rate


def _waiting(clock: SystemClock, count: int) -> Iterator[Entity]:
    ids = IdSource(clock)
    spec = TaskSpec(type=TYPE)
    origin = Origin(principal="bench")
    for number in range(count):
        now = clock.now()
        made = new_task(
            spec,
            task_id=ids.new("task"),
            tenant="default",
            origin=origin,
            now=now,
            order=(now << _SHIFT) + number,
        )
        yield write(made, msgspec.json.encode({"i": number, "text": TEXT}))[1]


class _Claimer:
    """An agent without a WebSocket, so that each claim is a request that can be timed."""

    def __init__(self, connection: Connection, instance: str) -> None:
        self._connection = connection
        self._path = f"/agents/session/{instance}"
        self._reports = 0

    async def claim(self, limit: int) -> tuple[list[dict[str, Any]], float]:
        """Return what was given, and after how many seconds."""
        began = time.perf_counter()
        answer = await self._connection.json("POST", f"{self._path}/claim?wait=10&limit={limit}")
        return answer["tasks"], time.perf_counter() - began

    async def done(self, tasks: list[dict[str, Any]]) -> None:
        self._reports += 1
        items = [
            {"task_id": task["task_id"], "lease_token": task["lease_token"], "outcome": "completed", "result": {}}
            for task in tasks
        ]
        await self._connection.json(
            "POST", f"{self._path}/report", {"op": "report", "id": self._reports, "done": items}
        )
        await self._connection.json(
            "POST", f"{self._path}/heartbeat", {"beat": {"tick": self._reports, "free_slots": 1000}}
        )


async def claims(there: Cluster, queued: int) -> Line:
    """Claim waiting tasks one by one and by the hundred."""
    stand = there.first
    enrolment = (await stand.api.json("POST", "/agents/enrolment-tokens", {"uses": 1}))["token"]
    spec = {"name": f"claimer-{secrets.token_hex(3)}", "capabilities": [{"name": TYPE}], "slots": 1000}
    async with connections(stand.url, enrolment, 1) as (enrolling,):
        credential = (await enrolling.json("POST", "/agents/register", spec))["credential"]
    async with connections(stand.url, credential, 1) as (connection,):
        hello = {"op": "hello", "protocol": 1, "agent": spec}
        welcome = await connection.json("POST", "/agents/session", hello)
        claimer = _Claimer(connection, welcome["instance_id"])
        single: list[float] = []
        for number in range(_SINGLE + 5):
            tasks, took = await claimer.claim(1)
            await claimer.done(tasks)
            if number >= 5:
                single.append(took * 1000)
        claimed, seconds = 0, 0.0
        for _ in range(max(2, min(10, queued // _BATCH // _SPARE))):
            tasks, took = await claimer.claim(_BATCH)
            claimed, seconds = claimed + len(tasks), seconds + took
            await claimer.done(tasks)
        await connection.request("DELETE", f"/agents/session/{welcome['instance_id']}")
    return {
        "claims_per_s": round(claimed / seconds),
        "p50_ms": rounded(percentile(single, 50)),
        "p99_ms": rounded(percentile(single, 99)),
    }


def _fetched(url: str) -> bytes:
    with urlopen(url) as answer:  # noqa: S310  loopback
        return bytes(answer.read())


async def lists(there: Cluster, rounds: int) -> list[Line]:
    """Time the first page of every list of the API, and of tasks with filters."""
    api = there.first.api
    document = json.loads(await asyncio.to_thread(_fetched, f"{there.first.url}/openapi.json"))
    paths = [
        path.removeprefix("/api/v1") for path, verbs in document["paths"].items() if "get" in verbs and "{" not in path
    ]
    lines: list[Line] = []
    for path in (*(path for path in paths if path.count("/") == 1), *_FILTERS):
        try:
            answer = await api.json("GET", path)
        except (Refused, msgspec.DecodeError):
            continue
        if not isinstance(answer, dict) or "items" not in answer:
            continue
        took: list[float] = []
        for _ in range(rounds):
            began = time.perf_counter()
            await api.request("GET", path)
            took.append((time.perf_counter() - began) * 1000)
        figures = {"p50_ms": rounded(percentile(took, 50)), "p95_ms": rounded(percentile(took, 95))}
        lines.append({"bench": "L", "route": path, "items": len(answer["items"]), **figures})
    return lines


async def growth(there: Databases, sizes: list[int], rounds: int) -> list[Line]:
    """G and L: fill, claim with Redis, claim without it; at the largest size also the lists."""
    lines: list[Line] = []
    for size in sizes:
        database = new_database()
        filled = await fill(there.mongo.uri(database), size)
        began = time.perf_counter()
        async with cluster(there, 1, database=database) as made:
            started = time.perf_counter() - began
            figures = {"filled_per_s": round(filled), "start_and_refill_s": round(started, 1)}
            lines.append({"bench": "G", "mode": "with Redis", "queued": size, **await claims(made, size), **figures})
            if size == max(sizes):
                lines += [{**line, "queued": size} for line in await lists(made, rounds)]
            there.redis.kill()
            try:
                await made.queue_is("store")
                lines.append({"bench": "G", "mode": "store alone", "queued": size, **await claims(made, size)})
            finally:
                there.redis.start()
    return lines
