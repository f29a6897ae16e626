"""Balancing (B): two agents, one ten times as fast as the other; how long tasks take under each strategy, in the same run."""

import asyncio
import time
from datetime import datetime
from typing import Final

from bench.stand import Stand, stand
from bench.statistics import Line, median, percentile, rounded

_TASKS: Final = 200
_PER_SECOND: Final = 50.0
_PATIENCE_SECONDS: Final = 60.0


async def balancing(reps: int) -> list[Line]:
    """B: an open loop of 50 tasks a second, far below what both can do; the time is from submission to the end, by the server's clock."""
    means: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    async with stand("uneven", agents=2, slots=16) as there:
        await _once(there, "round_robin", 20)  # both are known before anything is compared
        for _ in range(reps):
            for strategy in ("least_loaded", "fastest"):
                taken = await _once(there, strategy, _TASKS)
                means.setdefault(strategy, []).append(sum(taken) / len(taken))
                times.setdefault(strategy, []).extend(taken)
    found: list[Line] = [
        {
            "bench": "B",
            "mode": strategy,
            "tasks": _TASKS,
            "mean_ms": rounded(median(means[strategy])),
            "p50_ms": rounded(percentile(each, 50)),
            "p99_ms": rounded(percentile(each, 99)),
        }
        for strategy, each in times.items()
    ]
    found[-1]["times_faster"] = rounded(median(means["least_loaded"]) / median(means["fastest"]))
    return found


async def _once(there: Stand, strategy: str, count: int) -> list[float]:
    """Submit tasks at a rate; returns milliseconds from the submission of each to its end."""
    began = time.monotonic()
    ids: list[str] = []
    for number in range(count):
        await asyncio.sleep(max(0.0, began + number / _PER_SECOND - time.monotonic()))
        made = await there.api.json("POST", "/tasks", {"type": "bench.uneven", "needs": {"balancing": strategy}})
        ids.append(made["id"])
    return [await _taken(there, task_id) for task_id in ids]


async def _taken(there: Stand, task_id: str) -> float:
    end = time.monotonic() + _PATIENCE_SECONDS
    while (task := await there.api.json("GET", f"/tasks/{task_id}"))["state"] != "completed":
        if time.monotonic() > end:
            raise AssertionError("not completed in time")
        await asyncio.sleep(0.05)
    created, finished = (datetime.fromisoformat(task[name]) for name in ("created_at", "finished_at"))
    return (finished - created).total_seconds() * 1000
