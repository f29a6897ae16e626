"""Throughput with one to three servers, and how long it takes from a submission until the agent begins."""

import asyncio
import itertools
import time
from typing import Any, Final

import msgspec

from bench.cluster_stand import Cluster, Databases, Effort, cluster, one_member
from bench.http import Refused, connections, encode
from bench.loads import BATCH, CONNECTIONS, payload
from bench.statistics import Line, median, percentile, rounded
from mcp_control import AsyncClient
from mcp_control.sdk.errors import ApiProblem, NotNow
from mcp_control.sdk.tasks import AsyncTaskHandle
from mcp_control.tasks.model import TaskSpec

DURABLE: Final = (
    "MongoDB, majority and journal: submission, assignment and result are each in an acknowledged transaction"
)
_WAIT: Final = 120.0
_READ: Final = 500
SLOTS: Final = 256


async def submitted_batched(there: Cluster, count: int) -> list[str]:
    """Submit in requests of 500, two in flight to each server."""
    ids: list[str] = []
    starts = iter(range(0, count, BATCH))

    async def work(client: AsyncClient) -> None:
        for start in starts:
            numbers = range(start, min(start + BATCH, count))
            specs = [TaskSpec(type="bench.noop", payload=msgspec.Raw(encode(payload(number)))) for number in numbers]
            for handle in await accepted(client, specs):
                if isinstance(handle, ApiProblem):
                    raise handle
                ids.append(handle.id)

    async def accepted(client: AsyncClient, specs: list[TaskSpec]) -> list[AsyncTaskHandle | ApiProblem]:
        while True:
            try:
                return await client.tasks.submit_many(specs)
            except NotNow:  # more was offered than the servers take; the client waited as it was told
                there.refused += 1

    async def with_client(url: str, token: str) -> None:
        async with AsyncClient(url, token=token) as client:
            await asyncio.gather(work(client), work(client))

    await asyncio.gather(*(with_client(stand.url, stand.token) for stand in there.stands))
    return ids


