"""Throughput (T), latency (L) and chains (C) through the whole product: client, server, agent process."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from bench.http import Connection, connections, encode
from bench.stand import Stand, Usage, stand
from bench.statistics import Line, median, percentile, rounded
from mcp_control import AsyncClient
from mcp_control.sdk.errors import ApiProblem
from mcp_control.tasks.model import TaskSpec

TEXT: Final = "x" * 100
BATCH: Final = 500
CONNECTIONS: Final = 32
CHAINS: Final = 200
STAGES: Final = 6
_WAIT: Final = 60
DURABLE: Final = "SQLite, WAL, synchronous=FULL: submission, assignment and result are each in a flushed commit"

Submit = Callable[[Stand, int], Awaitable[list[str]]]


def payload(number: int) -> dict[str, object]:
    """Return the payload of the n-th task."""
    return {"i": number, "text": TEXT}


# --- T ---


async def _batched(there: Stand, count: int) -> list[str]:
    """Two requests of 500 tasks in flight."""
    ids: list[str] = []
    async with AsyncClient(there.url, token=there.token) as client:
        starts = iter(range(0, count, BATCH))

        async def work() -> None:
            for start in starts:
                numbers = range(start, min(start + BATCH, count))
                specs = [
                    TaskSpec(type="bench.noop", payload=msgspec.Raw(encode(payload(number)))) for number in numbers
                ]
                for handle in await client.tasks.submit_many(specs):
                    if isinstance(handle, ApiProblem):
                        raise handle
                    ids.append(handle.id)

        await asyncio.gather(work(), work())
    return ids


async def _single(there: Stand, count: int) -> list[str]:
    """One task per request, 32 connections."""
    ids: list[str] = []
    async with connections(there.url, there.token, CONNECTIONS) as opened:
        numbers = iter(range(count))

        async def work(connection: Connection) -> None:
            for number in numbers:
                view = await connection.json("POST", "/tasks", {"type": "bench.noop", "payload": payload(number)})
                ids.append(view["id"])

        await asyncio.gather(*map(work, opened))
    return ids


async def _sdk(there: Stand, count: int) -> list[str]:
    """`tasks.submit` from 32 coroutines; the SDK joins what is submitted at the same time."""
    ids: list[str] = []
    async with AsyncClient(there.url, token=there.token) as client:
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                handle = await client.tasks.submit("bench.noop", payload(number))
                ids.append(handle.id)

        await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
    return ids


MODES: Final[dict[str, tuple[Submit, int]]] = {
    "batched": (_batched, 20_000),
    "single": (_single, 10_000),
    "sdk": (_sdk, 10_000),
}


async def _until(there: Stand, target: int) -> None:
    end = time.monotonic() + _WAIT
    while await there.completed() < target:
        if time.monotonic() > end:
            raise TimeoutError("the tasks were not all completed in time")
        await asyncio.sleep(0.01)


async def _readable(there: Stand, ids: list[str]) -> None:
    """Read every result: outside the clock."""
    for start in range(0, len(ids), BATCH):
        found = await there.api.json("POST", "/tasks/get", {"ids": ids[start : start + BATCH]})
        for view in found["items"]:
            if view["state"] != "completed" or view["result"] != {"ok": True}:
                raise AssertionError(f"not completed: {view}")


async def throughput(reps: int) -> list[Line]:
    """T: tasks per second, from the first submission until every result is committed."""
    lines: list[Line] = []
    for mode, (submit, count) in MODES.items():
        async with stand("noop") as there:
            await done_by(there, submit, 2 * BATCH)
            runs: list[Usage] = []
            submits: list[float] = []
            for _ in range(reps):
                with there.metered() as usage:
                    ids, took = await done_by(there, submit, count)
                submits.append(count / took)
                runs.append(usage)
                if len(set(ids)) != count:
                    raise AssertionError(f"{count} tasks were submitted, {len(set(ids))} are known")
                await _readable(there, ids)
            lines.append(
                {
                    "bench": "T",
                    "mode": mode,
                    "n": count,
                    "tasks_per_s": round(median(count / run.seconds for run in runs)),
                    "submit_per_s": round(median(submits)),
                    **_cpu(runs, count),
                    "runs": [round(count / run.seconds) for run in runs],
                    "server_rss_mb": round(runs[-1].server_rss_mb),
                    "agent_rss_mb": round(runs[-1].agent_rss_mb),
                    "durable": DURABLE,
                }
            )
    return lines


async def done_by(there: Stand, submit: Submit, count: int) -> tuple[list[str], float]:
    """Submit so many tasks; when all have completed, return their ids and the seconds that submitting them took."""
    before = await there.completed()
    began = time.perf_counter()
    ids = await submit(there, count)
    took = time.perf_counter() - began
    # The last one's end tells when to begin to count, so that the counting costs nothing while work goes on.
    await there.api.json("GET", f"/tasks/{ids[-1]}?wait=30")
    await _until(there, before + count)
    return ids, took


def _cpu(runs: list[Usage], tasks: int) -> Line:
    each = [run.per_task(tasks) for run in runs]
    return {name: round(median(one[name] for one in each), 1) for name in each[0]}


# --- L ---


async def latency_once(there: Stand, number: int) -> None:
    """Submit one task and wait for its result in the same request."""
    view = await there.api.json("POST", "/tasks?wait=10", {"type": "bench.noop", "payload": payload(number)})
    if view["state"] != "completed":
        raise AssertionError(f"not completed: {view}")


async def latency(reps: int, rounds: int = 300) -> list[Line]:
    """L: milliseconds from submission to result of one task on an idle system."""
    lines: list[Line] = []
    async with stand("noop") as there, AsyncClient(there.url, token=there.token) as client:
        counter = itertools.count()

        async def plain() -> None:
            await latency_once(there, next(counter))

        async def sdk() -> None:
            if await client.tasks.run("bench.noop", payload(next(counter)), wait=10) != {"ok": True}:
                raise AssertionError("another result than expected")

        for mode, ask in (("http", plain), ("sdk", sdk)):
            for _ in range(50):
                await ask()
            figures, usages = [], []
            for _ in range(reps):
                with there.metered() as usage:
                    figures.append(await _timed(ask, rounds))
                usages.append(usage)
            lines.append(
                {
                    "bench": "L",
                    "mode": mode,
                    "rounds": rounds,
                    **_percentiles(figures),
                    **_cpu(usages, rounds),
                    "durable": DURABLE,
                }
            )
    return lines


async def _timed(ask: Callable[[], Awaitable[None]], rounds: int) -> list[float]:
    taken: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        await ask()
        taken.append((time.perf_counter() - began) * 1000)
    return taken


def _percentiles(figures: list[list[float]]) -> Line:
    return {
        "p50_ms": rounded(median(percentile(figure, 50) for figure in figures)),
        "p99_ms": rounded(median(percentile(figure, 99) for figure in figures)),
    }


# --- C ---


def _chain() -> dict[str, object]:
    stages: list[dict[str, object]] = [
        {"id": "s1", "uses": "bench.step", "with": {"i": "${{ params.i }}", "text": "${{ params.text }}"}}
    ]
    for number in range(2, STAGES + 1):
        before = f"stages.s{number - 1}.output"
        given = {"i": f"${{{{ {before}.i }}}}", "text": f"${{{{ {before}.text }}}}"}
        stages.append({"id": f"s{number}", "uses": "bench.step", "needs": [f"s{number - 1}"], "with": given})
    params = {"i": {"type": "integer"}, "text": {"type": "string"}}
    spec = {"params": params, "stages": stages}
    return {"apiVersion": "mcp-control/v1", "kind": "Pipeline", "metadata": {"name": "chain"}, "spec": spec}


async def apply_chain(there: Stand) -> None:
    """Define the pipeline."""
    await there.api.json("POST", "/pipelines", _chain())


_RUN: Final = {"params": {"i": 0, "text": TEXT}}


async def _ended(connection: Connection, run_id: str) -> None:
    view = await connection.json("GET", f"/runs/{run_id}?wait=30")
    if view["state"] != "completed":
        raise AssertionError(f"not completed: {view}")


async def chain_once(there: Stand) -> None:
    """Start one run and wait for its end."""
    run = await there.api.json("POST", "/pipelines/chain/execute", _RUN)
    await _ended(there.api, run["id"])


async def chains_at_once(opened: list[Connection], count: int) -> list[str]:
    """Start so many runs over these connections, then wait for all; return their ids."""
    ids: list[str] = []
    numbers = iter(range(count))

    async def start(connection: Connection) -> None:
        for _ in numbers:
            run = await connection.json("POST", "/pipelines/chain/execute", _RUN)
            ids.append(run["id"])

    await asyncio.gather(*map(start, opened))
    left = iter(ids)

    async def finish(connection: Connection) -> None:
        for run_id in left:
            await _ended(connection, run_id)

    await asyncio.gather(*map(finish, opened))
    return ids


async def chains(reps: int, rounds: int = 50) -> list[Line]:
    """C: a pipeline of six stages, each with the last one's result: one at a time, then 200 at once."""
    async with stand("noop") as there, connections(there.url, there.token, CONNECTIONS) as opened:
        await apply_chain(there)
        for _ in range(20):
            await chain_once(there)
        figures = [await _timed(lambda: chain_once(there), rounds) for _ in range(reps)]
        await chains_at_once(opened, CHAINS // 4)
        usages: list[Usage] = []
        for _ in range(reps):
            with there.metered() as usage:
                ids = await chains_at_once(opened, CHAINS)
            usages.append(usage)
            output = await there.api.json("GET", f"/runs/{ids[-1]}/stages/s{STAGES}/output")
            if output != {"i": STAGES, "text": TEXT}:
                raise AssertionError(f"another output than expected: {output}")
        rates = [CHAINS / usage.seconds for usage in usages]
        line: Line = {
            "bench": "C",
            "rounds": rounds,
            **_percentiles(figures),
            "at_once": CHAINS,
            "chains_per_s": round(median(rates), 1),
            **_cpu(usages, CHAINS * STAGES),
            "runs": [round(rate) for rate in rates],
            "durable": DURABLE,
        }
    return [line]
