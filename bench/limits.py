"""Limits (K): how long a slot stands idle between two tasks of a key with a limit of one, with one key and with three."""

import asyncio
import time
from itertools import pairwise
from typing import Final

from bench.loads import DURABLE
from bench.stand import Stand, stand
from bench.statistics import Line, median, percentile, rounded

_TASKS: Final = 300
_BATCH: Final = 100
_PATIENCE_SECONDS: Final = 120.0


async def limits(reps: int) -> list[Line]:
    """K: tasks of 10 ms, one at a time by their keys; the gap is from the end of a handler to the beginning of the next."""
    found: list[Line] = []
    async with stand("noop", slots=16) as there:
        seconds: dict[int, float] = {}
        for keys in (1, 3):
            gaps: list[float] = []
            taken: list[float] = []
            efforts: list[dict[str, float]] = []
            for rep in range(reps):
                with there.metered() as usage:
                    times = await _once(there, [f"{keys}-{rep}-{number}" for number in range(keys)])
                gaps += [(begun - ended) * 1000 for (_, ended), (begun, _) in pairwise(times)]
                taken.append(times[-1][1] - times[0][0])
                efforts.append(usage.per_task(_TASKS))
            seconds[keys] = median(taken)
            found.append(
                {
                    "bench": "K",
                    "mode": f"{keys} keys",
                    "tasks": _TASKS,
                    "p50_ms": rounded(percentile(gaps, 50)),
                    "p99_ms": rounded(percentile(gaps, 99)),
                    "seconds": rounded(seconds[keys]),
                    **efforts[-1],
                    "durable": DURABLE,
                }
            )
        found[-1]["times_one_key"] = rounded(seconds[3] / seconds[1])
    return found


async def _once(there: Stand, keys: list[str]) -> list[tuple[float, float]]:
    """Run tasks that share these keys; returns when each handler began and ended, in order."""
    spec = {"type": "bench.short", "payload": 0.01, "limits": [{"key": key, "concurrency": 1} for key in keys]}
    ids: list[str] = []
    for _ in range(_TASKS // _BATCH):
        answer = await there.api.json("POST", "/tasks/batch", {"tasks": [spec] * _BATCH})
        ids += [item["id"] for item in answer["items"]]
    end = time.monotonic() + _PATIENCE_SECONDS
    while (await there.api.json("GET", f"/tasks/{ids[-1]}"))["state"] != "completed":
        if time.monotonic() > end:
            raise AssertionError("not completed in time")
        await asyncio.sleep(0.1)
    results = [(await there.api.json("GET", f"/tasks/{task}"))["result"] for task in ids]
    return sorted((float(one["begun"]), float(one["ended"])) for one in results)