async def submitted_one_by_one(there: Cluster, count: int) -> list[str]:
    """Submit one task per request over 32 connections, spread over the servers."""
    ids: list[str] = []
    numbers = iter(range(count))

    async def on_server(url: str, token: str) -> None:
        async with connections(url, token, CONNECTIONS // len(there.stands)) as opened:

            async def work(connection: Any) -> None:
                for number in numbers:
                    body = {"type": "bench.noop", "payload": payload(number)}
                    while True:
                        try:
                            ids.append((await connection.json("POST", "/tasks", body))["id"])
                            break
                        except Refused as refused:
                            if not str(refused).startswith("POST /tasks: HTTP/1.1 503"):
                                raise
                            there.refused += 1
                            await asyncio.sleep(1)

            await asyncio.gather(*map(work, opened))

    await asyncio.gather(*(on_server(stand.url, stand.token) for stand in there.stands))
    return ids


MODES: Final = {"batched": (submitted_batched, 10_000), "single": (submitted_one_by_one, 3_000)}


async def done(there: Cluster, mode: str, count: int) -> tuple[list[str], float]:
    """Submit so many tasks; when all have completed, return their ids and the seconds until the last one was accepted."""
    before = await there.first.completed()
    began = time.perf_counter()
    ids = await MODES[mode][0](there, count)
    took = time.perf_counter() - began
    await there.first.api.json("GET", f"/tasks/{ids[-1]}?wait=30")
    end = time.monotonic() + _WAIT
    while await there.first.completed() < before + count:
        if time.monotonic() > end:
            raise TimeoutError("the tasks were not all completed in time")
        await asyncio.sleep(0.03)
    return ids, took


async def _checked(there: Cluster, ids: list[str], count: int) -> None:
    """Read every result, from each server in turn: outside the clock."""
    if len(set(ids)) != count:
        raise AssertionError(f"{count} tasks were submitted, {len(set(ids))} are known")
    stands = itertools.cycle(there.stands)
    for start in range(0, count, _READ):
        found = await next(stands).api.json("POST", "/tasks/get", {"ids": ids[start : start + _READ]})
        for view in found["items"]:
            if view["state"] != "completed" or view["result"] != {"ok": True}:
                raise AssertionError(f"not completed: {view}")


async def measured(there: Cluster, mode: str, reps: int) -> Line:
    """Return the figures of one way to submit."""
    count = MODES[mode][1]
    await done(there, mode, count // 10)
    runs: list[Effort] = []
    submits: list[float] = []
    there.refused = 0
    for _ in range(reps):
        with there.metered() as effort:
            ids, took = await done(there, mode, count)
        runs.append(effort)
        submits.append(count / took)
        await _checked(there, ids, count)
    each = [run.per_task(count) for run in runs]
    return {
        "n": count,
        "tasks_per_s": round(median(count / run.seconds for run in runs)),
        "submit_per_s": round(median(submits)),
        "refused": there.refused,
        "cpu_us": {side: round(median(one[side] for one in each)) for side in each[0]},
        "runs": [round(count / run.seconds) for run in runs],
    }


async def throughput(there: Databases, reps: int) -> list[Line]:
    """T: tasks per second from the first submission until every result is committed; an agent at each server.

    On three members, each with its copy on these cores, and on one.
    """
    lines = [line for servers in (1, 2, 3) for line in await _throughput(there, servers, reps)]
    with one_member(there) as alone:
        return lines + [line for servers in (1, 2) for line in await _throughput(alone, servers, reps)]


async def _throughput(there: Databases, servers: int, reps: int) -> list[Line]:
    members = len(there.mongo.ports)
    lines: list[Line] = []
    async with cluster(there, servers) as made:
        for stand in made.stands:
            await stand.start_agents("noop", 1, SLOTS)
        for mode in MODES:
            line = await measured(made, mode, reps)
            about = {"bench": "T", "mode": mode, "servers": servers, "members": members}
            lines.append({**about, **line, "durable": DURABLE})
    return lines


# --- dispatch ---


async def dispatched(there: Cluster, submit_to: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return milliseconds from sending a submission until the agent's handler began, and until its answer was there."""
    api = there.stands[submit_to].api
    begun: list[float] = []
    ended: list[float] = []
    for number in range(rounds + 20):
        sent = time.time()
        view = await api.json("POST", "/tasks?wait=10", {"type": "bench.clock", "payload": payload(number)})
        back = time.time()
        if view["state"] != "completed":
            raise AssertionError(f"not completed: {view}")
        if number >= 20:
            begun.append((view["result"]["at"] - sent) * 1000)
            ended.append((back - sent) * 1000)
    return begun, ended


def _percentiles(figures: tuple[list[float], list[float]]) -> Line:
    begun, ended = figures
    return {
        "p50_ms": rounded(percentile(begun, 50)),
        "p99_ms": rounded(percentile(begun, 99)),
        "end_p50_ms": rounded(percentile(ended, 50)),
        "end_p99_ms": rounded(percentile(ended, 99)),
    }


async def dispatch(there: Databases, rounds: int) -> list[Line]:
    """D: an idle system of two servers; the agent at the server that is asked, and at the other one."""
    lines: list[Line] = []
    async with cluster(there, 2) as made:
        await made.stands[0].start_agents("noop", 1, SLOTS)
        for mode, server in (("same server", 0), ("other server", 1)):
            lines.append(
                {"bench": "D", "mode": mode, "n": rounds, **_percentiles(await dispatched(made, server, rounds))}
            )
    return lines


async def without_redis(there: Databases, reps: int, rounds: int) -> list[Line]:
    """R: Redis is killed under two servers; throughput and dispatch from the store alone."""
    lines: list[Line] = []
    async with cluster(there, 2) as made:
        for stand in made.stands:
            await stand.start_agents("noop", 1, SLOTS)
        there.redis.kill()
        try:
            await made.queue_is("store")
            lines += [{"bench": "R", "mode": mode, "servers": 2, **await measured(made, mode, reps)} for mode in MODES]
            made.stands[1].stop_agents()
            for mode, server in (("same server", 0), ("other server", 1)):
                figures = await dispatched(made, server, rounds)
                lines.append({"bench": "R", "mode": f"dispatch, {mode}", "n": rounds, **_percentiles(figures)})
        finally:
            there.redis.start()
    return lines
